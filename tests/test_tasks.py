import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmsleep.tasks import (
    MQAR,
    TASKS,
    Batch,
    Depo,
    Drift,
    GSMInfinite,
    GSMSymbolic,
    Recall,
    Rule110,
    Text,
    Variables,
    WordProblem,
    batch_rng,
)
from lmsleep.tasks.rule110 import SEP, automaton


def draw(task, size: int = 64, split: str = "train", *, index: int = 0, seed: int = 0, level: float = 1.0):
    return task.batch(batch_rng(seed, split, index), size, split, level)


def same(a: Batch, b: Batch) -> bool:
    pairs = [(getattr(a, name), getattr(b, name)) for name in vars(a)]
    return all(x is y if x is None or y is None else torch.equal(x, y) for x, y in pairs)


def chi_square(counts, probabilities) -> float:
    expected = np.asarray(probabilities) * np.sum(counts)
    return float(((np.asarray(counts) - expected) ** 2 / expected).sum())


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "document.txt"
    words = np.random.default_rng(0).integers(0, 1000, 600)
    path.write_text(" ".join(f"{word:03d}" for word in words))
    return path


@pytest.fixture
def tasks(document):
    return [
        Depo(nodes=20),
        Depo(nodes=20, ask="fork"),
        Rule110(),
        MQAR(),
        WordProblem(),
        Variables(),
        Drift(),
        GSMInfinite(subset="medium", ops=(2, 3), length=(0, 200)),
        GSMSymbolic(),
        Recall(kinds=("facts", "hops", "documents", "problems", "prose")),
        Text(data=(document,), length=40),
    ]


# Streams


def test_a_batch_is_a_function_of_seed_split_and_index(tasks):
    for task in tasks:
        assert same(draw(task), draw(task))
        assert not same(draw(task), draw(task, index=1))
        assert not same(draw(task), draw(task, seed=1))
        assert not same(draw(task, split="test"), draw(task))


@given(
    a=st.tuples(st.integers(0, 9), st.booleans(), st.integers(0, 9)),
    b=st.tuples(st.integers(0, 9), st.booleans(), st.integers(0, 9)),
)
def test_streams_are_equal_only_for_equal_arguments(a, b):
    first, second = (
        batch_rng(seed, "test" if test else "train", index).integers(0, 2**62, 4).tolist()
        for seed, test, index in (a, b)
    )
    assert (first == second) == (a == b)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_named(seed):
    with pytest.raises(ValueError, match="seed must lie in"):
        batch_rng(seed, "train", 0)


def test_every_task_is_listed():
    assert {
        "depo": Depo,
        "rule110": Rule110,
        "mqar": MQAR,
        "word-problem": WordProblem,
        "variables": Variables,
        "drift": Drift,
        "gsm-infinite": GSMInfinite,
        "gsm-symbolic": GSMSymbolic,
        "recall": Recall,
        "text": Text,
    } == TASKS


def test_tokens_fit_the_vocabulary_and_answers_lie_in_the_loss(tasks):
    for task in tasks:
        for split in ("train", "test"):
            batch = draw(task, split=split)
            assert batch.tokens.min() >= 0
            assert batch.tokens.max() < task.vocab_size
            assert not (batch.answers >= 0)[~batch.loss_mask].any()
            assert not batch.loss_mask[:, 0].any()  # nothing precedes the first token


def test_num_tokens_counts_a_shared_context_once():
    batch = draw(Depo(nodes=20, queries=5, ask="fork"), size=3)
    assert batch.num_tokens == 3 * 80 + batch.tokens.numel()
    assert draw(Rule110(), size=3).num_tokens == 3 * (4 * 24 + 1 + 4)


# Rule 110


def brute_force_automaton(cells: list[int], steps: int, rule: int, boundary: str) -> list[int]:
    for _ in range(steps):
        new = []
        for i in range(len(cells)):
            left = cells[i - 1] if i > 0 else (cells[-1] if boundary == "ring" else 0)
            right = cells[i + 1] if i + 1 < len(cells) else (cells[0] if boundary == "ring" else 0)
            new.append(int(f"{rule:08b}"[7 - int(f"{left}{cells[i]}{right}", 2)]))
        cells = new
    return cells


def test_rule_110_is_the_published_table():
    published = {"111": 0, "110": 1, "101": 1, "100": 0, "011": 1, "010": 1, "001": 1, "000": 0}
    for neighbours, cell in published.items():
        assert automaton(np.array([[int(c) for c in neighbours]]), 1)[0, 1] == cell


