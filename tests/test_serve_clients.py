import json
import time
import urllib.request
from functools import partial
from pathlib import Path

import llm_comply
import openai
import pytest
from llm_comply import runner
from llm_comply.config import ComplianceConfig
from llm_comply.schema import SpecLoader
from llm_comply.tests import get_tests
from openai import OpenAI
from served import serving, write_model

L = 24
MODEL = "tiny"
ALIAS = "gpt-tiny"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clients")
    write_model(folder / MODEL)
    options = ["--tokenizer", folder / MODEL, "--window", L, "--passes", 2, "--alias", ALIAS]
    with serving(folder / MODEL, folder / "store", *options) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    with OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60) as made:
        yield made


def user(text):
    return [{"role": "user", "content": text}]


def ask(client, input, **how):
    return client.responses.create(
        **{"model": MODEL, "input": input, "max_output_tokens": 6, "temperature": 0, **how}
    )


def refused(call, kind, code=None, param=None):
    with pytest.raises(kind) as caught:
        call()
    error = caught.value.body
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "Traceback" not in error["message"] and "/" not in error["message"]
    assert code is None or error["code"] == code
    assert param is None or error["param"] == param
    return error


def raw(url, path, body, method="POST"):
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    request = urllib.request.Request(
        f"{url}{path}", data, {"Content-Type": "application/json"}, method=method
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


# Models


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL, ALIAS]
    assert client.models.retrieve(ALIAS).owned_by == "lmsleep"
    refused(lambda: client.models.retrieve("other"), openai.NotFoundError, "model_not_found", "model")


# Chat


def test_chat_answers_and_a_seed_repeats_it(client):
    def asked(**how):
        return client.chat.completions.create(
            **{"model": MODEL, "messages": user("hello"), "max_tokens": 8, "seed": 3, **how}
        )

    first, again, other, alias = asked(), asked(), asked(seed=4), asked(model=ALIAS)
    text = first.choices[0].message.content
    assert first.choices[0].message.role == "assistant" and text
    assert text == again.choices[0].message.content == alias.choices[0].message.content
    assert text != other.choices[0].message.content
    usage = first.usage
    assert usage.prompt_tokens == len("hello") + 3 and 0 < usage.completion_tokens <= 8
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert first.system_fingerprint == other.system_fingerprint
    short = asked(max_tokens=None, max_completion_tokens=2, temperature=0)
    assert short.usage.completion_tokens == 2 and short.choices[0].finish_reason == "length"


def test_a_history_that_is_resent_is_not_read_again(client):
    messages = [*user("a-long-history-" * 5)]
    first = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=200, seed=1)
    assert first.choices[0].finish_reason == "stop"
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, *user("and?")]
    second = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1)
    read = second.usage.prompt_tokens - second.usage.prompt_tokens_details.cached_tokens
    assert read == len("and?") + 3  # and its marks
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


