"""Any order of operations on a session against a plain model: a list of what was read, and where it slept."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import VOCAB, lively, same_memory, tiny
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lmsleep import Session, SleepConfig

L, HISTORY = 4, 2
MODEL = lively(tiny("attention", "gated_delta_net"))
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=2 * L + 1)
CALLS = st.one_of(
    st.tuples(st.just("read"), TOKENS),
    st.tuples(st.just("nap"), st.sampled_from([1, 3])),
    st.tuples(st.just("rewind"), st.integers(1, HISTORY)),
    st.tuples(st.sampled_from(["fork", "go_back_to_another", "fork"])),
    st.tuples(st.sampled_from(["save_and_load", "reset", "go_back_to_another"])),
    st.tuples(st.just("generate"), TOKENS, st.integers(1, L + 2), st.integers(0, L)),
)


@dataclass(frozen=True)
class Log:
    # What survives: tokens that were read, and the N of sleeps that were asked for, in order.

    done: tuple = ()
    window: int = 0
    tokens: int = 0
    sleeps: int = 0

    def read(self, tokens) -> "Log":
        window, sleeps = self.window, self.sleeps
        for _ in tokens:
            if window == L:
                window, sleeps = 0, sleeps + 1
            window += 1
        return Log((*self.done, tuple(tokens)), window, self.tokens + len(tokens), sleeps)

    def slept(self, passes) -> "Log":
        return Log((*self.done, passes), 0, self.tokens, self.sleeps + 1)

    def again(self, sleep) -> Session:
        # A fresh session that does what survived.
        session = Session(MODEL, sleep)
        for each in self.done:
            session.read(each) if isinstance(each, tuple) else session.sleep(each)
        return session


@dataclass
class Kept:
    # A session, its log, and what can be taken back.

    session: Session
    log: Log = Log()
    past: list = field(default_factory=list)

    def goes_on(self, log) -> None:
        self.past = [*self.past, self.log][-HISTORY:]
        self.log = log


class Sessions(RuleBasedStateMachine):
    @initialize(eviction=st.sampled_from(["hard", "sliding"]))
    def begin(self, eviction):
        self.sleep = SleepConfig(window=L, passes=2, eviction=eviction)
        self.folder = tempfile.TemporaryDirectory()
        self.now = Kept(Session(MODEL, self.sleep, history=HISTORY))
        self.others = []

    # One rule: of several hypothesis picks a few an example, and nearly none that read, then take back.
    @rule(call=CALLS)
    def call(self, call):
        name, *given = call
        getattr(self, name)(*given)

    def read(self, tokens):
        self.now.session.read(tokens)
        if tokens:
            self.now.goes_on(self.now.log.read(tokens))

    def nap(self, passes):
        self.now.session.sleep(passes)
        if self.now.log.window:
            self.now.goes_on(self.now.log.slept(passes))

    def generate(self, prompt, budget, shown):
        if not prompt and not self.now.log.window:
            with pytest.raises(ValueError, match="window is empty"):
                self.now.session.generate(prompt, budget)
            return
        expected = self.now.log.again(self.sleep).generate(prompt, budget)
        pieces = self.now.session.generate(prompt, budget, stream=True)
        answer = [token for token, _ in zip(pieces, range(shown), strict=False)] if shown else [*pieces]
        pieces.close()
        assert answer == expected[: len(answer)] and (shown or len(answer) == budget)
        # zip takes one piece more than it hands on, where there is one: it was shown, so it is read
        read = expected[: shown + 1] if shown else expected
        self.now.goes_on(self.now.log.read([*prompt, *read]))

    def fork(self):
        child = Kept(self.now.session.fork(), self.now.log, [*self.now.past])
        self.others = [*self.others, self.now][-3:]
        self.now = child

    def go_back_to_another(self):
        if self.others:
            self.now, self.others = self.others[0], [*self.others[1:], self.now]

    def save_and_load(self):
        path = Path(self.folder.name) / "a.mem"
        self.now.session.save(path)
        self.now.session = Session.load(path, MODEL, history=HISTORY)
        self.now.past = []

    def reset(self):
        self.now.session.reset()
        self.now.log, self.now.past = Log(), []

    def rewind(self, times):
        for _ in range(min(times, len(self.now.past))):
            self.now.session.rewind()
            self.now.log = self.now.past.pop()
        if not self.now.past:
            with pytest.raises(ValueError, match="nothing to take back"):
                self.now.session.rewind()

    @invariant()
    def counts(self):
        stats = self.now.session.stats
        log = self.now.log
        assert (stats.tokens, stats.sleeps, stats.window_tokens) == (log.tokens, log.sleeps, log.window)

    def teardown(self):
        for kept in (self.now, *self.others):
            again = kept.log.again(self.sleep)
            assert same_memory(kept.session.stream.start.memory, again.stream.start.memory, 0.0)
            assert same_memory(kept.session.memory, again.memory)
            assert kept.session.stream.window.tolist() == again.stream.window.tolist()
            assert kept.session.working.length == again.working.length
        self.folder.cleanup()


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=40, stateful_step_count=12)
