import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import VOCAB, lively, random_tokens, same_memory, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_session import L, Poisoned, sleeping

from lmsleep import BrokenSleep, Session, SessionBatch, SleepConfig
from lmsleep.session import Answer, Row, Sampling, advance
from lmsleep.state import State
from lmsleep.text.tokenizers import Words

BLOCKS = ("attention", "gated_delta_net", "gated_linear", "attention")
WORDS = Words([chr(97 + i) for i in range(VOCAB)])


@pytest.fixture(scope="module")
def model():
    return lively(tiny(*BLOCKS))


@dataclass(frozen=True)
class Request:
    # What a client of a server asks for, and when.

    joins: int
    before: int
    prompt: int
    budget: int
    seed: int
    temperature: float
    stop: tuple = ()
    nap: int = 0
    leaves: int | None = None

    def session(self, model, sleep) -> Session:
        session = Session(model, sleep, WORDS)
        session.read(random_tokens(self.before, seed=self.seed))
        return session

    @property
    def tokens(self):
        return random_tokens(self.prompt, seed=100 + self.seed)

    def row(self, model, sleep) -> Row:
        return Row(
            stream=self.session(model, sleep).stream,
            unread=self.tokens,
            budget=self.budget,
            answer=Answer(WORDS, self.stop),
            sampling=Sampling(temperature=self.temperature),
            generator=torch.Generator().manual_seed(self.seed),
            nap=self.nap,
        )


REQUESTS = st.builds(
    Request,
    joins=st.integers(0, 12),
    before=st.integers(1, 2 * L + 1),
    prompt=st.integers(0, 2 * L + 2),
    budget=st.integers(0, 7),
    seed=st.integers(0, 50),
    temperature=st.sampled_from([0.0, 1.0, 3.0]),
    stop=st.sampled_from([(), ("c",), (3, "ab")]),
    nap=st.sampled_from([0, 0, 2]),
    leaves=st.none() | st.integers(1, 20),
)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@settings(max_examples=15)
@given(
    requests=st.lists(REQUESTS, min_size=1, max_size=4),
    idle=st.sets(st.tuples(st.integers(0, 20), st.integers(0, 3))),
)
def test_rows_that_join_and_leave_are_as_if_alone(model, eviction, requests, idle):
    sleep, step = sleeping(eviction=eviction), 0
    waiting, rows, ended, shown = dict(enumerate(requests)), {}, {}, [""] * len(requests)
    while waiting or rows:
        for i in [i for i, request in waiting.items() if request.joins <= step]:
            rows[i] = waiting.pop(i).row(model, sleep)
        now = [i for i in rows if (step, i) not in idle]  # a scheduler may leave rows out of a step
        for i, row in zip(now, advance(model, sleep, [rows[i] for i in now]), strict=True):
            rows[i] = row
            shown[i] += "".join(row.pieces)
        for i in [i for i in rows if rows[i].done or requests[i].leaves == step]:
            ended[i] = rows.pop(i)
        step += 1
    for i, request in enumerate(requests):
        alone, row, whole = request.session(model, sleep), ended[i], ""
        if request.budget:
            whole = alone.generate(
                request.tokens,
                request.budget,
                temperature=request.temperature,
                stop=request.stop,
                seed=request.seed,
            )
        else:
            alone.read(request.tokens)
        if not row.done:  # its client left
            assert whole.startswith(shown[i])
            continue
        if request.nap:
            alone.sleep(request.nap)
        assert shown[i] == row.answer.whole() == whole
        assert (row.stream.tokens, row.stream.sleeps) == (alone.stream.tokens, alone.stream.sleeps)
        assert row.stream.window.tolist() == alone.stream.window.tolist()
        assert same_memory(row.stream.state.memory, alone.stream.state.memory)
        assert row.stream.peak_bytes == alone.stream.peak_bytes


