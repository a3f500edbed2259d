import random
import time

import pytest
import torch
from conftest import lively, same_memory, tiny
from test_session import L, Poisoned, consolidated, sleeping

import lmsleep.session.owner
from lmsleep import BrokenSleep, Session
from lmsleep.session import read_files
from lmsleep.text.tokenizers import Bytes, Words

WORDS = Words(["one", "two", "three"])


@pytest.fixture(scope="module")
def model():
    return lively(tiny("attention", "gated_delta_net", vocab_size=256))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_bytes(random.Random(0).randbytes(6 * L + 2))
    (tmp_path / "b.txt").write_text("bee")
    return tmp_path


def new(model, **options) -> Session:
    return Session(model, sleeping(**options), Bytes(), history=2)


def stopped_after(monkeypatch, steps, error=KeyboardInterrupt):
    left, real = [None] * steps, lmsleep.session.owner.advance

    def advance(*args):
        if not left:
            raise error
        left.pop()
        return real(*args)

    monkeypatch.setattr(lmsleep.session.owner, "advance", advance)


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_a_reading_that_was_stopped_goes_on_to_the_same_memory(model, here, monkeypatch, eviction, steps):
    whole = new(model, eviction=eviction)
    whole.read([*(here / "a.txt").read_bytes(), *b"bee"])
    session = new(model, eviction=eviction)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopped_after(patch, steps)
        read_files(session, ["a.txt", "b.txt"], save="m.mem")
    again = Session.load("m.mem", model, Bytes())
    assert again.stats.tokens == session.stats.tokens == steps * L
    read_files(again, ["a.txt", "b.txt"], save="m.mem", tags={"about": "bees"})
    for session in (again, Session.load("m.mem", model, Bytes())):
        assert same_memory(consolidated(session), consolidated(whole), 0.0)
        assert session.stream.window.tolist() == whole.stream.window.tolist()
        assert session.origin.tags["about"] == "bees"
        before = session.stream
        read_files(session, ["a.txt", "b.txt"])
        assert session.stream is before  # it has read them already


def test_a_kill_loses_what_was_read_since_the_last_save(model, here, monkeypatch):
    for save_every, kept in ((0.0, 3 * L), (1e9, None)):
        with monkeypatch.context() as patch, pytest.raises(SystemError):
            stopped_after(patch, 3, SystemError)  # as good as a kill: nothing is saved on the way out
            read_files(new(model), ["a.txt"], save="m.mem", save_every=save_every)
        if kept is None:
            assert not (here / "m.mem").exists()
        else:
            assert Session.load("m.mem", model).stats.tokens == kept
            (here / "m.mem").unlink()


def test_saves_are_as_far_apart_as_they_should_be(model, here, monkeypatch):
    saves, clock = [], [0.0]

    def monotonic():
        clock[0] += 1.0  # a second a step
        return clock[0]

    monkeypatch.setattr(time, "monotonic", monotonic)
    monkeypatch.setattr(Session, "save", lambda self, *args, **kwargs: saves.append(self.stats.tokens))
    read_files(new(model), ["a.txt"], save="m.mem", save_every=2.5)
    assert len(saves) == 3 and saves[-1] == 6 * L + 2 and sorted(saves) == saves


def test_files_are_taken_back_together_and_can_be_read_again(model, here):
    session = new(model)
    session.read("before")
    before = session.stream
    read_files(session, ["a.txt", "b.txt"], save="m.mem")
    after = session.memory
    session.rewind()
    assert session.stream is before
    read_files(session, ["a.txt", "b.txt"], save="m.mem")
    assert same_memory(session.memory, after, 0.0)
    session.read("more")
    read_files(session, ["a.txt", "b.txt"])  # still known, though something was read on top
    assert session.stats.tokens == 6 + 6 * L + 2 + 3 + 4


def test_a_reading_that_was_stopped_is_not_mixed_up(model, here, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopped_after(patch, 2)
        read_files(new(model), ["a.txt"], save="m.mem")
    with pytest.raises(ValueError, match="stopped while it read other files"):
        read_files(Session.load("m.mem", model, Bytes()), ["b.txt"])
    session = Session.load("m.mem", model, Bytes())
    session.read("x")
    with pytest.raises(ValueError, match="read on by something else since"):
        read_files(session, ["a.txt"])
    session.origin.tags["reading"] = "?"
    with pytest.raises(ValueError, match="tag 'reading' is damaged"):
        read_files(session, ["a.txt"])


def test_a_broken_sleep_saves_what_was_read_before(model, here):
    (here / "c.txt").write_bytes(bytes([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]))
    session = new(Poisoned(model))
    session.model.state_dict = model.state_dict  # so that it can be saved
    with pytest.raises(BrokenSleep, match="token 5"):
        read_files(session, ["c.txt"], save="m.mem")
    assert Session.load("m.mem", model).stats.tokens == 5


def test_words_and_bytes_are_read_as_by_read(model, here):
    (here / "w.txt").write_text("one two three " * 9)
    for tokenizer in (WORDS, Bytes()):
        sessions = [Session(model, sleeping(), tokenizer) for _ in range(2)]
        sessions[0].read("one two three " * 9)
        read_files(sessions[1], [here / "w.txt"])
        assert same_memory(sessions[0].memory, sessions[1].memory, 0.0)
        assert sessions[1].stream.window.dtype == torch.int64


@pytest.mark.parametrize(
    ("said", "call"),
    [
        ("at least one file", lambda s: read_files(s, [])),
        ("save_every must not be negative", lambda s: read_files(s, ["a.txt"], save_every=-1)),
        ("save_every must not be negative", lambda s: read_files(s, ["a.txt"], save_every=float("nan"))),
        ("'reading' is taken", lambda s: read_files(s, ["a.txt"], tags={"reading": ""})),
        ("has none", lambda s: read_files(Session(s.model, sleeping()), ["a.txt"])),
        ("b.txt: 'bee' is not among", lambda s: read_files(Session(s.model, sleeping(), WORDS), ["b.txt"])),
        ("tokens must lie in 0 ... 10, got 101",
         lambda s: read_files(Session(lively(tiny()), sleeping(), Bytes()), ["b.txt"])),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(model, here, said, call):
    session = new(model)
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        call(session)
    assert session.stats.tokens == 0 and not (here / "m.mem").exists()
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        read_files(session, ["none.txt"])