def test_a_stream_of_several_answers_is_what_they_are_at_once(client):
    how = {"model": MODEL, "messages": user("tell"), "max_tokens": 40, "n": 3, "seed": 5}
    whole = client.chat.completions.create(**how)
    texts, ends, roles, usage = {}, {}, {}, None
    for chunk in client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}):
        assert chunk.object == "chat.completion.chunk" and usage is None
        usage = chunk.usage
        for choice in chunk.choices:
            assert choice.index not in ends
            roles.setdefault(choice.index, choice.delta.role)
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert set(roles.values()) == {"assistant"}
    assert [texts[i] for i in range(3)] == [choice.message.content for choice in whole.choices]
    assert [ends[i] for i in range(3)] == [choice.finish_reason for choice in whole.choices]
    assert len(set(texts.values())) == 3
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_stop_ends_an_answer_and_is_no_part_of_it(client):
    how = {"model": MODEL, "messages": user("stop"), "max_tokens": 60, "temperature": 0}
    text = client.chat.completions.create(**how).choices[0].message.content
    stop = text[2]
    cut = client.chat.completions.create(**how, stop=["never", stop]).choices[0]
    assert cut.message.content == text[: text.index(stop)] and cut.finish_reason == "stop"
    chunks = client.chat.completions.create(**how, stop=stop, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text[: text.index(stop)]


def test_odds_of_an_answer(client):
    how = {"model": MODEL, "messages": user("odds"), "max_tokens": 5, "logprobs": True, "temperature": 0}
    [choice] = client.chat.completions.create(**how, top_logprobs=3).choices
    assert len(choice.logprobs.content) == 5
    for one in choice.logprobs.content:
        assert len(one.top_logprobs) == 3 and one.logprob == one.top_logprobs[0].logprob < 0
        assert one.bytes is None or bytes(one.bytes).decode() == one.token
    chunks = client.chat.completions.create(**how, stream=True)
    told = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    assert [one.logprob for [one] in told] == [one.logprob for one in choice.logprobs.content]
    [choice] = client.chat.completions.create(**{**how, "logprobs": False}).choices
    assert choice.logprobs is None


# Completions


def test_completions_go_on_with_texts_and_tokens(client):
    how = {"model": MODEL, "max_tokens": 4, "temperature": 0}
    one = client.completions.create(prompt="once upon", **how)
    assert one.usage.prompt_tokens == 9 and one.choices[0].text
    two = client.completions.create(prompt=["once upon", "a time"], n=2, **how)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert two.choices[0].text == two.choices[1].text == one.choices[0].text
    assert two.usage.prompt_tokens == 15
    tokens = client.completions.create(prompt=[[5, 6, 7], [8]], **how)
    assert tokens.usage.prompt_tokens == 4
    assert "".join(
        c.choices[0].text for c in client.completions.create(prompt="once upon", stream=True, **how)
    ) == (one.choices[0].text)


def test_an_echo_tells_the_odds_of_the_prompt(client):
    text = "a prompt that is longer than two windows, so that sleeps lie in it"
    assert len(text) > 2 * L
    how = {"model": MODEL, "prompt": text, "temperature": 0, "logprobs": 2}
    [choice] = client.completions.create(**how, max_tokens=1, echo=True).choices
    odds = choice.logprobs
    assert choice.text.startswith(text) and odds.tokens[: len(text)] == list(text)
    assert odds.token_logprobs[0] is None and odds.top_logprobs[0] is None
    assert len(odds.token_logprobs) == len(odds.tokens) == len(text) + 1
    assert odds.text_offset[: len(text)] == list(range(len(text)))
    for token, p, top in list(zip(odds.tokens, odds.token_logprobs, odds.top_logprobs, strict=True))[1:]:
        assert p <= max(top.values()) < 0 and top[token] >= p
    # Each is what the model says when it has read so far and writes the next.
    for cut in (1, L - 1, L, L + 1, 2 * L + 3):
        [next_] = client.completions.create(
            **{**how, "prompt": text[:cut], "logprobs": 5}, max_tokens=1
        ).choices
        [likeliest] = next_.logprobs.tokens
        assert next_.logprobs.token_logprobs[0] == pytest.approx(
            max(odds.top_logprobs[cut].values()), abs=1e-4
        )
        assert likeliest in odds.top_logprobs[cut]
    [scored] = client.completions.create(**how, max_tokens=0, echo=True).choices
    assert scored.text == text and scored.logprobs.token_logprobs == odds.token_logprobs[: len(text)]
    chunks = [c.choices[0] for c in client.completions.create(**how, max_tokens=2, echo=True, stream=True)]
    assert chunks[0].text == text and chunks[0].logprobs.token_logprobs == scored.logprobs.token_logprobs
    assert chunks[1].logprobs.text_offset == [len(text)]
    [plain] = client.completions.create(**{**how, "logprobs": None}, max_tokens=1, echo=True).choices
    assert plain.text == choice.text and plain.logprobs is None


# Responses


def test_a_response_is_kept_and_gone_on_from_more_than_once(client):
    first = ask(client, "my name is Ada")
    assert first.object == "response" and first.output_text
    assert first.status == "incomplete" and first.incomplete_details.reason == "max_output_tokens"
    assert client.responses.retrieve(first.id) == first
    how = {"previous_response_id": first.id}
    one, same, other = ask(client, "who?", **how), ask(client, "who?", **how), ask(client, "when?", **how)
    assert one.output_text == same.output_text and one.id != same.id
    assert one.previous_response_id == other.previous_response_id == first.id
    known = one.usage.input_tokens_details.cached_tokens
    assert known == first.usage.total_tokens and one.usage.input_tokens > known
    assert one.usage.total_tokens == one.usage.input_tokens + one.usage.output_tokens
    ended = ask(client, "hi", max_output_tokens=2000, temperature=1)
    assert ended.status == "completed" and ended.incomplete_details is None and ended.completed_at


def test_events_of_a_stream_are_in_order(client):
    how = {"input": "count", "max_output_tokens": 40}
    events = list(ask(client, **how, stream=True, include=["message.output_text.logprobs"]))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    begin = ["created", "in_progress", "output_item.added", "content_part.added"]
    end = ["output_text.done", "content_part.done", "output_item.done", events[-1].response.status]
    assert kinds == [*begin, *["output_text.delta"] * len(deltas), *end]
    text = "".join(event.delta for event in deltas)
    response = events[-1].response
    assert text == response.output_text == events[-4].text == ask(client, **how).output_text
    assert {event.item_id for event in deltas} == {response.output[0].id}
    odds = response.output[0].content[0].logprobs
    assert [one for event in deltas for one in event.logprobs] and len(odds) == response.usage.output_tokens
    assert client.responses.retrieve(response.id) == response


def test_input_items_come_in_pages(client):
    said = [{"role": "user", "content": [{"type": "input_text", "text": str(i)}]} for i in range(5)]
    made = ask(client, said)
    items = list(client.responses.input_items.list(made.id, limit=2, order="asc"))
    assert [item.content[0].text for item in items] == list("01234")
    assert len({item.id for item in items}) == 5
    page = client.responses.input_items.list(made.id, limit=2)
    assert [item.content[0].text for item in page.data] == ["4", "3"]
    assert page.has_more and (page.first_id, page.last_id) == (items[4].id, items[3].id)
    after = client.responses.input_items.list(made.id, after=items[1].id)
    assert [item.content[0].text for item in after.data] == ["0"] and not after.has_more
    refused(lambda: client.responses.input_items.list(made.id, after="other"), openai.NotFoundError)
    refused(lambda: client.responses.input_items.list(made.id, limit=101), openai.BadRequestError)


def test_a_response_that_is_deleted_or_not_stored_is_gone(client):
    made, loose = ask(client, "x"), ask(client, "x", store=False)
    client.responses.delete(made.id)
    for id in (made.id, loose.id, "resp_none"):
        for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
            refused(partial(call, id), openai.NotFoundError, "response_not_found")
        refused(
            partial(ask, client, "y", previous_response_id=id),
            openai.NotFoundError,
            "previous_response_not_found",
            "previous_response_id",
        )


def finished(client, id):
    while (found := client.responses.retrieve(id)).status == "in_progress":
        time.sleep(0.02)
    return found


def test_a_response_in_the_background_is_waited_for_or_cancelled(client):
    made = ask(client, "slowly", background=True)
    assert (made.status, made.output, made.usage, made.background) == ("in_progress", [], None, True)
    done = finished(client, made.id)
    assert done.status == "incomplete" and done.output_text
    assert ask(client, "on", previous_response_id=made.id).output_text
    assert client.responses.cancel(made.id).status == "incomplete"  # too late
    refused(lambda: client.responses.cancel(ask(client, "x").id), openai.BadRequestError)
    endless = {"background": True, "max_output_tokens": 10**6}
    made = ask(client, "x", **endless)
    assert client.responses.cancel(made.id).status == "cancelled"
    assert client.responses.retrieve(made.id).status == "cancelled"
    refused(lambda: ask(client, "y", previous_response_id=made.id), openai.NotFoundError)
    made = ask(client, "x", **endless)
    client.responses.delete(made.id)
    refused(lambda: client.responses.retrieve(made.id), openai.NotFoundError)
    for how in ({"stream": True}, {"store": False}):
        refused(partial(ask, client, "x", background=True, **how), openai.BadRequestError)


def test_instructions_are_read_once(client):
    # This template lets the system speak first alone, so to repeat what is known would be refused.
    first = ask(client, "hi", instructions="be brief")
    plain = ask(client, "hi")
    assert first.instructions == "be brief"
    assert first.usage.input_tokens == plain.usage.input_tokens + len("be brief") + 2
    second = ask(client, "hi", instructions="be brief", previous_response_id=first.id)
    third = ask(client, "hi", previous_response_id=second.id)
    new = [r.usage.input_tokens - r.usage.input_tokens_details.cached_tokens for r in (second, third)]
    assert new[0] == new[1]
    ask(client, "hi", instructions="be brief", previous_response_id=third.id)
    refused(
        lambda: ask(client, "hi", instructions="be long", previous_response_id=third.id),
        openai.BadRequestError,
        param="input",
    )


# Compaction


def test_a_threshold_makes_an_item_that_stands_for_what_was_said(client):
    how = {"context_management": [{"type": "compaction", "compact_threshold": 30}]}
    short = ask(client, "short", **how)
    assert [item.type for item in short.output] == ["message"]
    # As chats go on that are resent by their clients: the item takes the place of what stood before it.
    long = ask(client, "a text of more than thirty tokens", **how)
    item, answer = long.output
    assert (item.type, answer.type) == ("compaction", "message") and item.encrypted_content
    history = [item.model_dump(), answer.model_dump(), *user("and?")]
    after = ask(client, history, **how)
    assert [i.type for i in after.output] == ["message"]
    assert after.usage.input_tokens_details.cached_tokens >= 34
    listed = client.responses.input_items.list(after.id, order="asc").data
    assert [i.type for i in listed] == ["compaction", "message", "message"]
    # And as they go on by name: a second sleep is asked for when as much was read again.
    on = ask(client, "y", previous_response_id=long.id, **how)
    assert [i.type for i in on.output] == ["message"]
    on = ask(client, "thirty tokens more, and some on top", previous_response_id=on.id, **how)
    assert [i.type for i in on.output] == ["compaction", "message"]


def test_a_stream_tells_of_a_compaction(client):
    how = {"context_management": [{"type": "compaction", "compact_threshold": 1}], "stream": True}
    events = list(ask(client, "sleep on it", **how))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    slept = ["output_item.added", "compaction.compacting", "output_item.done"]
    assert kinds[2:6] == [*slept, "output_item.added"]
    assert [event.output_index for event in events[2:6]] == [0, 0, 0, 1]
    assert events[3].item_id == events[-1].response.output[0].id
    assert events[-1].response.output[1].content[0].text


def test_compact_sleeps_on_a_history_or_on_a_response(client):
    texts = [*user("one"), {"role": "assistant", "content": "two"}, *user("three")]
    made = client.responses.compact(model=MODEL, input=texts)
    assert made.object == "response.compaction" and made.usage.output_tokens == 0
    [item] = made.output
    on = ask(client, [item.model_dump(), *user("four")])
    assert on.usage.input_tokens_details.cached_tokens == made.usage.input_tokens
    again = client.responses.compact(model=MODEL, previous_response_id=on.id)
    assert again.usage.input_tokens == again.usage.input_tokens_details.cached_tokens == on.usage.total_tokens
    assert ask(client, [again.output[0].model_dump(), *user("five")]).output_text
    refused(lambda: client.responses.compact(model=MODEL), openai.BadRequestError, param="input")
    refused(
        lambda: client.responses.compact(model=MODEL, previous_response_id="resp_none"),
        openai.NotFoundError,
        "previous_response_not_found",
    )
    unknown = {"type": "compaction", "id": "cmp_none", "encrypted_content": "cmp_none"}
    refused(lambda: ask(client, [unknown, *user("x")]), openai.NotFoundError, "compaction_not_found")


# Conversations


def test_a_conversation_goes_on_by_name(client):
    made = client.conversations.create(items=[*user("my name is Ada")], metadata={"a": "b"})
    assert made.metadata == {"a": "b"} and client.conversations.retrieve(made.id) == made
    first = ask(client, "who am I?", conversation=made.id)
    assert first.conversation.id == made.id
    second = ask(client, "sure?", conversation={"id": made.id})
    assert second.usage.input_tokens_details.cached_tokens == first.usage.total_tokens
    items = list(client.conversations.items.list(made.id, order="asc", limit=2))
    texts = ["my name is Ada", "who am I?", first.output_text, "sure?", second.output_text]
    assert [item.content[0].text for item in items] == texts
    assert [item.role for item in items] == ["user", "user", "assistant", "user", "assistant"]
    assert client.conversations.items.retrieve(items[2].id, conversation_id=made.id) == items[2]
    assert client.conversations.update(made.id, metadata={"c": "d"}).metadata == {"c": "d"}
    # What was not read yet can be taken out again.
    added = client.conversations.items.create(made.id, items=[*user("x"), *user("y")]).data
    assert client.conversations.items.delete(added[0].id, conversation_id=made.id).id == made.id
    third = ask(client, "z", conversation=made.id)
    given = client.responses.input_items.list(third.id, order="asc").data
    assert [item.content[0].text for item in given] == ["y", "z"]
    refused(
        lambda: client.conversations.items.delete(added[1].id, conversation_id=made.id),
        openai.BadRequestError,
    )
    refused(
        lambda: ask(client, "x", conversation=made.id, previous_response_id=third.id), openai.BadRequestError
    )
    assert client.conversations.delete(made.id).deleted
    for call in (
        lambda: client.conversations.retrieve(made.id),
        lambda: client.conversations.delete(made.id),
        lambda: client.conversations.items.list(made.id),
        lambda: ask(client, "x", conversation=made.id),
    ):
        refused(call, openai.NotFoundError, "conversation_not_found")
    assert client.responses.retrieve(third.id).id == third.id


def test_a_conversation_has_one_writer(client):
    made = client.conversations.create()
    slow = ask(client, "x", conversation=made.id, background=True, max_output_tokens=10**6)
    for call in (
        lambda: ask(client, "y", conversation=made.id),
        lambda: client.conversations.items.create(made.id, items=user("y")),
        lambda: client.conversations.delete(made.id),
    ):
        refused(call, openai.ConflictError, "busy")
    client.responses.cancel(slow.id)
    assert ask(client, "y", conversation=made.id).output_text


# Errors

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "unsupported_content", "messages[0]"),
        (
            {"messages": [{"role": "tool", "content": "x", "tool_call_id": "a"}]},
            "unsupported_parameter",
            None,
        ),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "a"}]}]}, None, None),
        ({"messages": [{"role": "judge", "content": "x"}]}, "invalid_value", "messages[0]"),
        ({"messages": []}, "invalid_request", "messages"),
        ({"tools": [TOOL]}, "unsupported_parameter", "tools"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"logit_bias": {"5": 1}}, "unsupported_parameter", "logit_bias"),
        ({"frequency_penalty": 1}, "unsupported_parameter", "frequency_penalty"),
        ({"store": True}, "unsupported_parameter", "store"),
        ({"n": 129}, "invalid_request", "n"),
        ({"max_tokens": 0}, "invalid_request", "max_tokens"),
        ({"temperature": 2.5}, "invalid_request", "temperature"),
        ({"top_p": 0}, "invalid_request", "top_p"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ({"stop": list("abcde")}, "invalid_value", "stop"),
        ({"extra_body": {"heat": 1}}, "unknown_parameter", "heat"),
    ],
)
def test_what_a_chat_cannot_have_is_refused_by_name(client, change, code, param):
    how = {"model": MODEL, "messages": user("x"), **change}
    error = refused(lambda: client.chat.completions.create(**how), openai.BadRequestError, code, param)
    assert error["type"] == "invalid_request_error"
    # A stream has a status of its own too, as long as nothing was sent.
    refused(lambda: client.chat.completions.create(**how, stream=True), openai.BadRequestError, code, param)


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
         "unsupported_content", "input[0]"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "x"}]}, None, "input[0]"),
        ({"input": []}, "invalid_value", "input"),
        ({"tools": [{"type": "web_search"}]}, "unsupported_parameter", "tools"),
        ({"reasoning": {"effort": "high"}}, "unsupported_parameter", "reasoning"),
        ({"text": {"format": {"type": "json_object"}}}, "unsupported_parameter", "text"),
        ({"include": ["everything"]}, "invalid_request", "include.0"),
        ({"context_management": [{"type": "summary"}]}, "invalid_request", None),
    ],
)  # fmt: skip
def test_what_a_response_cannot_have_is_refused_by_name(client, change, code, param):
    how = {"input": "x", **change}
    refused(lambda: ask(client, **how), openai.BadRequestError, code, param)


