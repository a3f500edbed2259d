import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import VOCAB, close, lively, random_tokens, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from lmsleep import Session, SleepConfig
from lmsleep.serve.errors import ApiError
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
    assert len(list((tmp_path / "starts").glob("*/*"))) == 1
    # The same text, read by somebody else, is his own.
    read(model, store, "b", store.nothing(), random_tokens(L + 1))
    assert len(list((tmp_path / "starts").glob("*/*"))) == 2
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
    assert not list((tmp_path / "starts").glob("*/*"))
    assert store.bytes() == {"memory": 0, "disk": 0}
    store.close()


def test_what_nobody_uses_expires_and_what_lasts_stays(model, tmp_path, monkeypatch):
    hours = [0.0]
    monkeypatch.setattr("lmsleep.serve.room.time.monotonic", lambda: hours[0] * 3600)
    store = Store(tmp_path, model, SLEEP, keep_days=1)
    kept = {}
    for i, kind in enumerate(("loose", "response", "compaction", "memory", "conversation", "used")):
        kept[kind] = read(model, store, "a", store.nothing(), random_tokens(L + 1 + i, seed=i))
        if kind != "loose":
            store.put("a", "response" if kind == "used" else kind, kind, {}, kept[kind].id)
    store.put("a", "response", "failed", {})  # without a stream
    hours[0] = 23
    assert store.sweep() == 0
    assert store.find("a", kept["used"].id) is not None
    store.close()
    store = Store(tmp_path, model, SLEEP, keep_days=1)  # a store that is closed does not age
    hours[0] = 25
    assert store.sweep() == 3
    assert store.room.evicted == {"age": 3}
    for kind in ("loose", "response", "compaction"):
        assert store.find("a", kept[kind].id) is None
        assert store.get("a", kind, kind) is None
    assert store.get("a", "response", "failed") is None
    for kind in ("memory", "conversation", "used"):
        assert store.find("a", kept[kind].id) is not None
    check_disk(store)
    store.close()


def check_disk(store):
    """Check that counts are right, and that each file has a row and each row a file."""
    files = {path.stem: path.stat().st_size for path in (store.folder / "starts").glob("*/*")}
    starts = dict(store._db.read("SELECT id, bytes FROM starts WHERE id != ''"))
    assert files == starts
    rows = [
        *store._db.read("SELECT length(window) FROM streams"),
        *store._db.read("SELECT length(body) FROM things"),
        *store._db.read("SELECT length(tokens) FROM unread"),
    ]
    assert store.bytes()["disk"] == sum(files.values()) + sum(row[0] for row in rows)


def test_where_room_is_short_the_oldest_leave_and_memories_never(model, tmp_path):
    alone = Store(tmp_path / "alone", model, SLEEP)
    read(model, alone, "a", alone.nothing(), random_tokens(L + 1))
    one = alone.bytes()["disk"]
    alone.close()
    store = Store(tmp_path / "store", model, SLEEP, most_disk=8 * one)
    kept = [read(model, store, "a", store.nothing(), random_tokens(L + 1, seed=i)) for i in range(7)]
    store.put("a", "memory", "m", {}, kept[0].id)
    store.put("a", "response", "r", {}, kept[1].id)
    assert store.find("a", kept[2].id) is not None  # so that it is not the oldest
    for i in range(8, 11):
        kept.append(read(model, store, "a", store.nothing(), random_tokens(L + 1, seed=i)))
        assert store.bytes()["disk"] <= 8 * one
    there = [store.find("a", k.id) is not None for k in kept]
    assert there[:3] == [True, True, True]  # a memory, a response, the one that was used
    assert not all(there)
    assert there[-1]
    check_disk(store)
    # As many memories as there is room for, and responses left: these go, then nothing can.
    with pytest.raises(ApiError) as full:
        for i in range(20, 40):
            more = read(model, store, "a", store.nothing(), random_tokens(L + 1, seed=i))
            store.put("a", "memory", f"m{i}", {}, more.id)
    assert full.value.status == 507
    assert store.get("a", "response", "r") is None
    assert store.get("a", "memory", "m") is not None
    assert store.bytes()["disk"] <= 8 * one
    check_disk(store)
    store.close()


def test_an_owner_who_has_no_room_harms_himself_alone(model, tmp_path):
    store = Store(tmp_path, model, SLEEP, most_each=5000)
    other = read(model, store, "b", store.nothing(), random_tokens(L + 1))
    with pytest.raises(ApiError) as full:
        for i in range(40):
            kept = read(model, store, "a", store.nothing(), random_tokens(L + 1, seed=i))
            store.put("a", "memory", f"m{i}", {}, kept.id)
    assert (full.value.status, full.value.body["code"]) == (403, "quota_exceeded")
    assert store.bytes("a")["disk"] <= 5000
    assert store.find("b", other.id) is not None
    read(model, store, "b", other, random_tokens(L + 1))
    store.close()


def test_what_comes_from_disk_is_bit_for_bit_what_was_written(model, tmp_path):
    store = Store(tmp_path, model, SLEEP, most_bytes=1)  # one is held: the others come from disk
    kept = [read(model, store, "a", store.nothing(), random_tokens(3 * L + n, seed=n)) for n in range(3)]
    assert store.recent.evicted == 2
    assert store.streams() == {"memory": 1, "disk": 3}
    for n, before in enumerate(kept[:2]):
        found = store.find("a", before.id)
        assert len(found.unread) == len(before.stream.window)
        # As a session that reads this window at once, from where it began; so does the next sleep.
        again = read_on(model, found, random_tokens(0))
        alone = Session(model, SLEEP)
        for piece in random_tokens(3 * L + n, seed=n).split(L):
            alone.read(piece)
        for stream_ in (alone.stream, read_on(model, kept_of(alone.stream), random_tokens(2 * L, seed=7))):
            for mine, theirs in zip(again.state.tensors(), stream_.state.tensors(), strict=True):
                assert torch.equal(mine, theirs)
            again = read_on(model, kept_of(again), random_tokens(2 * L, seed=7))
    store.close()


