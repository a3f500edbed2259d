import asyncio
import contextlib
import gc
import json
import os
import random
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import faulty
import pytest
import torch
from conftest import VOCAB, lively, random_tokens, tiny
from faulty import WAIT, Nursery, text_of
from test_serve_engine import Poisoned, finish, row, sleep_of

from lmsleep import SleepConfig
from lmsleep.serve.app import create_app
from lmsleep.serve.context import Context
from lmsleep.serve.engine import Engine
from lmsleep.serve.errors import ApiError
from lmsleep.serve.keys import Keys, Quota
from lmsleep.serve.metrics import Metrics
from lmsleep.serve.service import Service
from lmsleep.serve.store import Store
from lmsleep.session import Row, Stream, advance
from lmsleep.state import State
from lmsleep.text.chat import chat_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals, limits and mounts of Linux")


@pytest.fixture(scope="module")
def nursery():
    made = Nursery()
    yield made
    made.close()


@pytest.fixture
def server(nursery, tmp_path):
    made = nursery.start(tmp_path / "store")
    yield made
    with contextlib.suppress(ProcessLookupError):
        made.end()


# Kills


class Load:
    # Threads that talk to a server until it dies, and remember what it has acknowledged.

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.lock = threading.Lock()
        self.known = []  # acknowledged responses: id, the one before it, input, text
        self.conversations, self.memories, self.deleted = {}, {}, set()

    def begin(self, server):
        for _ in range(2):
            status, made = server.ask("POST", "/v1/conversations", {})
            assert status == 200
            self.conversations[made["id"]] = []
        self.threads = [threading.Thread(target=self._talk, args=(server, i)) for i in range(4)]
        for thread in self.threads:
            thread.start()

    def end(self):
        for thread in self.threads:
            thread.join(WAIT)

    def _talk(self, server, number):
        rng = random.Random(self.random.random())
        with contextlib.suppress(OSError, ValueError, faulty.http.client.HTTPException):
            while True:
                text = "".join(rng.choices("abcdef ", k=rng.randint(1, 12)))
                if number == 0:
                    conversation = list(self.conversations)[-1 - rng.randrange(2)]
                    status, made = server.respond(text, conversation=conversation)
                    assert status == 200
                    self.conversations[conversation].append((text, text_of(made)))
                elif number == 1 and rng.random() < 0.3:
                    text = text * rng.randint(1, 40)
                    status, made = server.ask("POST", "/v1/memories", {"name": "m", "text": text})
                    assert status == 202
                    self.memories[made["id"]] = text
                elif number == 2 and self.known and rng.random() < 0.1:
                    with self.lock:
                        leaf = {k[0] for k in self.known} - {k[1] for k in self.known} - self.deleted
                        gone = rng.choice(sorted(leaf)) if leaf else None
                        if gone is not None:
                            self.deleted.add(gone)
                    if gone is not None:
                        server.ask("DELETE", f"/v1/responses/{gone}")
                else:
                    with self.lock:
                        there = [k[0] for k in self.known[-40:] if k[0] not in self.deleted]
                    previous = rng.choice([None, *there])
                    status, made = server.respond(text, previous, background=None)
                    if status != 404:  # one that was deleted meanwhile
                        assert status == 200
                        with self.lock:
                            self.known.append((made["id"], previous, text, text_of(made)))