def test_rows_that_go_on_together_are_joined_once(model, monkeypatch):
    sleep, joins, join = SleepConfig(window=40, passes=2), [], State.join
    rows = [Request(0, 3 + i, 4, 20, i, 1.0).row(model, sleep) for i in range(4)]
    alone = [[row] for row in rows]
    for _ in range(18):
        alone = [advance(model, sleep, row) for row in alone]
    monkeypatch.setattr(
        State, "join", staticmethod(lambda parts, *rest: joins.append(len(parts)) or join(parts, *rest))
    )
    for step in range(18):
        # In any order; after 12 steps one of them is left out, and read on by itself in the end.
        now = [*rows[step % 4 :], *rows[: step % 4]] if step < 12 else rows[:3]
        after = dict(zip(map(id, now), advance(model, sleep, now), strict=True))
        rows = [after.get(id(row), row) for row in rows]
    assert joins == [4, 3]
    while rows[3].stream.tokens < rows[2].stream.tokens + 1:
        rows[3:] = advance(model, sleep, rows[3:])
    assert joins[2:] == [1]
    for mine, [other] in zip(rows, alone, strict=True):
        assert mine.answer.whole() == other.answer.whole()
        assert same_memory(mine.stream.state.memory, other.stream.state.memory)
        assert mine.stream.peak_bytes == other.stream.peak_bytes


def test_a_stream_that_is_asked_for_its_state_keeps_no_other_alive(model):
    sleep = SleepConfig(window=40, passes=2)
    rows = [Row(stream=Session(model, sleep).stream, unread=random_tokens(3 + i)) for i in range(3)]
    rows = advance(model, sleep, rows)
    states = [row.stream.state for row in rows]
    assert states[0].cache.length == 3 and states[0].cache.filled is None
    held = [{t.untyped_storage().data_ptr() for t in state.tensors()} for state in states]
    assert not held[0] & held[1] and not held[1] & held[2]
    assert rows[0].stream.state is states[0]
    for _ in range(2):  # nor has one that went on alone the room to grow in which it was read
        rows[1:2] = advance(model, sleep, [replace(rows[1], unread=random_tokens(1))])
    keys = rows[1].stream.state.cache.layers[0][0]
    assert keys.shape[1] == 6 and keys.untyped_storage().nbytes() == keys.nbytes


def test_a_row_is_a_value_and_a_step_can_be_taken_again(model):
    sleep = sleeping()
    row = Request(0, 3, 4, 6, 1, 1.0).row(model, sleep)
    while not row.answer.tokens:
        [row] = advance(model, sleep, [row])
    before = (row.stream, row.answer.whole(), row.budget, row.generator.get_state())
    ends = []
    for _ in range(2):
        [end] = advance(model, sleep, [row])
        while not end.done:
            [end] = advance(model, sleep, [end])
        ends.append(end)
    assert ends[0].answer.whole() == ends[1].answer.whole() != before[1]
    assert same_memory(ends[0].stream.state.memory, ends[1].stream.state.memory, 0.0)
    assert (row.stream, row.answer.whole(), row.budget) == before[:3]
    assert torch.equal(row.generator.get_state(), before[3])
    [again] = advance(model, sleep, [replace(ends[0], pieces=("x",))])
    assert (
        again.stream is ends[0].stream and again.pieces == ()
    )  # done: nothing happens, nothing is shown twice


def test_rows_have_budgets_stops_and_draws_of_their_own(model):
    sleep = sleeping()
    x = random_tokens(3)
    free = Session(model, sleep).generate(x, 8)
    rows = [
        Row(stream=Session(model, sleep).stream, unread=x, budget=8),
        Row(stream=Session(model, sleep).stream, unread=x, budget=3),
        Row(stream=Session(model, sleep).stream, unread=x, budget=8, answer=Answer(None, [free[4]])),
        Row(stream=Session(model, sleep).stream, unread=x),
        Row(stream=Session(model, sleep).stream, unread=x, budget=5, sampling=Sampling(temperature=5.0)),
    ]
    while not all(row.done for row in rows):
        rows = advance(model, sleep, rows)
    first = free.index(free[4])
    assert [row.answer.tokens for row in rows[:4]] == [free, free[:3], free[:first], []]
    assert len(rows[4].answer.tokens) == 5 and rows[4].answer.tokens != free[:5]
    assert [row.stream.tokens for row in rows] == [11, 6, 3 + first + 1, 3, 8]