def test_an_answer_can_be_kept_although_what_it_goes_on_from_has_left(model, tmp_path):
    store = Store(tmp_path, model, SLEEP)
    before = read(model, store, "a", store.nothing(), random_tokens(L + 1))
    store.put("a", "response", "r", {}, before.id)
    after = read_on(model, before, random_tokens(1))  # while it was written ...
    assert store.delete("a", "response", "r")
    kept = store.keep("a", before, random_tokens(1), after)
    store.recent.drop(kept.id)
    same(read_on(model, store.find("a", kept.id), random_tokens(0)), after)
    store.put("a", "response", "s", {}, kept.id)
    store.settle("a", before, after)  # of one that is gone
    check_disk(store)
    store.close()


def damage(store, stream, what):
    (start,) = store._db.read("SELECT start FROM streams WHERE id = ?", (stream,))[0]
    path = store._path(start)
    data = path.read_bytes()
    if what == "missing":
        path.unlink()
    elif what == "short":
        path.write_bytes(data[:-8])
    elif what == "bit":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        blob = {"torn": b"123", "foreign": VOCAB.to_bytes(4, "little")}[what]
        with store.together():
            store._db.write("UPDATE streams SET window = ? WHERE id = ?", (blob, stream))
    store.recent.drop(stream)


@pytest.mark.parametrize("what", ["missing", "short", "bit", "torn", "foreign"])
def test_damage_harms_one_stream_alone_and_is_told(model, tmp_path, caplog, what):
    store = Store(tmp_path, model, SLEEP)
    tokens = random_tokens(L + 2)
    good = read(model, store, "a", store.nothing(), random_tokens(L + 1, seed=1))
    bad = read(model, store, "a", store.nothing(), tokens)
    damage(store, bad.id, what)
    with pytest.raises(ApiError) as told:
        store.find("a", bad.id)
    assert (told.value.status, told.value.body["code"]) == (500, "damaged")
    assert str(tmp_path) not in str(told.value)
    assert bad.id in caplog.text
    assert store.find("a", good.id) is not None
    # What is read anew does not begin with what is damaged.
    store.longest_prefix("a", torch.cat([tokens, tokens]))
    again = read(model, store, "a", store.nothing(), tokens)
    store.recent.drop(again.id)
    same(read_on(model, store.find("a", again.id), random_tokens(0)), again.stream)
    store.close()


def test_a_document_that_is_damaged_is_left_out_and_told(model, tmp_path, caplog):
    store = Store(tmp_path, model, SLEEP)
    for name in ("m1", "m2", "m3"):
        store.put("a", "memory", name, {"name": name})
    store.put_unread("a", "m1", random_tokens(3))
    with store.together():
        store._db.write("UPDATE things SET body = '{' WHERE id = 'm2'")
        store._db.write("UPDATE unread SET tokens = ?", (b"12345678901",))
    assert [thing.id for thing in store.all("a", "memory")] == ["m3", "m1"]
    for ask in (lambda: store.get("a", "memory", "m2"), lambda: store.unread("m1")):
        with pytest.raises(ApiError) as told:
            ask()
        assert told.value.body["code"] == "damaged"
    assert "m2" in caplog.text
    check_disk(store)
    store.close()


def test_no_database_is_refused_in_one_line(model, tmp_path):
    (tmp_path / "store.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(ValueError, match="no store, or damaged"):
        Store(tmp_path, model, SLEEP)


@pytest.mark.parametrize("years", [-50, 50])
def test_a_clock_that_jumps_ages_nothing_and_changes_no_order(model, tmp_path, monkeypatch, years):
    now = time.time()
    store = Store(tmp_path, model, SLEEP, keep_days=1)
    kept = read(model, store, "a", store.nothing(), random_tokens(L + 1))
    store.put("a", "response", "first", {}, kept.id)
    monkeypatch.setattr(time, "time", lambda: now + years * 365 * 86400)
    store.put("a", "response", "second", {}, kept.id)
    assert store.sweep() == 0
    assert [thing.id for thing in store.all("a", "response")] == ["second", "first"]
    assert [thing.id for thing in store.all("a", "response", 1, "second")] == ["first"]
    store.close()
    store = Store(tmp_path, model, SLEEP, keep_days=1)
    assert store.sweep() == 0
    monkeypatch.setattr(time, "time", lambda: now)
    store.put("a", "response", "third", {}, kept.id)
    assert [thing.id for thing in store.all("a", "response")] == ["third", "second", "first"]
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
    (tmp_path / "starts" / kept.start[:2] / "0123.mem").write_bytes(b"left by a kill")
    store = Store(tmp_path, model, SLEEP)
    assert [path.stem for path in (tmp_path / "starts").glob("*/*")] == [kept.start]
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
    rows = {row[0] for row in store._db.read("SELECT id FROM starts")}
    assert {path.stem for path in (tmp_path / "starts").glob("*/*")} == rows - {""}
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
    assert not store._db.read("SELECT id FROM streams")
    store.close()