class Reference:
    # The same said to a server that nobody disturbs.

    def __init__(self, server):
        self.server, self.ids = server, {None: None}

    def check(self, server, load, known):
        for name, previous, text, written in known:
            if name not in self.ids:
                status, made = self.server.respond(text, self.ids[previous])
                assert status == 200
                assert text_of(made) == written
                self.ids[name] = made["id"]
            if name not in load.deleted:
                mine, theirs = (
                    s.respond("more?", id, store=False)
                    for s, id in ((server, name), (self.server, self.ids[name]))
                )
                assert (mine[0], theirs[0]) == (200, 200)
                assert text_of(mine[1]) == text_of(theirs[1])

    def check_conversation(self, server, name, said):
        _, items = server.ask("GET", f"/v1/conversations/{name}/items?limit=100&order=asc")
        found = [item["content"][0]["text"] for item in items["data"]]
        pairs = list(zip(found[::2], found[1::2], strict=True))  # none is torn
        whole = pairs if not items["has_more"] else []
        assert [tuple(pair) for pair in said[: len(pairs)]] == pairs[: len(said)]
        if whole:
            assert len(said) <= len(whole) <= len(said) + 1  # one may have been stored, and not told
            _, made = self.server.ask("POST", "/v1/conversations", {})
            for text, written in whole:
                _, response = self.server.respond(text, conversation=made["id"])
                assert text_of(response) == written
        return pairs


def check_files(store):
    """Check that after a start each file has a row, and each row a file of its size."""
    database = sqlite3.connect(f"file:{store}/store.sqlite?mode=ro", uri=True)
    rows = dict(database.execute("SELECT id, bytes FROM starts WHERE id != ''"))
    assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert not database.execute("PRAGMA foreign_key_check").fetchall()
    database.close()
    assert {path.stem: path.stat().st_size for path in (store / "starts").glob("*/*")} == rows
    assert not list((store / "scratch").iterdir())


def killed(nursery, folder, kills, seed):
    """Kill a server under load, again and again; check each time that what it acknowledged goes on."""
    rng, load = random.Random(seed), Load(seed)
    store = folder / "store"
    undisturbed = nursery.start(folder / "reference")
    reference, checked = Reference(undisturbed), 0
    server = nursery.start(store)
    for _ in range(kills):
        before = len(load.known)
        load.begin(server)
        server.until(lambda before=before: len(load.known) > before + 1)  # or a slow machine does nothing
        time.sleep(rng.uniform(0.0, 0.6))
        server.kill()
        load.end()
        assert server.wait() == -signal.SIGKILL
        server = nursery.start(store)
        new, checked = load.known[checked:], len(load.known)
        old = load.known[: checked - len(new)]
        reference.check(server, load, new + rng.sample(old, min(len(old), 5)))
        for name, said in list(load.conversations.items())[-2:]:
            reference.check_conversation(server, name, said)
    for name, text in load.memories.items():  # reading goes on after a kill, and reads all, once
        server.until(lambda name=name: not server.ask("GET", f"/v1/memories/{name}")[1]["reading"])
        found = server.ask("GET", f"/v1/memories/{name}")[1]
        assert (found["status"], found["tokens"]) == ("ready", len(text.encode()))
    for name, text in rng.sample(sorted(load.memories.items()), min(len(load.memories), 10)):
        _, made = undisturbed.ask("POST", "/v1/memories", {"text": text})
        undisturbed.until(
            lambda made=made: not undisturbed.ask("GET", f"/v1/memories/{made['id']}")[1]["reading"]
        )
        question = {"question": "and?", "max_tokens": 8}
        mine, theirs = (
            s.ask("POST", f"/v1/memories/{id}/ask", question)[1]["answer"]
            for s, id in ((server, name), (undisturbed, made["id"]))
        )
        assert mine == theirs
    reference.check(server, load, load.known)
    server.end()
    server = nursery.start(store)
    check_files(store)
    server.end()
    undisturbed.end()
    return load


def test_what_was_acknowledged_goes_on_exactly_after_kills(nursery, tmp_path):
    assert killed(nursery, tmp_path, 3, seed=0).known  # few: the longer test has 200


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_was_acknowledged_goes_on_exactly_after_200_kills(nursery, tmp_path):
    load = killed(nursery, tmp_path, 200, seed=1)
    print(
        f"{len(load.known)} responses, {len(load.deleted)} deleted, {len(load.memories)} memories, "
        f"{sum(map(len, load.conversations.values()))} turns of {len(load.conversations)} conversations"
    )


