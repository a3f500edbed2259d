import collections
import queue
import threading

import pytest
import torch
from conftest import VOCAB, close, lively, random_tokens, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from lmsleep import Session, SleepConfig
from lmsleep.serve.baton import Baton, GivingWay
from lmsleep.serve.engine import Busy, Closing, Engine, settled
from lmsleep.session import Answer, Row, Sampling, Stream

L = 5
BLOCKS = ("attention", "gated_delta_net", "attention")
WAIT = 60  # seconds; a test that hangs fails by it


@pytest.fixture(scope="module")
def model():
    return lively(tiny(*BLOCKS))


def sleep_of(eviction="hard"):
    return SleepConfig(window=L, passes=3, eviction=eviction)


def row(model, prompt, budget, seed=0, temperature=0.0):
    return Row(
        stream=Stream.begin(model.initial_state(1)),
        unread=random_tokens(prompt, seed=seed),
        budget=budget,
        answer=Answer(None, ()),
        sampling=Sampling(temperature=temperature),
        generator=torch.Generator().manual_seed(seed),
    )


def finish(engine, rows):
    """Let rows go through an engine together; return all that happened to each."""
    queues = [queue.Queue() for _ in rows]
    for one, where in zip(rows, queues, strict=True):
        engine.submit(one, where.put)
    told = []
    for where in queues:
        told.append([where.get(timeout=WAIT)])
        while told[-1][-1].what != "done":
            told[-1].append(where.get(timeout=WAIT))
    return told


