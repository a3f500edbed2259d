import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import close, lively, random_tokens, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from lmsleep import Session, SleepConfig
from lmsleep.serve.store import Store
from lmsleep.session import stream

L = 4
SLEEP = SleepConfig(window=L, passes=2)


@pytest.fixture(scope="module")
def model():
    return lively(tiny("attention", "gated_delta_net"))


def read_on(model, kept, tokens):
    """Return the stream after it has read what it still must, and then `tokens`."""
    session = Session(model, SLEEP)
    session.stream = kept.stream
    session.read(kept.unread)
    session.read(tokens)
    return session.stream


def read(model, store, owner, kept, tokens):
    return store.keep(owner, kept, tokens, read_on(model, kept, tokens))


def same(one, other):
    assert (one.tokens, one.sleeps) == (other.tokens, other.sleeps)
    assert torch.equal(one.window, other.window)
    for mine, alone in zip(one.state.tensors(), other.state.tensors(), strict=True):
        assert close(mine, alone)


@settings(max_examples=15)
@given(pieces=st.lists(st.integers(0, 2 * L + 1), min_size=1, max_size=5), small=st.booleans())
def test_what_is_kept_goes_on_exactly_also_from_disk(model, tmp_path_factory, pieces, small):
    folder = tmp_path_factory.mktemp("store")
    store = Store(folder, model, SLEEP, most_bytes=1 if small else 2**30)
    kept, session, names = store.nothing(), Session(model, SLEEP), []
    for i, count in enumerate(pieces):
        tokens = random_tokens(count, seed=i)
        kept = read(model, store, "a", kept, tokens)
        session.read(tokens)
        names.append((kept.id, session.stream))
    store.close()
    store = Store(folder, model, SLEEP)
    for name, alone in names:  # all of them: every answer can be gone on from
        found = store.find("a", name)
        same(read_on(model, found, random_tokens(0)), alone)
        same(
            read_on(model, found, random_tokens(3, seed=9)),
            read_on(model, kept_of(alone), random_tokens(3, seed=9)),
        )
    store.close()


def kept_of(alone):
    class Kept:
        stream, unread = alone, torch.empty(0, dtype=torch.int64)

    return Kept


@settings(max_examples=25)
@given(
    histories=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=4 * L), min_size=1, max_size=4),
    asked=st.lists(st.integers(0, 1), min_size=1, max_size=4 * L),
)
def test_the_longest_prefix_is_found_and_nobody_elses(model, tmp_path_factory, histories, asked):
    store = Store(tmp_path_factory.mktemp("store"), model, SLEEP)
    for history in histories:
        read(model, store, "a", store.nothing(), torch.tensor(history))
    tokens = torch.tensor(asked)
    best = max((len(h) for h in histories if h == asked[: len(h)] and len(h) < len(asked)), default=0)
    kept, known = store.longest_prefix("a", tokens)
    assert known == best
    same(read_on(model, kept, tokens[known:]), read_on(model, store.nothing(), tokens))
    assert store.longest_prefix("b", tokens)[1] == 0
    store.close()


def test_streams_of_one_window_share_its_file(model, tmp_path):
    store = Store(tmp_path, model, SLEEP)
    begun = read(model, store, "a", store.nothing(), random_tokens(L + 1))
    for i in range(3):
        read(model, store, "a", begun, random_tokens(1, seed=i))
    assert len(list((tmp_path / "starts").iterdir())) == 1
    # The same text, read by somebody else, is his own.
    read(model, store, "b", store.nothing(), random_tokens(L + 1))
    assert len(list((tmp_path / "starts").iterdir())) == 2
    store.close()


def test_what_is_deleted_is_gone_and_what_is_shared_stays(model, tmp_path):
    store = Store(tmp_path, model, SLEEP)
    first = read(model, store, "a", store.nothing(), random_tokens(L + 1))
    second = read(model, store, "a", first, random_tokens(1))
    for name, kept in (("one", first), ("two", second)):
        store.put("a", "response", name, {"said": name}, kept.id)
    assert not store.delete("b", "response", "one")
    assert store.delete("a", "response", "one")
    assert store.find("a", first.id) is None
    assert store.get("a", "response", "one") is None
    assert store.find("a", second.id) is not None
    assert store.delete("a", "response", "two")
    assert not list((tmp_path / "starts").iterdir())
    assert store.bytes() == {"memory": 0, "disk": 0}
    store.close()


