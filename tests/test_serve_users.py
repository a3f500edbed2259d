import asyncio
import errno
import io
import json
import logging
import time

import pytest
from conftest import lively, run_command, tiny
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

from lmsleep import SleepConfig
from lmsleep.serve import gate, log
from lmsleep.serve import keys as keys_module
from lmsleep.serve.app import create_app
from lmsleep.serve.context import Context
from lmsleep.serve.engine import Engine
from lmsleep.serve.gate import MIB, Gate
from lmsleep.serve.keys import Keys, Lately, Quota
from lmsleep.serve.metrics import Metrics
from lmsleep.serve.service import Service, Wanted, Written
from lmsleep.serve.store import Store
from lmsleep.text.chat import chat_of
from lmsleep.text.tokenizers import Bytes

ANN, BEN = "ann-has-a-long-key", "ben-has-a-long-key"
SLEEP = SleepConfig(window=8, passes=2)
HERE = "http://127.0.0.1"


@pytest.fixture(scope="module")
def model():
    return lively(tiny("attention", "gated_delta_net", vocab_size=256))


def application(model, folder, *, quota=None, keyed=True):
    file = folder / "keys"
    file.write_text(f"# who may\n\nann {ANN}\nben {BEN}\n")
    most_each = None if quota is None else quota.bytes
    engine, store = Engine(model, SLEEP), Store(folder / "store", model, SLEEP, most_each=most_each)
    service = Service(engine, store, Bytes(), chat_of(Bytes()), name="m", longest=4)
    here = Context(service, Keys(file if keyed else None, quota), Metrics(engine, store, "m"), ("m",), "fp")
    return create_app(here)


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def app(model, tmp_path_factory):
    return application(model, tmp_path_factory.mktemp("users"))


@pytest.fixture(scope="module")
def client(app):
    with TestClient(app, HERE) as made:
        yield made


@pytest.fixture
def limited(model, tmp_path, request):
    with TestClient(application(model, tmp_path, quota=Quota(**request.param)), HERE) as made:
        yield made


@pytest.fixture
def unkeyed(model, tmp_path):
    with TestClient(application(model, tmp_path, keyed=False), HERE) as made:
        yield made


def respond(client, key, **how):
    json = {"model": "m", "input": "hello there, you", "max_output_tokens": 2, **how}
    return client.post("/v1/responses", json=json, headers=bearer(key))


def is_error(answer, status, code=None):
    error = answer.json()["error"]
    assert answer.status_code == status, answer.text
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert code is None or error["code"] == code
    return error


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer(""),
        bearer(ANN[:-1]),
        bearer(ANN + "x"),
        {"Authorization": ANN},
        {"Authorization": f"Basic {ANN}"},
    ],
)
def test_without_a_valid_key_nothing_is_told(client, headers):
    assert "key" in is_error(client.get("/v1/models", headers=headers), 401, "invalid_api_key")["message"]


def endpoints(app):
    """All endpoints of the API, those of included routers too."""
    return [
        (method, path)
        for path, methods in app.openapi()["paths"].items()
        for method in methods
        if path.startswith("/v1/")
    ]


def test_every_endpoint_asks_for_a_key(app, client):
    found = endpoints(app)
    assert len(found) > 25
    for method, path in found:
        answer = client.request(method, path.replace("{model}", "m"), json={})
        # A body may be refused before its key is looked at; nothing is done and nothing is told then.
        assert answer.status_code in (400, 401), (method, path)
    bare = [r for r in app.routes if isinstance(r, APIRoute) and not r.path.startswith("/v1/")]
    assert {r.path for r in bare} == {"/", "/health", "/ready", "/version", "/metrics"}


def test_all_keys_are_compared_in_constant_time(app, monkeypatch):
    compared = []
    real = keys_module.hmac.compare_digest
    monkeypatch.setattr(
        keys_module.hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or real(a, b)
    )
    for key in (ANN, BEN):  # the first and the last of them
        app.state.context.keys.owner(f"Bearer {key}")
    assert compared == [(32, 32)] * 4


def owned(client, key):
    """Make one of everything that has an id; return the ids by what paths call them."""
    response = respond(client, key).json()["id"]
    conversation = client.post(
        "/v1/conversations", json={"items": [{"role": "user", "content": "hi"}]}, headers=bearer(key)
    ).json()["id"]
    items = client.get(f"/v1/conversations/{conversation}/items", headers=bearer(key)).json()["data"]
    memory = client.post("/v1/memories", json={"name": "secret"}, headers=bearer(key)).json()["id"]
    return {"responses": response, "conversations": conversation, "memories": memory, "item": items[0]["id"]}


