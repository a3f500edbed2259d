"""Committed results that today's code would not give are told."""

import json
from dataclasses import replace

import pytest
from tools import age

from lmsleep.models import HybridConfig
from lmsleep.recipes import RECIPES, Cell, Recipe
from lmsleep.recipes.results import collect
from lmsleep.sleep import SleepConfig
from lmsleep.tasks import MQAR
from lmsleep.training import Job, RunConfig, RunFolder, TrainConfig, Trainer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a result of a recipe of one small cell."""
    run = RunConfig(
        task=MQAR(pairs=4, keys=8, values=8, queries=4),
        model=HybridConfig(d_model=16, num_heads=2, blocks=("attention", "gated_delta_net"), mlp_dim=0),
        sleep=SleepConfig(window=4, passes=2),
        train=TrainConfig(steps=12, batch_size=4, eval_batches=1, threads=1),
    )
    recipe = Recipe("tiny", "nothing", lambda scale: [Cell("N = 2", run)], ("final",))
    monkeypatch.setitem(RECIPES, "tiny", recipe)
    job = Job(tmp_path / "run", run)
    Trainer(RunFolder.create(job.path, run), run).fit()
    collect(recipe, [(recipe.cells("demo")[0], job)]).save(tmp_path / "tiny-demo")
    return tmp_path / "tiny-demo"


def test_a_result_that_todays_code_gives_is_no_older(folder):
    assert [*age.changed(folder)] == []


def test_a_run_that_begins_otherwise_is_told_with_both_losses(folder, monkeypatch):
    recipe = RECIPES["tiny"]
    (cell,) = recipe.cells("demo")
    model = replace(cell.config.model, conv_init=0.5)  # stands for code that computes something else
    other = replace(cell, config=replace(cell.config, model=model))
    monkeypatch.setitem(RECIPES, "tiny", replace(recipe, cells=lambda scale: [other]))
    (line,) = age.changed(folder)
    assert line.startswith("N = 2: loss ") and "at step 10 then" in line


def test_other_steps_and_other_cells_are_told(folder, monkeypatch):
    recipe = RECIPES["tiny"]
    (cell,) = recipe.cells("demo")
    longer = replace(cell, config=replace(cell.config, train=replace(cell.config.train, steps=13)))
    monkeypatch.setitem(RECIPES, "tiny", replace(recipe, cells=lambda scale: [longer]))
    assert [*age.changed(folder)] == ["N = 2: 12 steps then, 13 now"]
    renamed = replace(cell, label="other")
    monkeypatch.setitem(RECIPES, "tiny", replace(recipe, cells=lambda scale: [renamed]))
    assert [*age.changed(folder)] == ["N = 2: no cell of today", "other: not in the result"]


def test_what_is_known_excuses_other_steps_and_nothing_else(folder, monkeypatch):
    monkeypatch.setitem(age.OLDER, folder.name, "FLOPs were counted otherwise")
    lines = ["N = 2: 12 steps then, 13 now", "other: not in the result"]
    assert age.unknown(folder, lines) == lines[1:]
    assert age.unknown(folder.with_name("another-demo"), lines) == lines


def test_of_a_result_of_before_losses_were_kept_cells_and_steps_are_compared(folder):
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in row.items() if key != "first_loss"} for row in rows]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    assert [*age.changed(folder)] == []
    kept[0]["step"] += 1
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept[:1]))
    assert [*age.changed(folder)] == ["N = 2: 13 steps then, 12 now"]


def test_every_committed_folder_is_of_a_recipe():
    assert len(age.results()) > 10
    assert all(age.cells(path) for path in age.results() if path.parent == age.COMMITTED)


@pytest.mark.slow
@pytest.mark.parametrize("folder", age.results(), ids=lambda path: path.name)
def test_committed_results_are_those_of_todays_code(folder):
    found = [*age.changed(folder)]
    assert not age.unknown(folder, found)
    assert bool(found) == (folder.name in age.OLDER)
