import math

import numpy as np
import pytest
import torch
from conftest import close, lively, tiny

from lmsleep import Cache, Memory, SleepConfig, State, sleep_forward
from lmsleep.evaluation import evaluate, mean_interval, wilson
from lmsleep.tasks import Batch, Depo, batch_rng
from lmsleep.tasks.reading import read_batch


class NextIsPlusOne:
    # Predicts token + 1 with probability 1/2 and shares the rest among the other seven tokens.

    num_blocks = 1

    def initial_state(self, batch_size):
        return State(Memory((None,)), Cache(((),)))

    def embed(self, tokens):
        return torch.nn.functional.one_hot((tokens + 1) % 8, 8).double()

    def run(self, h, state, start, stop, *, valid=None, span=None):
        return h, state

    def head(self, h):
        return torch.where(h > 0, math.log(7.0), 0.0)


class Fixed:
    # Difficulty 1: answers 0 (right) and 1 (its second token is wrong); 2: answer 2 (right); 4: never asked.

    vocab_size = 8

    def batch(self, rng, size, split, level=1.0):
        assert split == "test"
        return Batch(
            tokens=torch.tensor([[0, 1, 2, 3, 4], [3, 4, 6, 2, 3]]),
            loss_mask=torch.tensor([[0, 1, 1, 1, 0], [0, 1, 1, 0, 1]]).bool(),
            answers=torch.tensor([[-1, -1, 0, 0, -1], [-1, 1, 1, -1, 2]]),
            difficulty=torch.tensor([1, 1, 2, 4]),
        )


@pytest.mark.parametrize("batches", [1, 3])
def test_score_by_hand(batches):
    score = evaluate(NextIsPlusOne(), Fixed(), SleepConfig(window=3), batches=batches)
    assert score.correct == {1: batches, 2: batches}
    assert score.total == {1: 2 * batches, 2: batches}
    assert score.accuracy == 2 / 3
    assert score.per_difficulty == {1: 1 / 2, 2: 1.0}
    # Six predicted tokens: five have probability 1/2, one (6 after 4) has 1/14. Behind the window of
    # three, only the last token of row 1 is predicted.
    assert score.tokens == {"all": 6 * batches, "after_eviction": batches}
    assert math.isclose(score.bits(), (5 + math.log2(14)) / 6, rel_tol=1e-6)
    assert math.isclose(score.bits("after_eviction"), 1.0, rel_tol=1e-6)
    # Two tokens of each answer of difficulty 1, one of difficulty 2.
    assert score.loss_per_difficulty == pytest.approx(
        {1: (3 * math.log(2) + math.log(14)) / 4, 2: math.log(2)}, rel=1e-6
    )
    assert score.to_dict() == {
        "accuracy": 2 / 3,
        "per_difficulty": {"1": 0.5, "2": 1.0},
        "loss_per_difficulty": {str(key): loss for key, loss in score.loss_per_difficulty.items()},
        "answers": {"1": 2 * batches, "2": batches},
        "answer_tokens": {str(key): count for key, count in score.answer_tokens.items()},
        "bits": score.bits(),
        "bits_after_eviction": score.bits("after_eviction"),
    }


def test_nothing_comes_after_an_eviction_without_one():
    score = evaluate(NextIsPlusOne(), Fixed(), SleepConfig(window=None), batches=1)
    assert score.tokens["after_eviction"] == 0
    assert math.isnan(score.bits("after_eviction"))
    assert score.to_dict()["bits_after_eviction"] is None


FORK = Depo(nodes=6, names=4, hops=3, queries=3, ask="fork")
BLOCK = Depo(nodes=6, names=4, hops=3, queries=3)
SLEEP = SleepConfig(window=8, passes=2)


def model_for(task):
    return lively(tiny("attention", "gated_delta_net", vocab_size=task.vocab_size))