def bodies(path, ids):
    """A body that the endpoint would take, had it been one's own id."""
    memory = ids["memories"]
    known = {
        "read": {"text": "x"}, "ask": {"question": "x"}, "fork": {}, "sleep": {},
        "items": {"items": [{"role": "user", "content": "x"}]}, "{id}": {"metadata": {}},
        "merge": {"memories": [memory, memory]},
    }  # fmt: skip
    return known.get(path.rsplit("/", 1)[-1])


def test_foreign_ids_are_not_found_on_any_endpoint(app, client):
    ids = owned(client, ANN)
    taking = [(method, path) for method, path in endpoints(app) if "{id}" in path]
    assert len(taking) > 15  # a new endpoint comes in by itself
    for method, path in taking:
        kind = path.split("/")[2]
        url = (
            path.replace("{id}", ids[kind]).replace("{item}", ids["item"]).replace("{other}", ids["memories"])
        )
        unknown = path.replace("{id}", "no_such").replace("{item}", "no_such").replace("{other}", "no_such")
        answers = [
            client.request(method, each, json=bodies(path, ids), headers=bearer(BEN))
            for each in (url, unknown)
        ]
        said = [
            json.dumps(is_error(answer, 404)).replace(id, "ID")
            for answer, id in zip(answers, (ids[kind], "no_such"), strict=True)
        ]
        assert said[0] == said[1], (method, path)  # what another one has is as if it were not there
    for body in (
        {"input": "x", "previous_response_id": ids["responses"]},
        {"input": "x", "conversation": ids["conversations"]},
    ):
        is_error(respond(client, BEN, **body), 404)
        assert respond(client, ANN, **body).status_code == 200
    merge = {"memories": [ids["memories"]] * 2}
    is_error(client.post("/v1/memories/merge", json=merge, headers=bearer(BEN)), 404)
    assert client.get("/v1/memories", headers=bearer(BEN)).json()["data"] == []
    # Nothing of all that has touched what it was aimed at.
    assert [m["id"] for m in client.get("/v1/memories", headers=bearer(ANN)).json()["data"]] == [
        ids["memories"]
    ]
    assert client.get(f"/v1/responses/{ids['responses']}", headers=bearer(ANN)).status_code == 200


def test_the_ids_of_a_compaction_are_ones_own(client):
    made = client.post(
        "/v1/responses/compact", json={"model": "m", "input": "hello"}, headers=bearer(ANN)
    ).json()
    given = [*made["output"], {"role": "user", "content": "x"}]
    assert respond(client, ANN, input=given).status_code == 200
    assert respond(client, BEN, input=given).status_code in (400, 404)


def test_prefixes_are_shared_within_a_key_only(client):
    said = [{"role": "user", "content": "a story that nobody else has told, by far"}]

    def ask(key, messages):
        body = {"model": "m", "messages": messages, "max_tokens": 1, "temperature": 0}
        answer = client.post("/v1/chat/completions", json=body, headers=bearer(key)).json()
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return cached, [*messages, answer["choices"][0]["message"], {"role": "user", "content": "and then?"}]

    cached, longer = ask(ANN, said)
    assert cached == 0
    # The same tokens, which one of the two has read and the other has not.
    assert ask(BEN, longer)[0] == 0 and ask(ANN, longer)[0] > 40


def test_what_was_used_is_free_again_after_a_minute():
    lately = Lately()
    for when in (0.0, 10.0, 20.0):
        assert lately.wait(3, when) == 0
        lately.add(1, when)
    assert lately.wait(3, 30.0) == pytest.approx(30.0) and lately.wait(4, 30.0) == 0
    assert lately.wait(2, 30.0) == pytest.approx(40.0)
    assert lately.wait(3, 60.0) == 0 and lately.total == 2
    lately.add(10, 65.0)
    assert lately.wait(3, 66.0) == pytest.approx(59.0)