def test_bodies_of_no_sense_are_errors_of_the_same_form(url, client):
    refused(
        lambda: client.chat.completions.create(model="gpt-4o", messages=user("x")),
        openai.NotFoundError,
        "model_not_found",
        "model",
    )
    refused(
        lambda: client.completions.create(model=MODEL, prompt=["a"] * 65, n=2),
        openai.BadRequestError,
        param="n",
    )
    refused(lambda: client.completions.create(model=MODEL, prompt=[300]), openai.BadRequestError)
    refused(lambda: client.completions.create(model=MODEL, prompt=""), openai.BadRequestError)
    for path, body, status in (
        ("/v1/chat/completions", b"{", 400),
        ("/v1/chat/completions", b"[]", 400),
        ("/v1/chat/completions", b'{"model": "\\ud800", "messages": []}', 400),
        ("/v1/chat/completions", {"model": MODEL, "messages": user("\ud800")}, 400),
        ("/v1/chat/completions", {"model": MODEL, "messages": user("x"), "\ud800": 1}, 400),
        ("/v1/responses", {"model": MODEL, "input": "x", "metadata": {"\ud800": "x"}}, 400),
        ("/v1/responses", {"model": MODEL, "input": [{"type": "\ud800"}]}, 400),
        ("/v1/conversations", {"metadata": {"a": "\ud800"}}, 400),
        ("/v1/conversations", {"items": [{"role": "user", "content": "x", "id": "\ud800"}]}, 400),
        ("/v1/nothing", {}, 404),
        ("/v1/models", {}, 405),
    ):
        found, answer = raw(url, path, body)
        assert found == status and set(answer["error"]) == {"message", "type", "param", "code"}, (path, body)