@given(
    width=st.integers(1, 9), t=st.integers(1, 6), rule=st.integers(0, 255), asked=st.integers(1, 9),
    boundary=st.sampled_from(["ring", "zero"]), states=st.integers(1, 3), level=st.sampled_from([0.3, 1.0]),
)  # fmt: skip
def test_labels_follow_from_the_initial_states_in_the_tokens(width, t, rule, asked, boundary, states, level):
    asked = min(asked, width)
    task = Rule110(width=width, states=states, t=t, rule=rule, boundary=boundary, asked=asked)
    batch, steps = draw(task, 5, level=level), max(1, int(np.ceil(level * t)))
    for tokens, mask in zip(batch.tokens.tolist(), batch.loss_mask.tolist(), strict=True):
        groups = [tokens[i * width : (i + 1) * width] for i in range(states)]
        expected = [
            cell for cells in groups for cell in brute_force_automaton(cells, steps, rule, boundary)[:asked]
        ]
        assert tokens == [cell for cells in groups for cell in cells] + [SEP] + expected
        assert mask == [False] * (states * width + 1) + [True] * (states * asked)
    assert batch.difficulty.tolist() == [steps] * 5
    for row in range(5):
        assert set(batch.answers[row][batch.loss_mask[row]].tolist()) == {row}


@pytest.mark.parametrize("t", [1, 30])
def test_inputs_are_states_without_history(t):
    # After a step of rule 110 cells are biased and neighbours depend on each other; fair bits are neither.
    cells = draw(Rule110(t=t), 500).tokens[:, :96].reshape(-1, 3)
    counts = np.bincount((4 * cells[:, 0] + 2 * cells[:, 1] + cells[:, 2]).numpy(), minlength=8)
    assert chi_square(counts, np.full(8, 1 / 8)) < 29.9  # 99.99 % of a fair coin's, 7 degrees of freedom
    evolved = automaton(cells.numpy().reshape(-1, 24), 1).reshape(-1, 3)
    assert chi_square(np.bincount(evolved @ [4, 2, 1], minlength=8), np.full(8, 1 / 8)) > 100


def test_constant_floor_is_that_of_the_better_bit():
    task = Rule110(width=10, states=1, t=3)
    every_state = [[i >> bit & 1 for bit in range(10)] for i in range(1024)]
    ones = np.mean([brute_force_automaton(cells, 3, 110, "ring")[0] for cells in every_state])
    assert abs(task.floors()["constant"] - max(ones, 1 - ones)) < 5 * 0.5 / np.sqrt(4096)
    assert Rule110(states=2, asked=3).floors()["chance"] == 1 / 64


@pytest.mark.parametrize(
    "change",
    [
        {"width": 0}, {"states": 0}, {"t": 0}, {"rule": 256}, {"rule": -1}, {"asked": 25}, {"asked": 0},
        {"boundary": "torus"},
    ],
)  # fmt: skip
def test_invalid_rule110_options_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Rule110(**change)


# Depo


def words_of(tokens: list[int], names: int) -> list[tuple[int, ...]]:
    # A word ends with its first token from the second alphabet.
    words, word = [], []
    for token in tokens:
        assert 1 <= token <= 2 * names
        word.append(token)
        if token > names:
            words.append(tuple(word))
            word = []
    assert not word
    return words


def successors(context: list[int], names: int) -> dict:
    real = context[next(i for i, token in enumerate(context) if token) :]
    words = words_of(real, names)
    after = dict(zip(words[::2], words[1::2], strict=True))
    assert len(after) == len(words) / 2  # nobody has two successors
    return after


def follow(after: dict, node: tuple, hops: int) -> tuple:
    for _ in range(hops):
        node = after[node]
    return node


def cycle_of(after: dict) -> tuple:
    # The same tuple for every rotation of a cycle; one that misses a node is not one cycle.
    start = node = min(after)
    cycle = [start]
    while (node := after[node]) != start:
        cycle.append(node)
    assert len(cycle) == len(after)
    return tuple(cycle)