@pytest.mark.parametrize("limited", [{"requests_a_minute": 2}], indirect=True)
def test_requests_a_minute(limited, monkeypatch):
    assert [respond(limited, ANN).status_code for _ in range(2)] == [200, 200]
    refused = respond(limited, ANN)
    assert "2 requests" in is_error(refused, 429, "rate_limit_exceeded")["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert limited.get("/v1/models", headers=bearer(ANN)).status_code == 200  # looking costs nothing
    assert respond(limited, BEN).status_code == 200  # nor does it cost others
    now = time.monotonic()
    monkeypatch.setattr(keys_module.time, "monotonic", lambda: now + 61)
    assert respond(limited, ANN).status_code == 200


@pytest.mark.parametrize("limited", [{"tokens_a_minute": 10}], indirect=True)
@pytest.mark.parametrize("way", ["respond", "chat", "compact", "memory", "stream"])
def test_tokens_a_minute_count_on_every_way(limited, way):
    text = "twenty bytes of text"
    ask = {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
    path, body = {
        "respond": ("/v1/responses", {"input": text, "max_output_tokens": 1}),
        "chat": ("/v1/chat/completions", ask),
        "stream": ("/v1/chat/completions", {**ask, "stream": True}),
        "compact": ("/v1/responses/compact", {"input": text}),
        "memory": ("/v1/memories", {"text": text}),
    }[way]
    model = {} if way == "memory" else {"model": "m"}
    assert limited.post(path, json={**model, **body}, headers=bearer(ANN)).status_code < 300
    refused = limited.post(path, json={**model, **body}, headers=bearer(ANN))
    assert "10 tokens" in is_error(refused, 429, "rate_limit_exceeded")["message"]
    assert int(refused.headers["retry-after"]) > 50


@pytest.mark.parametrize("limited", [{"tokens_a_minute": 10}], indirect=True)
def test_a_client_that_leaves_pays_for_what_was_read(limited):
    here = limited.app.state.context
    who, tokens = here.keys.owner(f"Bearer {ANN}"), here.service.tokens("twenty bytes of text", "input")

    async def leave():
        gate._asked.set(gate.Asked("x", 0))
        events = here.write(who, Written(here.service.store.nothing(), tokens, 0), Wanted(longest=100))
        await anext(events)
        await events.aclose()

    asyncio.run(leave())
    is_error(respond(limited, ANN), 429, "rate_limit_exceeded")


@pytest.mark.parametrize("limited", [{"memories": 1}, {"bytes": 10**6}], indirect=True)
def test_memories_and_bytes(limited):
    def make(key):
        return limited.post("/v1/memories", json={"text": "a window and more"}, headers=bearer(key))

    first = make(ANN)
    while limited.get(f"/v1/memories/{first.json()['id']}", headers=bearer(ANN)).json()["reading"]:
        time.sleep(0.01)
    store = limited.app.state.context.service.store
    if store.room.most_each is not None:
        store.room.most_each = store.bytes("ann")["disk"]
    assert "delete" in is_error(make(ANN), 403, "quota_exceeded")["message"]
    assert make(BEN).status_code == 202
    limited.delete(f"/v1/memories/{first.json()['id']}", headers=bearer(ANN))
    assert make(ANN).status_code == 202


@pytest.mark.parametrize("given", ["abc-1.2:3_x", "", "with blank", "x" * 129, 'quote"', "line\u00e9"])
def test_every_answer_has_an_id(client, given):
    for path in ("/health", "/v1/models", "/nowhere", "/", "/page/page.css"):
        answer = client.get(path, headers={"x-request-id": given.encode("latin-1")})
        told = answer.headers["x-request-id"]
        assert told == given if given == "abc-1.2:3_x" else told.startswith("req_") and len(told) == 28


def test_bodies_have_a_bound(client, app):
    app.state.context.most_bytes, before = 17 * MIB, app.state.context.most_bytes
    text, headers = b'"' + b" " * (16 * MIB) + b'"', {**bearer(ANN), "Content-Type": "application/json"}
    try:
        for path in ("/v1/responses", "/v1/chat/completions", "/v1/memories"):
            for body in (text, iter([text[:MIB]] * 17)):  # with a length, and in pieces without
                is_error(client.post(path, content=body, headers=headers), 413, "too_large")
        is_error(client.post("/v1/memories/upload", content=text, headers=bearer(ANN)), 400, "foreign_memory")
        longer = text + b" " * MIB
        is_error(client.post("/v1/memories/upload", content=longer, headers=bearer(ANN)), 413, "too_large")
    finally:
        app.state.context.most_bytes = before


def test_a_client_that_sends_nothing_or_takes_nothing_is_given_up(app, client):
    sent = []

    async def forever(*_):
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    def call(method, path, receive, send):
        headers = [(b"authorization", f"Bearer {ANN}".encode()), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": method, "path": path, "headers": headers, "query_string": b""}
        asyncio.run(Gate(app, patience=0.01)(scope, receive, send))

    call("POST", "/v1/responses", forever, send)
    assert sent[0]["status"] == 408 and b'"timeout"' in sent[1]["body"]
    call("GET", "/health", forever, forever)  # returns: the server then cuts the connection


def test_nothing_is_allowed_to_pages_from_elsewhere(client, unkeyed):
    for made, headers in ((client, bearer(ANN)), (unkeyed, {})):
        ask = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST", **headers}
        for answer in (made.options("/v1/responses", headers=ask), made.get("/v1/models", headers=ask)):
            assert not [name for name in answer.headers if name.startswith("access-control")]
    # Without keys the browser of whoever runs the server must not be used against it.
    for headers in (
        {"Origin": "https://elsewhere.example"},
        {"Origin": "null"},
        {"Host": "rebound.example:8000"},
    ):
        is_error(unkeyed.get("/v1/models", headers=headers), 403, "foreign_host")
    for headers in ({}, {"Origin": "http://localhost:8000"}, {"Host": "localhost:1"}, {"Host": "[::1]:8000"}):
        assert unkeyed.get("/v1/models", headers=headers).status_code == 200


class Sink(io.StringIO):
    def lines(self):
        return [json.loads(line) for line in self.getvalue().splitlines()]


@pytest.fixture
def logged(monkeypatch):
    sink = Sink()
    monkeypatch.setattr("sys.stderr", sink)
    kept = {name: (list(lg.handlers), lg.propagate, lg.level)
            for name in ("lmsleep.serve", "uvicorn") for lg in [logging.getLogger(name)]}  # fmt: skip
    log.to_stderr()
    yield sink
    for name, (handlers, propagate, level) in kept.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_a_request_is_a_line_in_the_log(client, logged):
    respond(client, ANN, input="content that is nobody's business")
    client.get("/v1/models?key=content", headers={**bearer(BEN), "x-request-id": "mine"})
    client.get("/v1/models", headers=bearer("a-key-that-is-wrong"))
    first, second, third = logged.lines()
    assert {
        "time",
        "level",
        "request",
        "owner",
        "method",
        "path",
        "status",
        "seconds",
        "read",
        "written",
    } <= set(first)
    assert (first["owner"], first["method"], first["path"], first["status"]) == (
        "ann",
        "POST",
        "/v1/responses",
        200,
    )
    assert first["read"] == len("content that is nobody's business\n") and first["written"] == 2
    assert first["seconds"] > 0 and first["time"].endswith("+00:00")
    assert (second["request"], second["owner"], second["read"]) == ("mine", "ben", 0)
    assert (third["owner"], third["status"]) == (None, 401)
    for secret in ("content", "business", ANN, BEN, "a-key-that-is-wrong"):
        assert secret not in logged.getvalue()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ETIMEDOUT])  # the latter is a TimeoutError
def test_a_failure_is_in_the_log_and_not_in_the_answer(client, app, logged, monkeypatch, number):
    def fail(*_):
        raise OSError(number, "it failed", "/secret/path")

    monkeypatch.setattr(app.state.context.service.store, "get", fail)
    answer = client.get("/v1/responses/x", headers=bearer(ANN))
    is_error(answer, 500, "internal_error")
    assert "secret" not in answer.text and "Traceback" not in answer.text
    failed, line = logged.lines()
    assert "/secret/path" in failed["traceback"] and failed["request"] == answer.headers["x-request-id"]
    assert line["status"] == 500


def test_errors_hold_neither_paths_nor_stacks(app, client):
    ids = owned(client, ANN)
    for method, path in endpoints(app):
        url = (
            path.replace("{id}", ids.get(path.split("/")[2], "x"))
            .replace("{other}", "x")
            .replace("{item}", "x")
        )
        for body in (b"", b"{", b"[]", b'{"model": "m", "input": 3, "text": []}', b"\xff", b"[" * 100_000):
            answer = client.request(
                method, url, content=body, headers={**bearer(ANN), "Content-Type": "application/json"}
            )
            assert answer.status_code < 500, (method, path, body[:9], answer.text)
            if answer.status_code >= 400:
                is_error(answer, answer.status_code)
                assert not any(w in answer.text for w in ("Traceback", ".py", "/store", "site-packages"))
    answer = client.post("/v1/memories/upload", content=b"no memory", headers=bearer(ANN))
    assert str(app.state.context.service.store.folder) not in answer.text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--host", "0.0.0.0"], "host=0.0.0.0 can be reached from elsewhere"),
        (["--host", "::"], "can be reached from elsewhere"),
        (["--host", "example.org"], "can be reached from elsewhere"),
        (["--keys", "none"], "No such file"),
        (["--keys", "short"], "short, line 2: write NAME KEY"),
        (["--keys", "twice"], "twice, line 2: this key is there twice"),
        (["--keys", "empty"], "empty has no key"),
        (["--keys", "noise"], "noise is no text"),
    ],
)
def test_what_is_wrong_with_keys_is_said_at_once(capsys, tmp_path, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_text("# keys\nann short\n")
    (tmp_path / "twice").write_text(f"ann {ANN}\nben {ANN}\n")
    (tmp_path / "noise").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_text("# nobody\n")
    code, _, err = run_command(capsys, "serve", *argv)
    assert code == 2 and said in err and len(err.splitlines()) == 1 and ANN not in err
    assert not (tmp_path / "lmsleep-store").exists()


def test_two_keys_of_one_name_are_one_owner(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"ann {ANN}\nann\t {BEN}\n")
    keys = Keys(file)
    assert keys.owner(f"Bearer {ANN}") is keys.owner(f"bearer {BEN}")