# Disks


def test_a_disk_that_refuses_is_told_without_a_path_and_the_server_goes_on(server, tmp_path):
    _, first = server.respond("hello")
    _, kept = server.ask("POST", "/v1/memories", {"name": "m"})
    server.limit_files(0)  # no file can grow
    for status, body in (
        server.respond("and", first["id"]),
        server.ask("POST", "/v1/memories", {"name": "n"}),
        server.ask("POST", "/v1/conversations", {}),
        server.ask("DELETE", f"/v1/memories/{kept['id']}"),
    ):
        assert status in (500, 507)
        assert body["error"]["code"] in ("storage_full", "storage_failed")
        assert "/" not in body["error"]["message"]
    assert server.ask("GET", "/ready") == (503, {"ready": False, "reason": "storage_full"})
    # What needs no disk goes on.
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    assert server.ask("POST", "/v1/chat/completions", chat)[0] == 200
    assert server.respond("and", first["id"], store=False)[0] == 200
    assert server.ask("GET", f"/v1/responses/{first['id']}")[0] == 200
    status, text = server.ask("POST", "/v1/responses", {"model": "tiny", "input": "x", "stream": True})
    assert status == 200
    failed = json.loads(text.strip().rpartition("data: ")[2])
    assert failed["type"] == "response.failed"
    assert "the store" in failed["response"]["error"]["message"]
    assert "/" not in failed["response"]["error"]["message"]
    server.limit_files(resource.RLIM_INFINITY)
    assert server.respond("and", first["id"])[0] == 200
    assert server.ask("DELETE", f"/v1/memories/{kept['id']}")[0] == 200
    assert server.ask("GET", "/ready")[0] == 200
    server.end()
    check = server.nursery.start(tmp_path / "store")
    check_files(tmp_path / "store")
    assert check.respond("and", first["id"])[0] == 200
    check.end()


def test_reading_in_the_background_waits_for_room(server, monkeypatch):
    text = "abcdefgh" * 200
    status, made = server.ask("POST", "/v1/memories", {"text": text})
    assert status == 202
    server.limit_files(0)
    time.sleep(0.3)
    server.limit_files(resource.RLIM_INFINITY)
    server.until(lambda: not server.ask("GET", f"/v1/memories/{made['id']}")[1]["reading"])
    found = server.ask("GET", f"/v1/memories/{made['id']}")[1]
    assert (found["status"], found["tokens"]) == ("ready", len(text))


@contextlib.contextmanager
def mounted(folder, *options):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("nobody may mount here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_told_and_what_is_deleted_makes_room(nursery, tmp_path):
    with mounted(tmp_path / "small", "size=500k"):
        server, made = nursery.start(tmp_path / "small"), []
        for i in range(400):
            status, body = server.respond("x" * 400 + str(i), tokens=1)
            if status != 200:
                break
            made.append(body["id"])
        assert (status, body["error"]["code"]) == (507, "storage_full")
        assert server.ask("GET", f"/v1/responses/{made[0]}")[0] == 200
        assert server.respond("go on", made[-1], store=False)[0] == 200
        server.end()


def test_a_store_that_cannot_be_written_is_refused_in_one_line(nursery, tmp_path):
    with mounted(tmp_path / "fixed", "ro"):
        told = nursery.ask(store=str(tmp_path / "fixed"), options={})
    assert "\n" not in told["error"]
    assert "fixed" in told["error"]


def test_a_second_server_on_a_store_is_refused_in_one_line(server, nursery, tmp_path):
    told = nursery.ask(store=str(tmp_path / "store"), options={})  # which commands say, with exit code 2
    assert "another process" in told["error"]
    assert "\n" not in told["error"]
    assert server.respond("hi")[0] == 200


# Clients


@contextlib.contextmanager
def ask_raw(server, body):
    """Send a request, read nothing of its answer, and leave at the end of the block."""
    data = json.dumps(body).encode()
    host, port = server.address.split(":")
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {server.address}\r\nContent-Type: application/json\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=WAIT) as made:
        made.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        yield


