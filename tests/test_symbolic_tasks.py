import numpy as np
import pytest
import torch

from lmsleep.tasks import MQAR, GSMSymbolic, Variables, WordProblem, batch_rng
from lmsleep.tasks.word_problem import multiplication_table

SIZE = 400


def draw(task, size=SIZE, level=1.0, index=0, split="train"):
    return task.batch(batch_rng(0, split, index), size, split, level)


@pytest.mark.parametrize("group", ["S5", "A5", "A4xZ5", "Z60", "S3"])
def test_tables_are_groups(group):
    table = multiplication_table(group)
    n = len(table)
    assert n == {"S5": 120, "S3": 6}.get(group, 60)
    assert (table[0] == np.arange(n)).all() and (table[:, 0] == np.arange(n)).all()
    for axis in (0, 1):
        assert (np.sort(table, axis=axis) == np.expand_dims(np.arange(n), 1 - axis)).all()  # Latin square
    a, b, c = np.random.default_rng(0).integers(0, n, (3, 2000))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()


def commutators(table: np.ndarray, elements: set[int]) -> set[int]:
    inverse = (table == 0).argmax(axis=1)
    found = {int(table[table[a, b], table[inverse[a], inverse[b]]]) for a in elements for b in elements}
    while True:  # the subgroup they generate
        more = found | {int(table[a, b]) for a in found for b in found}
        if more == found:
            return found
        found = more


@pytest.mark.parametrize(
    ("group", "series"),
    [("S5", [120, 60, 60]), ("A5", [60, 60]), ("A4xZ5", [60, 4, 1]), ("Z60", [60, 1]), ("S3", [6, 3, 1])],
)
def test_derived_series_tell_the_solvable_groups(group, series):
    table = multiplication_table(group)
    elements = set(range(len(table)))
    sizes = [len(elements)]
    for _ in series[1:]:
        elements = commutators(table, elements)
        sizes.append(len(elements))
    assert sizes == series


@pytest.mark.parametrize(
    "task",
    [MQAR(pairs=12, queries=4), WordProblem(length=6, queries=3), Variables(queries=5), GSMSymbolic()],
    ids=str,
)
def test_layout(task):
    batch = draw(task)
    assert batch.context is not None and batch.context_row is not None
    assert len(batch.context) == SIZE and len(batch.tokens) == SIZE * task.queries
    assert torch.equal(batch.loss_mask, batch.answers >= 0)
    assert batch.loss_mask.sum(dim=1).tolist() == [1] * len(batch.tokens)  # the last token, and only it
    assert bool(batch.loss_mask[:, -1].all())
    assert torch.equal(batch.answers[:, -1], torch.arange(len(batch.tokens)))
    assert torch.equal(batch.context_row, torch.arange(SIZE).repeat_interleave(task.queries))


def test_mqar_keys_are_distinct_and_asked_once():
    task = MQAR(pairs=10, keys=20, values=5, queries=10)
    batch = draw(task)
    keys, values = batch.context[:, ::2], batch.context[:, 1::2]
    assert all(len(row.unique()) == 10 for row in keys)
    assert keys.max() < 20 <= values.min() and values.max() == 24
    assert torch.equal(batch.tokens[:, 0].view(SIZE, 10).sort().values, keys.sort().values)


def test_words_are_uniform_and_so_are_their_products():
    task = WordProblem(group="A5", length=5, queries=5)
    batch = draw(task, size=4000)
    for tokens in (batch.context.flatten(), batch.tokens[:, 1]):
        counts = np.bincount(tokens.numpy(), minlength=60)
        expected = len(tokens) / 60
        assert ((counts - expected) ** 2 / expected).sum() < 110  # chi-square, 59 degrees of freedom


def test_held_out_words_are_never_trained_on():
    task = WordProblem(group="S3", length=4, queries=4, held_out_words=True)
    of = {
        split: {tuple(word) for word in draw(task, size=4000, split=split).context.tolist()}
        for split in ("train", "test")
    }
    assert not of["train"] & of["test"]
    assert len(of["train"] | of["test"]) > 1200 and 120 < len(of["test"]) < 210  # of 1,296
    # By the whole word: what is held out has every element at every place.
    assert {e for word in of["test"] for e in enumerate(word)} == {(i, e) for i in range(4) for e in range(6)}


def test_every_hop_is_asked_for_and_values_are_distinct():
    task = Variables(chains=5, hops=4, queries=5)
    batch = draw(task)
    counts = torch.bincount(batch.difficulty)
    assert len(counts) == 5 and (counts - 400).abs().max() < 90
    digits = batch.context.view(SIZE, -1, 4)[:, :, 2]
    for row in digits:
        held = row[row < 13]
        assert len(held) == len(held.unique()) == 5
    names = batch.context.view(SIZE, -1, 4)[:, :, 0]
    assert all(len(row.unique()) == 25 for row in names)