def test_a_step_reads_a_window_at_most_and_says_who_sleeps_in_the_next(model):
    sleep = sleeping()
    row = Row(stream=Session(model, sleep).stream, unread=random_tokens(2 * L + 2), keep_logits=True)
    seen = []
    while not row.done:
        turn = row.turn(sleep)
        before = row
        [row] = advance(model, sleep, [row])
        assert row.stream.tokens - before.stream.tokens == turn.tokens == len(row.logits)
        assert (row.stream.sleeps > before.stream.sleeps) == bool(turn.passes)
        assert (row.seconds_asleep > before.seconds_asleep) == bool(turn.passes)
        seen.append(turn.tokens)
    assert seen == [L, L, 2]


def test_bytes_are_read_as_they_are(model):
    x, sleep = random_tokens(2 * L + 3), sleeping()
    ends = [Row(stream=Session(model, sleep).stream, unread=tokens) for tokens in (x, x.to(torch.uint8))]
    while not all(row.done for row in ends):
        ends = [advance(model, sleep, [row])[0] for row in ends]
    assert same_memory(ends[0].stream.state.memory, ends[1].stream.state.memory, 0.0)
    assert ends[1].stream.window.dtype == torch.int64


class Mute(Words):
    def decode(self, tokens):
        raise LookupError("no such word")


def test_what_breaks_one_row_is_its_own_error(model):
    poisoned, sleep = Poisoned(model), sleeping()
    fresh = Session(poisoned, sleep).stream
    x = [0, 1, 2, 3, 4, 5, 6]
    good = Row(stream=fresh, unread=torch.tensor(x), budget=7)
    rows = [
        Row(stream=fresh, unread=torch.tensor([1, 7, 2, 3, 4, 5]), budget=3),  # its sleep
        good,
        Row(stream=fresh, unread=torch.tensor([1, 7]), budget=3),  # its logits, awake
        Row(stream=fresh, unread=torch.tensor([1, 2]), budget=3, answer=Answer(Mute(["a"]), [])),
        Row(stream=fresh, unread=torch.tensor([1, 7]), nap=2),
    ]
    while not all(row.done for row in rows):
        rows = advance(poisoned, sleep, rows)
    errors = [row.error for row in rows]
    assert isinstance(errors[0], BrokenSleep) and "token 0" in str(errors[0]) and rows[0].stream.tokens == 0
    assert errors[1] is None and rows[1].answer.tokens == Session(model, sleep).generate(x, 7)
    assert isinstance(errors[2], ValueError) and "logits are NaN" in str(errors[2])
    assert isinstance(errors[3], LookupError) and rows[3].stream.tokens == 2
    assert isinstance(errors[4], BrokenSleep)
    assert advance(poisoned, sleep, rows)[0].error is errors[0]


def test_a_broken_row_of_a_batch_lets_the_others_write_to_their_end(model):
    poisoned = Poisoned(model)
    sessions = [Session(poisoned, sleeping()) for _ in range(2)]
    with pytest.raises(BrokenSleep, match="row 0: token 0"):
        SessionBatch(sessions).generate([[1, 7, 2, 3, 4, 5], [1, 2]], 9)
    assert sessions[1].stats.tokens == 11
    with pytest.raises(ValueError, match="logits are NaN"):
        SessionBatch(sessions).generate([[7], [1, 2]], 2)
    with pytest.raises(ValueError, match="logits are NaN"):
        Session(poisoned, sleeping()).generate([7], 2, temperature=1.0)


def test_an_answer_needs_something_to_go_on_from(model):
    with pytest.raises(ValueError, match="the window is empty"):
        Row(stream=Session(model, sleeping()).stream, budget=1)


def test_sessions_on_one_model_in_threads_of_their_own(model):
    sleep, together = SleepConfig(window=L, passes=3, eviction="sliding"), threading.Barrier(2)

    def life(seed, begin=lambda: None):
        session = Session(model, sleep)
        begin()
        session.read(random_tokens(12 * L + 2, seed=seed))
        answer = session.generate([1, 2], 3 * L, temperature=1.0, seed=seed)
        session.sleep()
        return answer, session.memory

    with ThreadPoolExecutor(2) as pool:
        beside = list(pool.map(lambda seed: life(seed, together.wait), range(2)))
    for seed, (answer, memory) in enumerate(beside):
        alone = life(seed)
        assert answer == alone[0] and same_memory(memory, alone[1], 0.0)