def endless(stream):
    return {
        "model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 10**6,
        "temperature": 0, "stream": stream,
    }  # fmt: skip


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_row(server, stream):
    with ask_raw(server, endless(stream)):
        server.until(lambda: server.metric("generation_tokens_total{") > 5)
        assert server.under_way() == 1
    server.until(lambda: server.metric('memory_bytes{model_name="tiny",tier="live"}') == 0)
    written = server.metric("generation_tokens_total{")
    assert server.respond("hi", tokens=2)[0] == 200
    assert server.metric("generation_tokens_total{") == written + 2


def test_a_client_that_reads_nothing_holds_nobody(server):
    with ask_raw(server, endless(True)):
        server.until(lambda: server.metric("generation_tokens_total{") > 5)
        for _ in range(5):
            assert server.respond("hi", tokens=2)[0] == 200


def test_a_thousand_idle_connections_hold_nobody(server):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1200:
        pytest.skip("so many files may not be open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    host, port = server.address.split(":")
    idle = [socket.create_connection((host, int(port)), timeout=WAIT) for _ in range(1000)]
    try:
        assert server.respond("hi")[0] == 200
        idle[-1].sendall(f"GET /health HTTP/1.1\r\nHost: {server.address}\r\n\r\n".encode())
        assert idle[-1].recv(12) == b"HTTP/1.1 200"
    finally:
        for one in idle:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Signals


def test_a_signal_drains_and_reading_is_taken_up_again(server, tmp_path):
    text = "abcdefgh" * 300
    _, memory = server.ask("POST", "/v1/memories", {"text": text})
    answers = []
    client = threading.Thread(target=lambda: answers.append(server.respond("hi", tokens=500)))
    client.start()
    server.until(lambda: server.metric("generation_tokens_total{") > 5)
    server.kill(signal.SIGTERM)
    server.until(lambda: server.ask("GET", "/ready") == (503, {"ready": False, "reason": "draining"}))
    status, body = server.respond("too late")
    assert (status, body["error"]["code"]) == (503, "draining")
    client.join(WAIT)
    [(status, body)] = answers
    assert status == 200
    assert server.wait() == 0
    check = server.nursery.start(tmp_path / "store")
    assert check.respond("more", body["id"])[0] == 200
    check.until(lambda: not check.ask("GET", f"/v1/memories/{memory['id']}")[1]["reading"])
    found = check.ask("GET", f"/v1/memories/{memory['id']}")[1]
    assert (found["status"], found["tokens"]) == ("ready", len(text))
    check.end()


def test_a_second_signal_ends_at_once(server):
    with ask_raw(server, endless(True)):
        server.until(lambda: server.metric("generation_tokens_total{") > 5)
        server.kill(signal.SIGTERM)
        server.until(lambda: server.ask("GET", "/ready")[0] == 503)
        assert server.end(signal.SIGTERM) == 128 + signal.SIGTERM


# The engine


@pytest.fixture(scope="module")
def model():
    return lively(tiny("attention", "gated_delta_net", "attention"))


class Fails(Poisoned):
    # A token that nobody else has raises; and so do more rows than fit.

    def __init__(self, model, fitting=99):
        super().__init__(model)
        self.fitting, self.most = fitting, 0

    def embed(self, tokens):
        if len(tokens) > self.fitting:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.most = max(self.most, len(tokens))
        if (tokens == VOCAB - 1).any():
            raise RuntimeError("of one row")
        return self.model.embed(tokens)


def clean(model, prompt, budget, seed):
    made = row(model, prompt, budget, seed)
    return Row(
        stream=made.stream, unread=made.unread % (VOCAB - 1), budget=budget, sampling=made.sampling,
        generator=made.generator,
    )  # fmt: skip


@pytest.mark.parametrize("prompt", [3, 12])  # awake, and asleep
def test_a_step_that_fails_for_one_row_harms_that_row_alone(model, prompt):
    rows = [clean(model, prompt, 0, seed) for seed in range(5)]
    bad = Row(stream=Stream.begin(model.initial_state(1)), unread=torch.full((prompt,), VOCAB - 1))
    engine = Engine(Fails(model), sleep_of())
    waiting = [*rows[:2], bad, *rows[2:]]
    told = None

    def go():
        nonlocal told
        told = finish(engine, waiting)

    thread = threading.Thread(target=go)
    thread.start()
    while engine.waiting < len(waiting):
        time.sleep(0.01)
    engine.start()
    thread.join(WAIT)
    engine.close(WAIT)
    errors = [events[-1].row.error for events in told]
    assert [error is None for error in errors] == [True, True, False, True, True, True]
    assert str(errors[2]) == "of one row"
    assert [events[-1].row.stream.tokens for events in told] == [prompt] * 2 + [0] + [prompt] * 3


def test_where_memory_runs_out_fewer_rows_go_together(model, caplog):
    fails = Fails(model, fitting=3)
    engine = Engine(fails, sleep_of())
    engine.start()
    told = finish(engine, [row(model, 12, 0, seed) for seed in range(12)] + [row(model, 3, 5)] * 8)
    engine.close(WAIT)
    assert all(events[-1].row.error is None or "of one row" in str(events[-1].row.error) for events in told)
    assert fails.most <= 3
    assert engine.most_sleepers <= 3 or engine.most_rows <= 3
    assert "out of memory" in caplog.text


def test_a_row_that_does_not_fit_alone_is_told_to_come_back(model, tmp_path):
    async def ask():
        service = serving(Fails(model, fitting=0), tmp_path)
        service.start()
        with pytest.raises(ApiError) as told:
            async for _ in service.follow(row(model, 3, 1)):
                pass
        await service.stop()
        return told.value

    told = asyncio.run(ask())
    assert (told.status, told.body["code"]) == (503, "out_of_memory")


def test_an_engine_that_ends_leaves_nobody_waiting(model, monkeypatch, caplog):
    engine = Engine(model, sleep_of())
    monkeypatch.setattr(engine, "_after", lambda *_: 1 / 0)
    engine.start()
    [events] = finish(engine, [row(model, 3, 1)])
    assert "engine has ended" in str(events[-1].row.error)
    assert engine.failed
    assert "ZeroDivisionError" in caplog.text
    engine.close(WAIT)


def test_a_listener_that_raises_harms_itself_alone(model, caplog):
    engine = Engine(model, sleep_of())
    engine.start()
    engine.submit(row(model, 3, 1), lambda event: 1 / 0)
    [events] = finish(engine, [row(model, 3, 1)])
    engine.close(WAIT)
    assert events[-1].row.error is None
    assert "a listener failed" in caplog.text


def test_nan_in_one_row_changes_no_bit_of_the_others(model):
    # The row that breaks is done after one step, and so is the one that stands for it otherwise: the others
    # step among as many, for the shape of a product decides how it rounds.
    sleep, poisoned, after = sleep_of(), Poisoned(model), []
    rows = [clean(model, 7, 4, seed) for seed in range(3)]
    for tokens in (random_tokens(5, vocab=VOCAB - 1), torch.full((5,), VOCAB - 1)):
        beside = Row(stream=Stream.begin(model.initial_state(1)), unread=tokens, nap=3)
        now = advance(poisoned, sleep, [*rows[:1], beside, *rows[1:]])
        assert now[1].done
        assert (now[1].error is not None) == bool(tokens[0] == VOCAB - 1)
        while not all(one.done for one in now):
            now = advance(poisoned, sleep, now)
        after.append([*now[:1], *now[2:]])
    for mine, alone in zip(*after, strict=True):
        assert mine.error is None
        assert mine.answer.tokens == alone.answer.tokens
        for one, other in zip(mine.stream.state.tensors(), alone.stream.state.tensors(), strict=True):
            assert torch.equal(one, other)


# Service and application, without sockets


def serving(model, folder, **options):
    sleep = SleepConfig(window=faulty.L, passes=2)
    return Service(
        Engine(model, sleep, debt=2), Store(folder, model, sleep, **options), faulty.Bytes(),
        chat_of(faulty.Bytes()), name="tiny", longest=64,
    )  # fmt: skip


def states():
    """Count the states that are held somewhere."""
    gc.collect()
    return sum(type(one) is State for one in gc.get_objects())


def test_events_that_nobody_takes_hold_no_states(tmp_path):
    async def count():
        service = serving(faulty.session().model, tmp_path)
        service.start()
        begun = Row(
            stream=Stream.begin(service.engine.model.initial_state(1)), unread=random_tokens(3), budget=300
        )
        before = states()
        events = service.follow(begun)
        await anext(events)  # and no more, while all 300 are written
        while service.engine.waiting:
            await asyncio.sleep(0.01)
        held = states() - before
        written = [event.token async for event in events if event.what == "wrote"]
        await service.stop()
        return held, written

    held, written = asyncio.run(count())
    assert len(written) >= 299
    assert held < 10


class App:
    # Asks an application as a server would.

    def __init__(self, folder, keys=None, quota=None, **options):
        service = serving(faulty.session().model, folder, **options)
        made = Keys(keys, quota)
        here = Context(service, made, Metrics(service.engine, service.store, "tiny"), ("tiny",), "fp")
        self.service, self.app = service, create_app(here)

    def __enter__(self):
        self.runner = asyncio.Runner()
        self.life = self.app.router.lifespan_context(self.app)
        self.runner.run(self.life.__aenter__())
        return self

    def __exit__(self, *error):
        self.runner.run(self.life.__aexit__(None, None, None))
        self.runner.close()

    async def ask(self, method, path, body=None, key=None):
        path, _, query = path.partition("?")
        data = b"" if body is None else json.dumps(body).encode()
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        if key is not None:
            headers.append((b"authorization", f"Bearer {key}".encode()))
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
            "raw_path": path.encode(), "query_string": query.encode(), "headers": headers, "root_path": "",
            "scheme": "http", "client": ("127.0.0.1", 1), "server": ("localhost", 80),
        }  # fmt: skip
        given, out, status = [{"type": "http.request", "body": data}], bytearray(), 0

        async def receive():
            if given:
                return given.pop()
            return await asyncio.Future()

        async def send(message):
            nonlocal status
            status = message.get("status", status)
            out.extend(message.get("body", b""))

        await self.app(scope, receive, send)
        return status, json.loads(out) if out.startswith(b"{") else bytes(out)