# Compliance

UNSUPPORTED = {
    "tool-calling": "tools: the models are trained without any",
    "image-input": "images: these are models of text",
    "chat-tool-calling": "tools: the models are trained without any",
    "chat-image-input": "images: these are models of text",
}
SKIPPED = {
    "reasoning-summary",
    "chat-reasoning-summary",
}  # asked of models of reasoning alone, by their names
SPECS = {"open-responses": "openresponses.json", "openai-chat": "openai_chat.json"}


@pytest.mark.filterwarnings("ignore:jsonschema.RefResolver is deprecated:DeprecationWarning")
@pytest.mark.parametrize("form", SPECS)
def test_llm_comply_passes_all_that_a_model_of_text_can_do(url, form):
    spec = SpecLoader(str(Path(llm_comply.__file__).parent / "specs" / SPECS[form]))
    config = ComplianceConfig(f"{url}/v1", "any", MODEL, verbose=True)
    # It asks without a seed, and takes an answer that ends at its first token for none: one in some dozens.
    results = {}
    for _ in range(4):
        for r in runner.TestRunner(config, get_tests(form), spec).run_all().results:
            if r.id not in results or results[r.id].status.value == "failed":
                results[r.id] = r
        if {id for id, r in results.items() if r.status.value == "failed"} <= set(UNSUPPORTED):
            break
    found = {id: (r.status.value, r.errors, r.warnings) for id, r in results.items()}
    unsupported = {id for id in found if id in UNSUPPORTED}
    assert len(unsupported) == 2
    for id in unsupported:
        assert found[id][0] == "failed"
        error = results[id].response["error"]
        assert error["code"] in ("unsupported_parameter", "unsupported_content") and error["message"]
    for id in found.keys() - unsupported:
        status = "skipped" if id in SKIPPED else "passed"
        assert found[id][0] == status and not found[id][2], found[id]


def test_the_one_token_that_a_task_answers_with_is_a_whole_answer(tmp_path):
    with (
        serving("depo-N1", tmp_path / "store") as url,
        OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
    ):
        how = {"model": "depo-N1", "temperature": 0}
        text = "n8 n4 n7 n8 n2 n5 n5 n1 n1 n6 n4 n3 n3 n2 n6 n7"
        made = client.responses.create(input=f"{text} HOP_1 n1", **how)
        assert (made.status, made.output_text, made.usage.output_tokens) == ("completed", "n6", 1)
        chat = client.chat.completions.create(messages=user(f"{text} HOP_1 n1"), **how)
        assert (chat.choices[0].finish_reason, chat.choices[0].message.content) == ("stop", "n6")
        chat = client.chat.completions.create(messages=user(text), max_tokens=3, **how)
        assert chat.choices[0].finish_reason == "length"
        more = client.responses.create(input=text, max_output_tokens=2, **how)
        assert more.status == "incomplete"