@pytest.mark.parametrize("task", [FORK, BLOCK], ids=["fork", "block"])
def test_evaluation_is_reproducible(task):
    model = model_for(task)
    options = {"batches": 2, "batch_size": 16}
    first = evaluate(model, task, SLEEP, **options)
    torch.rand(3)
    np.random.default_rng().random()
    assert evaluate(model, task, SLEEP, **options) == first
    assert evaluate(model, task, SLEEP, seed=1, **options) != first
    assert sum(first.total.values()) == 2 * 16 * 3
    assert all(p.grad is None for p in model.parameters())


def test_evaluation_uses_the_given_sleep():
    model = model_for(BLOCK)
    bits = {
        N: evaluate(model, BLOCK, SleepConfig(window=8, passes=N), batches=1, batch_size=16).bits()
        for N in (1, 2, 3)
    }
    assert len(set(bits.values())) == 3


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_questions_fork_the_memory_of_their_context(eviction):
    model, sleep = model_for(FORK), SleepConfig(window=8, passes=2, eviction=eviction)
    batch = FORK.batch(batch_rng(0, "test", 0), 4, "test")
    out = read_batch(model, batch, sleep, return_logits=True)
    for row, graph in enumerate(batch.context_row.tolist()):
        context = sleep_forward(model, batch.context[[graph]], None, sleep, evict_last=True)
        alone = sleep_forward(model, batch.tokens[[row]], None, sleep, state=context.state)
        assert close(out.logits[[row]], alone.logits[:, :-1])
    assert read_batch(model, batch, sleep).logits is None


def test_answers_to_forked_questions_all_come_after_an_eviction():
    score = evaluate(model_for(FORK), FORK, SLEEP, batches=1, batch_size=16)
    assert score.tokens["after_eviction"] == score.tokens["all"] > 0


def test_samples_are_those_of_the_split_that_is_named(monkeypatch):
    asked, batch = set(), Depo.batch

    def drawn(self, rng, size, split, level=1.0):
        asked.add(split)
        return batch(self, rng, size, split, level)

    monkeypatch.setattr(Depo, "batch", drawn)
    scores = [
        evaluate(model_for(FORK), FORK, SLEEP, batches=1, batch_size=16, **which).to_dict()
        for which in ({}, {"split": "test"}, {"split": "train"})
    ]
    assert scores[0] == scores[1] != scores[2] and asked == {"test", "train"}


# Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 17 (1998),
# table I, method 3 (the score interval).
@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(correct, total, low, high):
    interval = wilson(correct, total)
    assert [round(x, 4) for x in interval] == [low, high]
    mirrored = wilson(total - correct, total)
    assert np.allclose(mirrored, (1 - interval[1], 1 - interval[0]), rtol=0, atol=1e-12)


def test_wilson_of_nothing_says_nothing():
    assert wilson(0, 0) == (0.0, 1.0)


def test_mean_interval_by_hand():
    # mean 3, standard deviation sqrt(2.5), t(4) = 2.776: 2.776 * sqrt(2.5) / sqrt(5) = 1.96293
    mean, low, high = mean_interval([1, 2, 3, 4, 5])
    assert mean == 3.0
    assert math.isclose(high - 3, 1.96293, abs_tol=1e-5)
    assert math.isclose(3 - low, 1.96293, abs_tol=1e-5)


# Quantiles of Student's t from a printed table.
@pytest.mark.parametrize(("n", "t"), [(2, 12.706), (3, 4.303), (10, 2.262), (11, 2.228), (31, 2.042)])
def test_mean_interval_uses_students_t(n, t):
    values = [float(i % 2) for i in range(n)]
    _, low, high = mean_interval(values)
    half = t * np.std(values, ddof=1) / math.sqrt(n)
    assert math.isclose((high - low) / 2, half, rel_tol=5e-4)


def test_one_value_has_no_interval():
    mean, low, high = mean_interval([0.25])
    assert mean == 0.25
    assert math.isnan(low)
    assert math.isnan(high)