def test_health_tells_of_an_engine_that_has_ended(tmp_path):
    with App(tmp_path) as app:
        assert app.runner.run(app.ask("GET", "/health"))[0] == 200
        app.service.engine.failed = True
        assert app.runner.run(app.ask("GET", "/health"))[0] == 503


def test_a_response_that_a_kill_broke_off_in_the_background_has_failed(server, tmp_path):
    body = {"model": "tiny", "input": "hi", "background": True, "max_output_tokens": 10**6}
    _, made = server.ask("POST", "/v1/responses", body)
    server.end()
    again = server.nursery.start(tmp_path / "store")
    _, found = again.ask("GET", f"/v1/responses/{made['id']}")
    assert (found["status"], found["error"]["code"]) == ("failed", "server_error")
    again.end()


KEYS = {"ann": "ann-" + "a" * 16, "bob": "bob-" + "b" * 16}


def interleaved(folder, count):
    """Let two owners say the same things at random, and look for what one has of the other."""
    file = folder / "keys"
    file.write_text("".join(f"{name} {key}\n" for name, key in KEYS.items()))
    rng, mine, said = random.Random(0), {name: [] for name in KEYS}, {name: set() for name in KEYS}
    texts = ["".join(rng.choices("abc", k=rng.randint(1, 20))) for _ in range(30)]
    talks = {name: [] for name in KEYS}
    refused = cached = 0

    def longest(name, text):
        return max((len(t) for t in said[name] if text.startswith(t)), default=0)

    async def one(app):
        nonlocal refused, cached
        name = rng.choice(list(KEYS))
        other = next(n for n in KEYS if n != name)
        kind, text = rng.random(), rng.choice(texts)
        if kind < 0.4 and mine[other]:
            # An id of the other one, in all places where one can be given.
            what, id = rng.choice(mine[other])
            paths = {
                "response": [("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("GET", "/changed")],
                "conversation": [("GET", ""), ("DELETE", ""), ("GET", "/items"), ("POST", "")],
                "memory": [
                    ("GET", ""),
                    ("DELETE", ""),
                    ("GET", "/content"),
                    ("POST", "/sleep"),
                    ("POST", "/ask"),
                ],
            }[what]
            plural = {"response": "responses", "conversation": "conversations", "memory": "memories"}[what]
            method, end = rng.choice(paths)
            body = {"question": "?"} if end == "/ask" else {"metadata": {}} if method == "POST" else None
            asks = [(method, f"/v1/{plural}/{id}{end}", body)]
            if what != "memory":
                field = "previous_response_id" if what == "response" else what
                asks.append(("POST", "/v1/responses", {"model": "tiny", "input": text, field: id}))
            else:
                own = next((i for w, i in mine[name] if w == "memory"), id)
                asks.append(("GET", f"/v1/memories/{own}/diff/{id}", None))
                asks.append(("POST", "/v1/memories/merge", {"memories": [own, id]}))
            status, said_ = await app.ask(*rng.choice(asks), KEYS[name])
            assert status == 404
            assert set(said_) == {"error"}
            refused += 1
        elif kind < 0.75:
            history = rng.choice([[], *talks[name]])
            messages = [*history, {"role": "user", "content": text}]
            body = {"model": "tiny", "messages": messages, "max_tokens": 2}
            status, answer = await app.ask("POST", "/v1/chat/completions", body, KEYS[name])
            assert status == 200
            whole = "".join(f"{m['content']}\n" for m in messages)
            count = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            # What this owner has said before, and never more.
            assert count == longest(name, whole)
            cached += count > 0
            answered = answer["choices"][0]["message"]
            said[name].add(whole + answered["content"])
            talks[name].append([*messages, {"role": "assistant", "content": answered["content"]}])
        elif kind < 0.9:
            body = {"model": "tiny", "input": text, "max_output_tokens": 2}
            status, answer = await app.ask("POST", "/v1/responses", body, KEYS[name])
            assert status == 200
            assert answer["usage"]["input_tokens_details"]["cached_tokens"] == longest(name, text + "\n")
            said[name].add(f"{text}\n{text_of(answer)}")
            mine[name].append(("response", answer["id"]))
        elif kind < 0.95:
            _, answer = await app.ask("POST", "/v1/conversations", {}, KEYS[name])
            mine[name].append(("conversation", answer["id"]))
        else:
            _, answer = await app.ask("POST", "/v1/memories", {"name": text}, KEYS[name])
            mine[name].append(("memory", answer["id"]))
            _, listed = await app.ask("GET", "/v1/memories?limit=100", None, KEYS[name])
            assert {m["id"] for m in listed["data"]} <= {id for _, id in mine[name]}

    async def all(app):
        for _ in range(count):
            await one(app)

    with App(folder / "store", file) as app:
        app.runner.run(all(app))
        names = {row[0] for row in app.service.store._db.read("SELECT DISTINCT owner FROM streams")}
    assert names == set(KEYS)
    assert refused > count // 10  # of both kinds there were enough
    assert cached > count // 10


def test_two_owners_never_see_anything_of_each_other(tmp_path):
    interleaved(tmp_path, 150)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_owners_never_see_anything_of_each_other_in_10_000_requests(tmp_path):
    interleaved(tmp_path, 10_000)


def test_quotas_do_not_look_at_the_clock_that_jumps(tmp_path, monkeypatch):
    now = time.time()
    with App(tmp_path, None, Quota(requests_a_minute=2)) as app:
        statuses = []
        for jump in (0, 10**7, -(10**7)):
            monkeypatch.setattr(time, "time", lambda jump=jump: now + jump)
            statuses.append(app.runner.run(app.ask("POST", "/v1/conversations", {}))[0])
        assert statuses == [200, 200, 429]


def test_what_was_evicted_is_told_and_never_gone_on_from_without_its_context(tmp_path):
    with App(tmp_path, most_disk=20_000) as app:
        body = {"model": "tiny", "input": "x" * 40, "max_output_tokens": 2}
        _, first = app.runner.run(app.ask("POST", "/v1/responses", body))
        for i in range(15):
            more = {**body, "input": str(i) * 40}
            assert app.runner.run(app.ask("POST", "/v1/responses", more))[0] == 200
        status, told = app.runner.run(
            app.ask("POST", "/v1/responses", {**body, "previous_response_id": first["id"]})
        )
        assert (status, told["error"]["code"]) == (404, "previous_response_not_found")
        assert app.runner.run(app.ask("GET", f"/v1/responses/{first['id']}"))[0] == 404
        _, metrics = app.runner.run(app.ask("GET", "/metrics"))
        assert b'lmsleep_evicted_sessions_total{model_name="tiny",reason="room"} 0.0' not in metrics
        assert app.service.store.bytes()["disk"] <= 20_000


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_under_load_memory_stays_flat(nursery, tmp_path):
    # Chats, responses, streams that are left, memories: what grows with requests would show in minutes.
    minutes = float(os.environ.get("LMSLEEP_LOAD_MINUTES", "5"))
    server = nursery.start(tmp_path / "store", most_disk=3_000_000, most_bytes=500_000)
    over, counts = threading.Event(), [0] * 4

    def load(number):
        rng = random.Random(number)
        while not over.is_set():
            text = "".join(rng.choices("abcdef ", k=rng.randint(1, 60)))
            if number == 0:
                with ask_raw(server, endless(True)):
                    pass
                time.sleep(0.2)
            elif number == 1:
                server.respond(text, tokens=8)
            elif number == 2:
                _, made = server.ask("POST", "/v1/memories", {"text": text * 5})
                if "id" in made:  # or the store is full for a moment
                    server.ask("DELETE", f"/v1/memories/{made['id']}")
            else:
                messages = [{"role": "user", "content": text}]
                server.ask(
                    "POST", "/v1/chat/completions", {"model": "tiny", "messages": messages, "max_tokens": 8}
                )
            counts[number] += 1

    threads = [threading.Thread(target=load, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    samples, begin = [], time.monotonic()
    try:
        while (now := time.monotonic() - begin) < 60 * minutes:
            time.sleep(1)
            pages = int(Path(f"/proc/{server.pid}/statm").read_text().split()[1])
            samples.append((now, pages * resource.getpagesize() / 2**20))
    finally:
        over.set()
        for thread in threads:
            thread.join(WAIT)
    late = torch.tensor(samples[len(samples) // 3 :], dtype=torch.float64)  # caches fill first
    t, mib = late.T
    slope = float(((t - t.mean()) * (mib - mib.mean())).sum() / ((t - t.mean()) ** 2).sum()) * 60
    requests = sum(counts)
    print(f"{requests} requests, {samples[0][1]:.1f} to {samples[-1][1]:.1f} MiB, {slope:.3f} MiB a minute")
    server.end()
    # A token more that is held of each request would be tens of MiB.
    assert slope < 0.5
