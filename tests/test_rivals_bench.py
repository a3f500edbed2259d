"""The bench of rivals: equal bytes, equal FLOPs, choices out of the committed search."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lmsleep.backbones import build
from lmsleep.recipes import GROUPS, RECIPES, rivals
from lmsleep.recipes import costs as measuring
from lmsleep.recipes import run as command
from lmsleep.recipes.costs import costs
from lmsleep.recipes.rivals import BENCHES, HEADS, METHODS, Found, budget, bytes_of, run
from lmsleep.recipes.run import ReproduceOptions
from lmsleep.recipes.searched import LONGER, RATES
from lmsleep.sleep import Compact, SleepConfig
from lmsleep.tasks import batch_rng
from lmsleep.training import RunFolder, Trainer, training_flops

MQAR = BENCHES["mqar"]
RESULTS = Path(__file__).parents[1] / "results"
SEARCH = RESULTS / "rivals-search"


@pytest.fixture
def measured(monkeypatch):
    """Measure what an untrained method keeps and costs."""
    monkeypatch.setattr(measuring, "REPEATS", 1)

    def measure(method, share, sleep=None):
        config = run(MQAR, method, share, Found(), flops=1)
        if config is None:
            return None
        config = replace(config, sleep=sleep or config.sleep)
        return costs(build(config.model), config)

    return measure


@pytest.mark.parametrize("method", [name for name in METHODS if name not in rivals.FREE])
def test_a_method_keeps_its_share_of_the_bytes_and_no_more(method, measured):
    for share in HEADS:
        found = measured(method, share)
        if found is None:  # half of so few bytes hold no key
            assert (method, share) == ("N = 4, half of it keys", "1/4")
        else:
            assert 0.7 * bytes_of(share) < found["bytes"] <= bytes_of(share)


def test_what_is_measured_is_what_a_hand_counts(measured):
    one, four = measured("N = 1", "1"), measured("N = 4", "1")
    assert one["bytes"] == 4 * 16 * 16 * 4 and one["parameters"] == four["parameters"]
    assert four["context_flops"] == 4 * one["context_flops"]  # every window is read four times
    whole = measured("whole cache", "1")
    assert whole["bytes"] == 16 * 2 * 2 * 64 * 4  # tokens, blocks, key and value, width, float32
    sleep = SleepConfig(window=8, eviction=Compact(bytes=4096, method="attended"))
    keys = measured("whole cache", "1", sleep)
    # A key and its value in four heads of two blocks, with three numbers a head.
    assert keys["bytes"] == 3 * 2 * (2 * 64 + 3 * 4) * 4
    assert keys["context_flops"] > 1.9 * whole["context_flops"]  # shorter windows, each read once more
    # Awake a token costs the same whatever N, and more where there are keys to look at.
    assert one["token_flops"] == four["token_flops"] > 0 and keys["token_flops"] < whole["token_flops"]
    assert all(row["context_seconds"] > 0 < row["token_seconds"] for row in (one, four, whole, keys))


@pytest.fixture(scope="module")
def flops():
    return budget(MQAR)


@pytest.mark.parametrize("method", METHODS)
def test_no_method_is_trained_for_more_flops_than_four_passes_are(method, flops):
    config = run(MQAR, method, "1", Found(), flops)
    assert config is not None
    spent = training_flops(config)
    assert flops - spent / config.train.steps < spent <= flops


@pytest.mark.parametrize("task", rivals.FOUND)
def test_no_row_of_the_committed_results_spent_more_than_it_had(task):
    lines = (RESULTS / f"rivals-{task}-demo/results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    spent = max(row["flops"] for row in rows if row["cell"] == "N = 4 (1)")
    for row in rows:
        times = LONGER if row["cell"].endswith("times the training") else 1
        assert row["flops"] <= 1.025 * times * spent


@pytest.mark.parametrize("task", rivals.FOUND)
def test_choices_are_the_best_of_the_same_search(task):
    rows = [json.loads(line) for line in (SEARCH / f"{task}.jsonl").read_text().splitlines()]
    assert set(rivals.FOUND[task]) == set(METHODS)
    for method, chosen in rivals.FOUND[task].items():
        mine = [row for row in rows if row["method"] == method]
        rates = [row["choice"]["lr"] for row in mine if not row["choice"]["other"]]
        best = min((row for row in mine if not row["choice"]["other"]), key=lambda row: row["loss"])
        inside = min(rates) < best["choice"]["lr"] < max(rates) or len(rates) == len(RATES) + 1
        assert {*rates} >= {*RATES} and inside and len(mine) == len(rates) + 1
        assert Found(**min(mine, key=lambda row: row["loss"])["choice"]) == chosen


@pytest.mark.parametrize("name", BENCHES)
def test_a_context_of_a_bench_is_longer_than_a_window(name):
    bench = BENCHES[name]
    batch = bench.task.batch(batch_rng(0, "test", 0), 64, "test")
    lengths = torch.tensor([len(batch.row(i)[0]) for i in range(len(batch.tokens))])
    most = 3 if batch.context_lengths is not None else 2
    assert (lengths > bench.window).double().mean() > 0.8 and lengths.max() <= most * bench.window


def train_here(jobs, workers, launcher):
    # What run_all does, without a new process for each recipe.
    for job in jobs:
        Trainer(RunFolder.create(job.path, job.config), job.config).fit()


def test_a_group_is_its_figures_and_every_reading_stands_beside_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = {name: METHODS[name] for name in ("N = 1", *rivals.FREE)}
    monkeypatch.setattr(rivals, "METHODS", few)
    monkeypatch.setattr(rivals, "HEADS", {"1": 16})
    monkeypatch.setattr(measuring, "REPEATS", 1)
    monkeypatch.setitem(GROUPS, "rivals", GROUPS["rivals"][:2])
    monkeypatch.setattr(command, "run_all", train_here)
    command.run(ReproduceOptions(figure="rivals", steps=1, seeds=1, workers=1, out=Path("here")))
    said = capsys.readouterr().out
    assert {path.name for path in Path("here").iterdir()} == {*GROUPS["rivals"]} >= {"rivals-mqar"}
    for name in GROUPS["rivals"]:
        assert RECIPES[name].title in said
        rows = [json.loads(line) for line in Path(f"here/{name}/results.jsonl").read_text().splitlines()]
        by_cell = {row["cell"]: row for row in rows}
        assert set(by_cell) == {
            "N = 1 (1)", *rivals.FREE, "nothing kept", "keys, fitted (1)", "keys, as they are (1)",
        }  # fmt: skip
        assert by_cell["nothing kept"]["bytes"] == 0 < by_cell["keys, fitted (1)"]["bytes"] <= 4096
        # Keys are read by the run of the whole cache: nothing is trained for them.
        assert by_cell["keys, fitted (1)"]["seconds"] == by_cell["whole cache"]["seconds"]
        assert "bytes kept" in Path(f"here/{name}/README.md").read_text()
