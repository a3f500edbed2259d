"""When a server sleeps: at once, after the answer, after a rest, and never later than its debt allows."""

import asyncio

import pytest
import torch
from conftest import VOCAB, close, lively, random_tokens, tiny

from lmsleep import Session, SleepConfig
from lmsleep.serve.engine import Engine
from lmsleep.serve.service import Service, Wanted, Written
from lmsleep.serve.store import Store
from lmsleep.text.chat import chat_of
from lmsleep.text.tokenizers import Words

L = 6
SLEEP = SleepConfig(window=L, passes=3)
WORDS = Words([chr(97 + i) for i in range(VOCAB)])
WAIT = 60


@pytest.fixture(scope="module")
def model():
    return lively(tiny("attention", "gated_delta_net", "attention"))


def talk(model, folder, turns, *, debt, sleep_after, debt_of="turn", pause=0.0, by_prefix=False):
    """Ask, go on from the answer, and so on; return what happened in each turn, and the stream in the end."""

    async def talking(service):
        told, kept, text = [], service.store.nothing(), random_tokens(0)
        for i, (length, longest) in enumerate(turns):
            prompt = random_tokens(length, seed=i)
            if by_prefix:
                kept, prompt = await service.prefix("me", torch.cat([text, prompt]))
            elif i:
                kept = await service.find("me", kept.id)
            written = Written(kept, prompt, 0)
            told.append([event.what async for event in service.write(written, Wanted(longest=longest))])
            kept = await service.keep("me", written)
            text = torch.cat([text, random_tokens(length, seed=i), torch.tensor(written.tokens)])
            await asyncio.sleep(pause)
        return told, await service.whole(await service.find("me", kept.id)), text

    store = Store(folder, model, SLEEP)
    engine = Engine(model, SLEEP, debt=debt, debt_of=debt_of)
    engine.start()
    service = Service(engine, store, WORDS, chat_of(WORDS), name="m", sleep_after=sleep_after)
    try:
        return asyncio.run(asyncio.wait_for(talking(service), WAIT))
    finally:
        engine.close(WAIT)
        store.close()


def as_session(model, text):
    session = Session(model, SLEEP)
    session.read(text)
    return session.stream


def same(mine, alone):
    assert (mine.tokens, mine.sleeps) == (alone.tokens, alone.sleeps)
    for one, other in zip(mine.state.tensors(), alone.state.tensors(), strict=True):
        assert close(one, other)


def test_without_debt_a_sleep_comes_in_the_answer(model, tmp_path):
    [told], kept, text = talk(model, tmp_path, [(L - 1, 4)], debt=0, sleep_after=0.0)
    assert told.index("sleeping") < told.index("slept") and "wrote" in told[told.index("slept") :]
    same(kept.stream, as_session(model, text))


@pytest.mark.parametrize("question", [L - 1, L + 2])
def test_with_debt_neither_question_nor_answer_waits_and_the_sleep_comes_after(model, tmp_path, question):
    [told], kept, text = talk(model, tmp_path, [(question, 4)], debt=L, sleep_after=0.0)
    assert set(told) == {"read", "wrote", "done"}
    same(kept.stream, as_session(model, text))  # once it is found again it has slept


def test_a_question_waits_for_the_sleep_on_what_it_asks_about_unless_it_may_be_late(model, tmp_path):
    [told], kept, text = talk(model, tmp_path, [(L + 2, 4)], debt=L, debt_of="answer", sleep_after=0.0)
    assert told.index("slept") < told.index("wrote") and told.count("slept") == 1
    [written] = torch.split(text[L + 2 :], 4)
    session = Session(model, SLEEP, WORDS)
    answer = session.generate(WORDS.decode(text[: L + 2].tolist()), max_new_tokens=4)
    assert WORDS.encode(answer) == written.tolist()
    same(kept.stream, as_session(model, text))


@pytest.mark.parametrize("by_prefix", [False, True])
def test_who_goes_on_within_the_rest_finds_all_in_sight(model, tmp_path, by_prefix):
    turns = [(L - 1, 4), (1, 1)]
    told, kept, _ = talk(model, tmp_path, turns, debt=L, sleep_after=WAIT, by_prefix=by_prefix)
    assert not {"sleeping", "slept"} & {*told[0], *told[1]}
    assert kept.stream.sleeps == 0 and len(kept.stream.window) == kept.stream.tokens > L


def test_no_rest_makes_a_debt_larger_than_it_may_be(model, tmp_path):
    turns = [(L - 1, 4), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1)]
    told, kept, text = talk(model, tmp_path, turns, debt=L, sleep_after=WAIT)
    # 9, 11 and 13 tokens, which are 12 too many for a debt of 6: then one window is slept on, and again.
    assert [("slept" in turn) for turn in told] == [False, False, True, False, False, True]
    # Where it has slept, it is what a session is that slept in time; what follows may still be in debt.
    begun = as_session(model, text[: kept.stream.sleeps * L + 1]).start
    for one, other in zip(kept.stream.start.tensors(), begun.tensors(), strict=True):
        assert close(one, other)


def test_who_rests_long_enough_has_slept(model, tmp_path):
    told, kept, text = talk(model, tmp_path, [(L - 1, 4), (1, 1)], debt=L, sleep_after=0.01, pause=0.5)
    assert not {"sleeping", "slept"} & {*told[0], *told[1]}
    assert kept.stream.sleeps == 1
    same(kept.stream, as_session(model, text))