def solve(task: Depo, context: list[int], questions: list[int]) -> tuple[list[bool], list[int], int, int]:
    # Answers every question from the tokens alone; returns the loss mask and answer numbers they imply
    # (counted from 0), the nodes of the cycle and the hops asked.
    after, marker = successors(context, task.names), 2 * task.names + 1
    cycle_of(after)
    mask, number, hops, starts = [], [], [], []
    questions = [t for t in questions if t]
    while questions:
        assert questions[0] > marker
        hops.append(questions.pop(0) - marker)
        end = next(i for i, t in enumerate(questions) if t > task.names) + 1
        start, questions = tuple(questions[:end]), questions[end:]
        starts.append(start)
        mask += [False] * (1 + len(start))
        number += [-1] * (1 + len(start))
        if task.ask == "block":
            assert questions.pop(0) == marker
            mask.append(True)
            number.append(-1)
        answer = follow(after, start, hops[-1])
        assert tuple(questions[: len(answer)]) == answer
        questions = questions[len(answer) :]
        mask += [True] * len(answer)
        number += [len(hops) - 1] * len(answer)
    assert len(set(starts)) == len(starts)
    return mask, number, len(after), hops


def padded(values: list, length: int, fill) -> list:
    return values + [fill] * (length - len(values))


DEPO = {
    "default": Depo(),
    "small": Depo(nodes=4, names=4, hops=3, queries=3, name_lengths=(1, 1)),
    "long names": Depo(nodes=9, names=3, hops=5, queries=2, name_lengths=(2, 4)),
    "more questions than nodes": Depo(nodes=5, names=10, queries=8, hops=9),
    "padded": Depo(nodes=6, names=8, hops=3, queries=3, name_lengths=(1, 1), pad_to=30),
    "fixed": Depo(nodes=20, node_distribution="fixed", test_hops="all"),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("task", DEPO.values(), ids=DEPO)
def test_depo_answers_follow_from_the_tokens(task, split):
    batch, C = draw(task, 24, split), task.context_length
    asked_in_all = 0
    per_graph = len(batch.difficulty) // 24
    for row, tokens in enumerate(batch.tokens.tolist()):
        mask, number, nodes, hops = solve(task, tokens[:C], tokens[C:])
        assert nodes == task.nodes or (split == "train" and 3 <= nodes < task.nodes)
        assert nodes == task.nodes or task.node_distribution == "depo"
        assert len(hops) == min(task.queries, nodes)
        T = len(tokens) - C
        number = [n if n < 0 else n + row * per_graph for n in number]
        assert batch.loss_mask[row].tolist() == [False] * C + padded(mask, T, False)
        assert batch.answers[row].tolist() == [-1] * C + padded(number, T, -1)
        assert batch.difficulty[row * per_graph :][: len(hops)].tolist() == hops
        asked_in_all += len(hops)
    assert len(batch.answers.unique()) - 1 == asked_in_all


@pytest.mark.parametrize("split", ["train", "test"])
def test_depo_forks_ask_each_question_alone(split):
    task = Depo(nodes=12, names=20, hops=6, queries=5, ask="fork", node_distribution="fixed")
    batch = draw(task, 16, split)
    assert batch.context_row.tolist() == [graph for graph in range(16) for _ in range(5)]
    starts = set()
    for row, tokens in enumerate(batch.tokens.tolist()):
        context = batch.context[batch.context_row[row]].tolist()
        mask, number, nodes, hops = solve(task, context, tokens)
        assert nodes == 12
        assert len(hops) == 1
        assert batch.loss_mask[row].tolist() == padded(mask, len(tokens), False)
        assert batch.answers[row].tolist() == padded([n if n < 0 else row for n in number], len(tokens), -1)
        assert batch.difficulty[row] == hops[0]
        starts.add((batch.context_row[row].item(), *words_of([t for t in tokens if 0 < t <= 40], 20)[0]))
    assert len(starts) == 80  # the questions about a graph start at different nodes


def test_the_paper_budget_is_360_tokens_in_windows_of_75():
    for split in ("train", "test"):
        batch = draw(Depo(), 8, split)
        assert batch.tokens.shape[1] == 360
        assert (batch.tokens[:, 300] > 101).all()  # the answer window begins with a HOP, which has no loss


def count_nodes(batch: Batch, task: Depo) -> np.ndarray:
    context = batch.tokens[:, : task.context_length]
    ends = (context > task.names) & (context <= 2 * task.names)
    return ends.sum(1).numpy() // 2


@pytest.mark.parametrize(("nodes", "hops", "test_hops"), [(8, 9, "all"), (4, 4, "all"), (6, 16, "powers")])
def test_a_reader_that_chains_nothing_reaches_the_one_hop_floor(nodes, hops, test_hops):
    task = Depo(
        nodes=nodes,
        hops=hops,
        queries=nodes,
        names=nodes,
        name_lengths=(1, 1),
        test_hops=test_hops,
        ask="fork",
    )
    batch, rng = draw(task, size=600, split="test"), np.random.default_rng(0)
    hits: dict[int, list[bool]] = {}
    for row in range(len(batch.tokens)):
        context, (hop, start, answer), _ = batch.row(row)
        after = dict(zip(context[::2], context[1::2], strict=True))
        before = {b: a for a, b in after.items()}
        k = hop - task.ans
        known = {0: start, 1: after[start], nodes - 1: before[start]}
        # What it was told of the start, by k around the cycle; else anything but these three.
        others = [node for node in after if node not in known.values()]
        said = known.get(k % nodes) or int(rng.choice(others))
        hits.setdefault(k, []).append(said == answer)
    floors = task.floors()
    for k, found in hits.items():
        floor = floors[f"one hop k={k}"]
        assert abs(np.mean(found) - floor) <= 4 * np.sqrt(floor * (1 - floor) / len(found))
    every = [hit for found in hits.values() for hit in found]
    assert abs(np.mean(every) - floors["one hop"]) < 4 * 0.5 / np.sqrt(len(every))
    assert {f"one hop k={k}" for k in range(1, hops + 1)} <= floors.keys()


def test_training_graphs_are_drawn_by_the_depo_weights():
    task = Depo()
    nodes = np.concatenate([count_nodes(draw(task, 500, index=i), task) for i in range(32)])
    weight = 1 / (np.arange(3, 76) + np.sqrt(75))
    weight /= weight.sum()
    assert abs((weight * np.arange(3, 76)).sum() - 27.5) < 0.05  # the published mean
    assert abs(nodes.mean() - 27.5) < 4 * nodes.std() / np.sqrt(len(nodes))
    counts = np.bincount(nodes, minlength=76)[3:]
    edges = range(0, 73, 8)
    assert chi_square(np.add.reduceat(counts, edges), np.add.reduceat(weight, edges)) < 35.6  # 99.99 %, 9
    assert (count_nodes(draw(task, 100, "test"), task) == 75).all()


def test_short_names_run_out_as_in_the_original_task():
    contexts = draw(Depo(), 300, "test").tokens[:, :300].tolist()
    one_token = [sum(len(word) == 1 for word in successors(context, 50)) for context in contexts]
    assert abs(np.mean(one_token) - 29.9) < 5 * np.std(one_token) / np.sqrt(300)


@pytest.mark.parametrize(
    ("hops", "kind", "expected"),
    [
        (16, "powers", [1, 2, 4, 8, 16]),
        (6, "powers", [1, 2, 4, 6]),
        (6, "all", [1, 2, 3, 4, 5, 6]),
        (1, "powers", [1]),
    ],
)
def test_test_hops(hops, kind, expected):
    task = Depo(nodes=10, hops=hops, test_hops=kind)
    assert draw(task, 200, "test").difficulty.unique().tolist() == expected


@pytest.mark.parametrize(("level", "longest"), [(1e-9, 1), (0.25, 4), (0.26, 5), (1.0, 16)])
def test_the_level_caps_the_hops_of_training(level, longest):
    batch = draw(Depo(nodes=20, node_distribution="fixed"), 400, level=level)
    counts = np.bincount(batch.difficulty.numpy(), minlength=17)[1:]
    assert counts[longest:].sum() == 0
    limit = 27.9 + 2.5 * longest  # beyond 99.99 % for up to 15 degrees of freedom
    assert chi_square(counts[:longest], np.full(longest, 1 / longest)) < limit


def drawn_cycles(task: Depo, split: str, graphs: int) -> Counter:
    size = 1000
    return Counter(
        cycle_of(successors(context, task.names))
        for index in range(graphs // size)
        for context in draw(task, size, split, index=index).tokens[:, : task.context_length].tolist()
    )


def test_held_out_cycles_never_occur_in_training():
    # Seven names make 6! = 720 cycles of seven nodes.
    options = {"nodes": 7, "names": 7, "name_lengths": (1, 1), "queries": 1, "held_out_cycles": True}
    test = drawn_cycles(Depo(**options), "test", 2000)
    train = drawn_cycles(Depo(**options, node_distribution="fixed"), "train", 8000)
    assert not set(test) & set(train)
    assert len(set(test) | set(train)) == 720
    assert 60 <= len(test) <= 120  # about 720 / 8
    assert chi_square(list(test.values()), np.full(len(test), 1 / len(test))) < 2 * len(test)
    shorter = drawn_cycles(Depo(**options), "train", 2000)
    assert not set(test) & set(shorter)
    assert {len(cycle) for cycle in shorter} == {3, 4, 5, 6, 7}


@pytest.mark.timeout(10)
@pytest.mark.parametrize("nodes", [3, 4, 5])
def test_holding_out_needs_enough_cycles(nodes):
    # So few cycles that perhaps none falls into the test part: a clear error, no endless search.
    options = {"nodes": nodes, "names": nodes, "name_lengths": (1, 1), "queries": 1}
    try:
        task = Depo(**options, held_out_cycles=True)
        cycles = [drawn_cycles(task, split, 1000) for split in ("train", "test")]
    except ValueError as error:
        assert "held_out_cycles" in str(error)
    else:
        assert not set(cycles[0]) & set(cycles[1])


@pytest.mark.parametrize(
    "change",
    [
        {"nodes": 2}, {"hops": 0}, {"queries": 0}, {"name_lengths": (0, 1)}, {"name_lengths": (3, 2)},
        {"name_lengths": (1, 9)}, {"names": 8}, {"queries": 76, "ask": "fork"},
        {"node_distribution": "uniform"}, {"test_hops": "some"}, {"ask": "twice"}, {"pad_to": 299},
    ],
)  # fmt: skip
def test_invalid_depo_options_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Depo(**change)


# Text


def test_text_is_cut_from_the_file(document):
    data, task = document.read_bytes(), Text(data=(document,), length=40)
    cut = len(data) - len(data) // 10
    for split, part in (("train", data[:cut]), ("test", data[cut:])):
        batch = draw(task, 200, split)
        excerpts = [bytes(row) for row in batch.tokens.tolist()]
        assert all(excerpt in part for excerpt in excerpts)
        starts = [part.find(excerpt) for excerpt in excerpts]
        assert min(starts) < len(part) / 10
        assert max(starts) > len(part) - 40 - len(part) / 10


def test_held_out_text_is_never_trained_on(tmp_path):
    path = tmp_path / "parts"
    path.write_bytes(b"a" * 900 + b"b" * 100)
    task = Text(data=(path,), length=20)
    assert set(draw(task, 200, "train").tokens.unique().tolist()) == {ord("a")}
    assert set(draw(task, 200, "test").tokens.unique().tolist()) == {ord("b")}
    assert task.floors() == {"chance": 1 / 256, "constant": 1.0}


def test_documents_are_drawn_by_their_length(tmp_path):
    paths = []
    for letter, size in (("a", 1000), ("b", 3000), ("c", 30)):
        paths.append(tmp_path / letter)
        paths[-1].write_bytes(letter.encode() * size)
    rows = draw(Text(data=tuple(paths), length=50), 2000).tokens
    assert (rows == rows[:, :1]).all()  # no excerpt crosses from one document to another
    shares = np.bincount(rows[:, 0].numpy() - ord("a"), minlength=3)
    assert shares[2] == 0  # too short for one excerpt
    assert chi_square(shares[:2], np.array([851, 2651]) / 3502) < 15.2


def test_text_is_shown_as_it_was_written(tmp_path):
    path = tmp_path / "text"
    path.write_text("Schlaf, überall 眠り. " * 40, encoding="utf-8")
    task = Text(data=(path,), length=30)
    batch = draw(task, 20)
    for row in range(20):
        # A letter that the excerpt cuts in two is shown as escaped bytes.
        shown = re.sub(
            rb"\\x([0-9a-f]{2})",
            lambda m: bytes.fromhex(m[1].decode()),
            task.spell(batch.tokens[row].tolist()).encode(),
        )
        assert shown == bytes(batch.tokens[row].tolist())
        assert shown in path.read_bytes()


def test_every_byte_after_the_first_is_an_answer_of_its_own(document):
    batch = draw(Text(data=(document,), length=12), 3)
    assert batch.loss_mask.tolist() == [[False] + [True] * 11] * 3
    numbers = batch.answers[:, 1:].flatten()
    assert len(numbers.unique()) == 33
    assert batch.difficulty[numbers].tolist() == [0] * 33


@pytest.mark.parametrize(
    ("content", "length", "message"),
    [
        (b"x" * 100, 11, r"data.*100 bytes.*at most 9"),
        (b"", 2, "data"),
        (None, 10, r"data.*document\.txt"),
        (b"x" * 100, 1, "length"),
    ],
)
def test_text_that_cannot_be_cut_is_refused(tmp_path, content, length, message):
    path = tmp_path / "document.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        draw(Text(data=(path,), length=length), 1)


def test_text_needs_a_file():
    with pytest.raises(ValueError, match="data"):
        Text()
