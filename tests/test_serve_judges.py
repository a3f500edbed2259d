# What clients that people use make of the server, each in a round trip; `nox --session clients` has them all.
import asyncio
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI, OpenAI
from served import serving, write_model

from lmsleep import Session
from lmsleep.opening import open_model
from lmsleep.serve.wire import ChatBody, CompactBody, CompletionBody, ResponseBody

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

L = 24
MODEL, ALIAS = "tiny", "gpt-tiny"
CASES = 5_000
# These take any field, to refuse it by name.
BODIES = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/responses": ResponseBody,
    "/v1/responses/compact": CompactBody,
}
SHORT = ("max_tokens", "max_output_tokens", "max_completion_tokens")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("judges")
    write_model(path / MODEL)
    return path


@pytest.fixture(scope="module")
def url(folder):
    # Without debt: then every token is written by what a session in process writes it by.
    options = ["--window", L, "--passes", 2, "--debt", 0, "--alias", ALIAS, "--tokenizer", folder / MODEL]
    with serving(folder / MODEL, folder / "store", *options) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    with OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as made:
        yield made


def wanted(client, *texts):
    # What the likeliest answers to a conversation are: of every text after the first, an answer and a text.
    messages, answers = [], []
    for text in texts:
        messages.append({"role": "user", "content": text})
        made = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=8, temperature=0)
        answers.append(made.choices[0].message.content)
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_llm(url, client, tmp_path):
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: served\n  model_name: {MODEL}\n  api_base: {url}/v1\n  api_key_name: served\n"
    )
    (tmp_path / "keys.json").write_text('{"served": "any"}')

    def said(*argv):
        command = [sys.executable, "-m", "llm", "prompt", "-o", "max_tokens", "8", "-o", "temperature", "0"]
        done = subprocess.run(
            [*command, *argv], env={**os.environ, "LLM_USER_PATH": str(tmp_path)}, capture_output=True,
            text=True, check=True, timeout=120, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return done.stdout.removesuffix("\n")

    answers = [said("-m", "served", "hello"), said("-c", "and?", "--no-stream")]
    assert answers == wanted(client, "hello", "and?")


def test_litellm(url, client, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    how = {"model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": "any", "temperature": 0}
    chat = {**how, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
    [answer] = wanted(client, "hello")
    assert litellm.completion(**chat).choices[0].message.content == answer
    chunks = litellm.completion(**chat, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer
    first = litellm.responses(**how, input="hello", max_output_tokens=16)  # it asks for no less
    assert first.output[0].content[0].text.startswith(answer)
    second = litellm.responses(**how, input="and?", max_output_tokens=16, previous_response_id=first.id)
    assert second.usage.input_tokens_details.cached_tokens == first.usage.total_tokens
    with pytest.raises(litellm.BadRequestError, match="tools"):
        litellm.completion(**chat, tools=[{"type": "function", "function": {"name": "f"}}])


def test_openai_agents_with_a_session_that_compacts(url):
    agents = pytest.importorskip("agents")
    agents.set_tracing_disabled(True)

    async def talk():
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
            model = agents.OpenAIResponsesModel(model=ALIAS, openai_client=client)
            # Answers are drawn, since they must end by themselves.
            agent = agents.Agent(name="a", instructions="be brief", model=model)
            session = agents.OpenAIResponsesCompactionSession(
                "a", agents.SQLiteSession("a"), client=client, model=ALIAS,
                should_trigger_compaction=lambda told: len(told["compaction_candidate_items"]) >= 2,
            )  # fmt: skip
            answers, kinds = [], []
            for text in ("hello", "and?", "then?", "so?", "well?"):
                answers.append((await agents.Runner.run(agent, text, session=session)).final_output)
                kinds.append([item.get("type", "message") for item in await session.get_items()])
            streamed = agents.Runner.run_streamed(agent, "last?", session=session)
            raw = [e.data async for e in streamed.stream_events() if e.type == "raw_response_event"]
            deltas = [data.delta for data in raw if data.type == "response.output_text.delta"]
            return answers, kinds, streamed.final_output, "".join(deltas)

    answers, kinds, last, streamed = asyncio.run(talk())
    assert all(answers) and last == streamed
    assert kinds[0] == ["message"] * 2
    assert kinds[1] == ["compaction"]  # four messages became one item
    assert kinds[2] == ["compaction", "message", "message"]
    assert kinds[3] == ["compaction"]


def test_langchain(url, client):
    openai = pytest.importorskip("langchain_openai")
    how = {"model": MODEL, "base_url": f"{url}/v1", "api_key": "any", "temperature": 0, "max_tokens": 8}
    first, second = wanted(client, "hello", "and?")
    chat = openai.ChatOpenAI(**how)
    said = chat.invoke("hello")
    assert said.content == first and said.usage_metadata["output_tokens"] == 8
    assert chat.invoke([("user", "hello"), said, ("user", "and?")]).content == second
    assert "".join(str(chunk.content) for chunk in chat.stream("hello")) == first
    chat = openai.ChatOpenAI(**how, use_responses_api=True, use_previous_response_id=True)
    said = chat.invoke("hello")
    assert said.text == first
    told = chat.invoke([("user", "hello"), said, ("user", "and?")])
    assert told.usage_metadata["input_token_details"]["cache_read"] == said.usage_metadata["total_tokens"]
    assert "".join(chunk.text for chunk in chat.stream("hello")) == first


PAIRS = [
    ("a", " b"), ("", "no context"), ("a question", " an answer"),
    *(("q" * n, " yes" * m) for n in (L - 2, L - 1, L, L + 1, 3 * L) for m in (1, 2, 9)),
]  # fmt: skip


@pytest.mark.parametrize("batch", [1, 4])
def test_lm_eval_scores_what_it_scores_in_process(url, folder, batch):
    pytest.importorskip("tenacity")
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    from lmsleep.integrations.lm_eval import SleepLM

    def asked(kind, *arguments):
        return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]

    model, sleep, words = open_model(folder / MODEL, str(folder / MODEL), "cpu")
    own = SleepLM(Session(model, replace(sleep, window=L, passes=2), words, history=0))
    served = get_model("local-completions")(
        base_url=f"{url}/v1/completions", model=MODEL, tokenizer=str(folder / MODEL),
        tokenizer_backend="huggingface", batch_size=batch,
    )  # fmt: skip
    scores = asked("loglikelihood", *PAIRS)
    one, other = own.loglikelihood(scores), served.loglikelihood(scores)
    assert len({score for score, _ in one}) == len(PAIRS)
    for (mine, greedy), (theirs, likeliest) in zip(one, other, strict=True):
        assert math.isclose(mine, theirs, rel_tol=1e-5) and greedy == likeliest
    how = {"until": ["'"], "max_gen_toks": 2 * L, "temperature": 0.0}
    texts = asked("generate_until", *((context or "x", how) for context, _ in PAIRS))
    assert own.generate_until(texts) == served.generate_until(texts)


def test_no_case_of_schemathesis_is_a_fault_of_the_server(url, client):
    schemathesis = pytest.importorskip("schemathesis")
    operations = [
        found.ok() for found in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations()
    ]
    made = client.responses.create(model=MODEL, input="x", max_output_tokens=2)
    talk = client.conversations.create(items=[{"role": "user", "content": "x"}])
    memory = client.post("/memories", cast_to=dict, body={"text": "x"})
    ids = {"responses": made.id, "conversations": talk.id, "memories": memory["id"]}
    said = [{"role": "user", "content": "x"}]
    names = {
        "previous_response_id": made.id, "conversation": talk.id, "model": MODEL, "messages": said,
        "prompt": "x", "input": said, "items": said,
    }  # fmt: skip
    count, statuses = 0, {}

    def called(case, known):
        nonlocal count
        if known:  # what is sent names what there is, and no field that there is not; the rest is as drawn
            for kind, id in ids.items():
                if f"/v1/{kind}/{{id}}" in case.path and case.method != "DELETE":
                    case.path_parameters["id"] = id
            if isinstance(case.body, dict):
                fields = BODIES[case.path].model_fields if case.path in BODIES else case.body
                case.body = {name: value for name, value in case.body.items() if name in fields}
                case.body.update({name: 3 for name in SHORT if name in fields})
                if case.path.endswith("/ask"):
                    case.body["max_tokens"] = 3
                case.body.update({name: names[name] for name in names if name in case.body})
        answer = case.call(timeout=120)
        count += 1
        statuses.setdefault((case.method, case.path), set()).add(answer.status_code)
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)

    for number in range(1000):
        for operation in operations:
            test = given(case=operation.as_strategy(), known=st.booleans())(called)
            quick = settings(
                max_examples=50, database=None, deadline=None, derandomize=False,
                phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            seed(number)(quick(test))()
        if count >= CASES:
            break
    assert count >= CASES
    # They came through, too: what there is was found, changed and answered from.
    for path in (*BODIES, "/v1/conversations", "/v1/conversations/{id}/items", "/v1/memories/{id}/ask"):
        assert 200 in statuses["POST", path], statuses["POST", path]