def test_streams_that_nobody_uses_are_forgotten(model, tmp_path):
    store = Store(tmp_path, model, SLEEP)
    loose = read(model, store, "a", store.nothing(), random_tokens(L + 1))
    held = read(model, store, "a", store.nothing(), random_tokens(L + 2, seed=1))
    store.put("a", "memory", "m", {}, held.id)
    assert store.forget(older_than=0) == 0
    assert store.forget(older_than=2**40) == 1
    assert store.find("a", loose.id) is None
    assert store.find("a", held.id) is not None
    store.close()


def test_a_store_of_another_model_or_sleep_or_in_use_is_refused(model, tmp_path):
    store = Store(tmp_path, model, SLEEP)
    with pytest.raises(ValueError, match="another process"):
        Store(tmp_path, model, SLEEP)
    store.close()
    with pytest.raises(ValueError, match="store of another model"):
        Store(tmp_path, lively(tiny("attention", "gated_delta_net"), seed=1), SLEEP)
    with pytest.raises(ValueError, match="store of another sleep"):
        Store(tmp_path, model, SleepConfig(window=L, passes=3))
    Store(tmp_path, model, SLEEP).close()


def test_a_start_without_a_row_is_swept_and_one_in_use_is_not(model, tmp_path):
    store = Store(tmp_path, model, SLEEP)
    kept = read(model, store, "a", store.nothing(), random_tokens(L + 1))
    store.close()
    (tmp_path / "starts" / "0123.mem").write_bytes(b"left by a kill")
    store = Store(tmp_path, model, SLEEP)
    assert [path.stem for path in (tmp_path / "starts").iterdir()] == [kept.start]
    store.close()


KILLED = """
import sys, torch
sys.path[:0] = {path!r}
from test_serve_store import SLEEP, Store, lively, random_tokens, read, tiny
model = lively(tiny("attention", "gated_delta_net"))
store = Store(sys.argv[1], model, SLEEP)
kept, i = store.nothing(), 0
while True:
    kept = read(model, store, "a", kept, random_tokens(3, seed=i))
    i += 1
    print(kept.id, flush=True)
"""


@pytest.mark.parametrize("after", [1, 4, 9])
def test_what_was_acknowledged_outlives_a_kill(model, tmp_path, after):
    code = KILLED.format(path=[str(Path(__file__).parent)]).replace(
        "sys.argv[1]", "__import__('pathlib').Path(sys.argv[1])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    names = [process.stdout.readline().strip() for _ in range(after)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    store = Store(tmp_path, model, SLEEP)
    session = Session(model, SLEEP)
    for i, name in enumerate(names):
        session.read(random_tokens(3, seed=i))
        same(read_on(model, store.find("a", name), random_tokens(0)), session.stream)
    rows = {row[0] for row in store._db.execute("SELECT id FROM starts")}
    assert {path.stem for path in (tmp_path / "starts").iterdir()} == rows - {""}
    store.close()


def test_a_stream_that_slept_before_its_window_was_full_is_found_by_name_alone(model, tmp_path):
    store = Store(tmp_path, model, SLEEP)
    session, tokens = Session(model, SLEEP), random_tokens(2)
    session.read(tokens)
    session.sleep()
    kept = store.keep("a", store.nothing(), tokens, session.stream)
    assert kept.chain is None
    assert store.longest_prefix("a", random_tokens(2 * L))[1] == 0
    same(read_on(model, store.find("a", kept.id), random_tokens(0)), session.stream)
    store.close()


def test_a_broken_state_is_not_kept(model, tmp_path):
    store = Store(tmp_path, model, SLEEP)
    session, tokens = Session(model, SLEEP), random_tokens(L + 1)
    session.read(tokens)
    broken = session.stream.start.memory.map(lambda t: t * float("nan"))
    bad = stream.Stream(
        type(session.stream.start)(broken, session.stream.start.cache), session.stream.share,
        session.stream.window, session.stream.tokens, session.stream.sleeps,
    )  # fmt: skip
    with pytest.raises(ValueError, match="NaN"):
        store.keep("a", store.nothing(), tokens, bad)
    assert not store._db.execute("SELECT id FROM streams").fetchall()
    store.close()
