"""Every generated answer is found again by a solver that sees the tokens alone."""

import pytest

from lmsleep.tasks import (
    MQAR,
    Depo,
    GSMSymbolic,
    Rule110,
    Text,
    Variables,
    WordProblem,
    batch_rng,
    hide_answers,
)
from lmsleep.tasks.base import HIDDEN

TASKS = [
    Depo(nodes=30, hops=16),
    Depo(nodes=30, hops=16, ask="fork"),
    Depo(nodes=8, hops=4, queries=8, names=8, name_lengths=(1, 1), ask="fork", held_out_cycles=True),
    Depo(nodes=12, names=3, name_lengths=(5, 7)),
    Rule110(t=5),
    Rule110(t=3, boundary="zero", asked=24, states=1),
    Rule110(t=4, rule=30, asked=3),
    MQAR(),
    MQAR(pairs=1, queries=1, keys=2, values=1),
    MQAR(pairs=6, queries=6, values=7, filler=5),
    Depo(nodes=8, hops=4, names=9, name_lengths=(1, 1), queries=3, ask="fork", pad_to=40),
    *(WordProblem(group=group) for group in ("S5", "A5", "A4xZ5", "Z60", "S3")),
    WordProblem(length=1, queries=1),
    Variables(),
    Variables(chains=10, hops=0, queries=1),
    GSMSymbolic(),
    GSMSymbolic(ops=20, noise=2, queries=20),
    GSMSymbolic(ops=1, noise=0, queries=1),
]


@pytest.mark.parametrize("task", TASKS, ids=str)
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_solver_finds_every_answer(task, split):
    answers = 0
    for index in range(3):
        batch = task.batch(batch_rng(5, split, index), 200, split)
        for row in range(len(batch.tokens)):
            seen, expected = hide_answers(batch, row)
            assert seen.count(HIDDEN) == len(expected)
            assert task.solve(seen) == expected
            answers += len(expected)
    assert answers == sum(
        len(task.batch(batch_rng(5, split, index), 200, split).answers.unique()) - 1 for index in range(3)
    )


def test_the_next_byte_of_a_text_follows_from_nothing(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("words " * 200)
    task = Text(data=(path,), length=40)
    seen, expected = hide_answers(task.batch(batch_rng(0, "train", 0), 2, "train"), 0)
    assert len(expected) == seen.count(HIDDEN) == 39
    assert task.solve(seen) == []


def test_hidden_answers_leave_nothing_of_them_behind():
    task = Depo(nodes=9, names=50, name_lengths=(2, 2), queries=3, node_distribution="fixed")
    batch = task.batch(batch_rng(0, "train", 0), 20, "train")
    for row in range(20):
        seen, expected = hide_answers(batch, row)
        assert [len(answer) for answer in expected] == [2, 2, 2]
        assert len(seen) == batch.tokens.shape[1] - 3  # two tokens become one