ASKED = st.lists(
    st.tuples(
        st.integers(1, 3 * L + 1), st.integers(0, 2 * L), st.integers(0, 20), st.sampled_from([0.0, 1.0])
    ),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@settings(max_examples=12)
@given(asked=ASKED, portion=st.integers(1, 2 * L))
def test_rows_are_what_sessions_are_whoever_else_is_there(model, eviction, asked, portion):
    sleep = sleep_of(eviction)
    engine = Engine(model, sleep, portion=portion)
    engine.start()
    told = finish(engine, [row(model, p, b, s, t) for p, b, s, t in asked])
    engine.close(WAIT)
    for (prompt, budget, seed, temperature), events in zip(asked, told, strict=True):
        session, end = Session(model, sleep), events[-1].row
        if budget:
            out = session.generate(
                random_tokens(prompt, seed=seed), budget, temperature=temperature, seed=seed
            )
            assert end.answer.tokens == out
            assert sum(event.what == "wrote" for event in events) == len(out)
        else:
            session.read(random_tokens(prompt, seed=seed))
        assert end.error is None
        assert (end.stream.tokens, end.stream.sleeps) == (session.stats.tokens, session.stats.sleeps)
        for mine, alone in zip(end.stream.state.tensors(), session.stream.state.tensors(), strict=True):
            assert close(mine, alone)


@settings(max_examples=12)
@given(
    prompt=st.integers(1, 2 * L),
    budget=st.integers(1, 3 * L),
    debt=st.integers(1, 2 * L),
    seed=st.integers(0, 20),
)
def test_an_answer_that_slept_late_leaves_the_memory_of_one_that_slept_in_time(
    model, prompt, budget, debt, seed
):
    sleep = sleep_of()
    engine = Engine(model, sleep, debt=debt)
    engine.start()
    [events] = finish(engine, [row(model, prompt, budget, seed)])
    end = events[-1].row
    assert len(end.stream.window) <= L + debt
    late = settled(end, sleep)
    assert (late is None) == (len(end.stream.window) <= L)
    if late is not None:
        [events] = finish(engine, [late])
    engine.close(WAIT)
    session = Session(model, sleep)
    session.read(torch.cat([random_tokens(prompt, seed=seed), torch.tensor(end.answer.tokens)]))
    after = events[-1].row.stream
    assert (after.tokens, after.sleeps) == (session.stats.tokens, session.stats.sleeps)
    for mine, alone in zip(after.state.tensors(), session.stream.state.tensors(), strict=True):
        assert close(mine, alone)


class Poisoned:
    # A model of which one row breaks: a token that nobody else has makes NaN.

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def embed(self, tokens):
        h = self.model.embed(tokens)
        return h.masked_fill((tokens == VOCAB - 1)[..., None], float("nan"))


def test_a_row_that_breaks_harms_itself_alone(model):
    engine = Engine(Poisoned(model), sleep_of())
    engine.start()
    good = row(model, 7, 6)
    bad = Row(stream=good.stream, unread=torch.full((2 * L,), VOCAB - 1), budget=3)
    clean = Row(stream=good.stream, unread=good.unread % (VOCAB - 1), budget=6)
    first, second = finish(engine, [bad, clean])
    engine.close(WAIT)
    assert first[-1].row.error is not None
    assert second[-1].row.error is None
    assert len(second[-1].row.answer.tokens) == 6
    assert engine.counts.broken == 1


def test_a_model_that_raises_ends_the_request_and_not_the_engine(model):
    class Failing(Poisoned):
        def head(self, h):
            raise RuntimeError("of the model")

    engine = Engine(Failing(model), sleep_of())
    engine.start()
    for _ in range(2):
        [events] = finish(engine, [row(model, 3, 2)])
        assert str(events[-1].row.error) == "of the model"
    engine.close(WAIT)


def test_who_leaves_is_done_after_the_token_that_is_being_written(model):
    engine, events, written = Engine(model, sleep_of()), queue.Queue(), threading.Event()

    def tell(event):
        events.put(event)
        if event.what == "wrote":
            written.set()

    engine.start()
    request = engine.submit(row(model, 3, 10_000), tell)
    assert written.wait(WAIT)
    engine.leave(request)
    while (event := events.get(timeout=WAIT)).what != "done":
        assert event.what != "wrote" or len(event.row.unread) == 1  # what it tells of is there
    engine.close(WAIT)
    assert len(event.row.answer.tokens) < 10_000
    assert not len(event.row.unread)  # what was shown is read


def test_too_many_are_refused_and_so_is_everybody_once_it_closes(model):
    engine = Engine(model, sleep_of(), most_waiting=1)
    engine.submit(row(model, 3, 1), lambda event: None)  # not started: it waits
    with pytest.raises(Busy, match="1 requests"):
        engine.submit(row(model, 3, 1), lambda event: None)
    engine.start()
    engine.close(WAIT)
    assert engine.waiting == 0  # what had come was answered
    with pytest.raises(Closing):
        engine.submit(row(model, 3, 1), lambda event: None)


def test_a_row_that_changes_its_place_is_counted_all_the_while(model):
    # A server that drains ends once nothing is counted. Somebody counts just when a row is in no place.
    engine, counted = Engine(model, sleep_of()), []

    def count():
        counted.append((engine.waiting, sum(engine.states.values())))

    class Place(collections.deque):
        def remove(self, one):
            super().remove(one)
            counting = threading.Thread(target=count)
            counting.start()
            counting.join(0.02)

        def popleft(self):
            one = super().popleft()
            counting = threading.Thread(target=count)
            counting.start()
            counting.join(0.02)
            return one

    engine._active, engine._due = Place(), Place()
    engine.start()
    finish(engine, [row(model, 2 * L, 3)])
    engine.close(WAIT)
    assert len(counted) > 6
    # Threads that come late count when the row is done; none was missed before.
    done = counted.index((0, 0)) if (0, 0) in counted else len(counted)
    assert done > 1 and set(counted[:done]) == {(1, 1)} and set(counted[done:]) <= {(0, 0)}


def test_a_long_text_keeps_no_answer_waiting(model):
    # Between two tokens of an answer the other thread has a block at most, so the order of events shows it:
    # the answer is over long before the text is.
    engine = Engine(model, sleep_of())
    engine.start()
    order, done = [], threading.Semaphore(0)

    def tell(name):
        def told(event):
            if event.what == "done":
                order.append(name)
                done.release()

        return told

    engine.submit(row(model, 400 * L, 0), tell("text"))
    engine.submit(row(model, 2, 12), tell("answer"))
    for _ in range(2):
        assert done.acquire(timeout=WAIT)
    engine.close(WAIT)
    assert order == ["answer", "text"]


def test_the_baton_goes_to_who_answers_first_and_is_held_by_one():
    baton, order, holders = Baton(), [], []

    def sleeper():
        with baton.to_sleep():
            began.set()
            for _ in range(1000):
                holders.append(1)
                assert len(holders) == 1
                holders.pop()
                baton.offer()
            order.append("slept")

    def answerer():
        with baton.to_answer():
            holders.append(1)
            assert len(holders) == 1
            order.append("answered")
            holders.pop()

    began = threading.Event()
    threads = [threading.Thread(target=sleeper), threading.Thread(target=answerer)]
    threads[0].start()
    assert began.wait(WAIT)
    threads[1].start()
    for thread in threads:
        thread.join(WAIT)
    assert sorted(order) == ["answered", "slept"]


def test_giving_way_changes_no_bit(model):
    tokens, sleep = random_tokens(2, 3 * L), sleep_of()
    baton = Baton()
    with baton.to_sleep():
        mine = Session(GivingWay(model, baton), sleep)
        mine.read(tokens[0])
    alone = Session(model, sleep)
    alone.read(tokens[0])
    for one, other in zip(mine.stream.state.tensors(), alone.stream.state.tensors(), strict=True):
        assert torch.equal(one, other)


def test_every_sleep_is_told_before_it_begins(model):
    engine = Engine(model, sleep_of())
    engine.start()
    [events] = finish(engine, [row(model, 3 * L + 1, 2)])
    engine.close(WAIT)
    told = [event.what for event in events]
    assert told[:6] == ["sleeping", "slept"] * 3  # nobody takes the silence of a sleep for an end
    assert "sleeping" not in told[6:]