def test_filler_follows_the_pairs_and_says_nothing():
    task = MQAR(pairs=6, keys=9, values=5, queries=6, filler=10)
    batch = draw(task)
    assert batch.context.shape == (SIZE, 2 * 6 + 10) and batch.context[:, 12:].min() >= 9
    assert len(batch.context[:, 12:].unique()) == 5
    bare = draw(MQAR(pairs=6, keys=9, values=5, queries=6))
    assert torch.equal(bare.context, batch.context[:, :12])  # the same pairs
    assert task.vocab_size == 14


@pytest.mark.parametrize(
    ("task", "highest"),
    [
        (MQAR(pairs=16, queries=2), 8),
        (WordProblem(length=16, queries=2), 8),
        (Variables(hops=6, chains=3), 3),
    ],
)
def test_level_caps_the_difficulty(task, highest):
    assert draw(task, level=0.5).difficulty.max() == highest
    assert draw(task, level=1.0).difficulty.max() == 2 * highest


@pytest.mark.parametrize("task", [MQAR(values=8), WordProblem(), Variables(chains=3)], ids=str)
def test_floors_by_simulation(task):
    batch = draw(task, size=3000)
    answer = batch.tokens[:, -1]
    best = torch.bincount(answer).max() / len(answer)
    assert abs(float(best) - task.floors()["constant"]) < 0.012
    if isinstance(task, Variables):
        digits = batch.context.view(3000, -1, 4)[:, :, 2]
        guess = torch.stack([row[row < 13][0] for row in digits]).repeat_interleave(task.queries)
        assert abs(float((guess == answer).float().mean()) - task.floors()["chance"]) < 0.03


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MQAR(pairs=0), r"^pairs must be at least 1, got 0"),
        (lambda: MQAR(pairs=65), r"^pairs=65 needs as many keys, got keys=64"),
        (lambda: MQAR(pairs=4), r"^queries=8 must not exceed pairs=4"),
        (lambda: MQAR(filler=-1), r"^filler must not be negative, got -1"),
        (lambda: WordProblem(group="S4"), r"^group must be one of 'S5', "),
        (lambda: WordProblem(length=0), r"^length must be at least 1, got 0"),
        (lambda: WordProblem(queries=17), r"^queries must lie in 1 ... length=16, got 17"),
        (
            lambda: WordProblem(group="S3", length=2, queries=1, held_out_words=True),
            r"^held_out_words: S3 has 36 words of length=2, too few to keep some for testing",
        ),
        (lambda: Variables(chains=11), r"^chains must lie in 1 ... 10"),
        (lambda: Variables(hops=-1), r"^hops must not be negative, got -1"),
        (lambda: Variables(hops=9), r"^names=26 cannot name chains x \(hops \+ 1\) = 40 variables"),
        (lambda: GSMSymbolic(ops=0), r"^ops must be at least 1 and noise not negative, got 0 and 24"),
        (lambda: GSMSymbolic(noise=57), r"^names=64 cannot name ops \+ noise = 65 variables"),
        (lambda: GSMSymbolic(queries=9), r"^queries must lie in 1 ... ops=8, got 9"),
        (lambda: Variables(queries=0), r"^queries must lie in 1 ... 16 variables, got 0"),
    ],
)
def test_an_impossible_option_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_equations_are_a_tree_with_one_number_and_noise_has_none():
    task = GSMSymbolic(ops=6, noise=10, queries=6)
    batch = draw(task)
    assert batch.context.shape == (SIZE, 4 * (6 + 9))  # the root of the noise has no equation
    for row in batch.context.view(SIZE, -1, 4).tolist():
        numbers = [right for _, _, right, _ in row if right < task.first_name]
        assert len(numbers) == 1 and 0 <= numbers[0] - task.zero <= 10
        defined = [left for left, _, _, _ in row]
        assert len(set(defined)) == 15 and len({n for left, _, n, _ in row if n not in defined}) == 2


def test_every_step_is_as_likely_and_depths_are_those_of_random_trees():
    task = GSMSymbolic(ops=8, noise=0, queries=8)
    batch = draw(task, size=1000)
    steps = batch.context.view(1000, -1, 4)[:, :, 1].flatten()
    counts = torch.bincount(steps) - torch.tensor([1000, 0, 0])  # the root's equation is a plain one
    assert (counts / 7000 - 1 / 3).abs().max() < 0.03
    expected = np.mean([sum(1 / i for i in range(1, node + 1)) for node in range(8)])  # harmonic numbers
    assert abs(float(batch.difficulty.double().mean()) - expected) < 0.05


def test_repeating_the_only_number_is_the_floor_to_beat():
    task = GSMSymbolic(ops=8, noise=0, queries=8)
    batch, floors = draw(task, size=2000), task.floors()
    equations = batch.context.view(2000, -1, 4)[:, :, 2]
    number = torch.stack([row[row < task.first_name][0] for row in equations]).repeat_interleave(8)
    hit = (batch.tokens[:, -1] == number).double()
    assert abs(float(hit.mean()) - floors["chance"]) < 0.02
    for h in range(5):
        assert abs(float(hit[batch.difficulty == h].mean()) - floors[f"chance h={h}"]) < 0.05
    best = torch.bincount(batch.tokens[:, -1]).max() / len(hit)
    assert abs(float(best) - floors["constant"]) < 0.015
