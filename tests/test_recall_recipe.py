"""From a base model to a shipped adapter and the table beside it, on a tiny model of bytes."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import run_command
from hf_models import FOUR, tiny_llama_of_bytes
from tools import smollm2

import lmsleep
from lmsleep.hf import load_pretrained
from lmsleep.recipes import RECIPES, recall
from lmsleep.training import RunFolder

TINY = "--length 400 --window 200 --steps 2 --eval-every 9"


@pytest.fixture
def base(tmp_path):
    """A tiny model of bytes, with attention alone."""
    return tiny_llama_of_bytes(tmp_path / "tiny", **FOUR)


@pytest.mark.slow  # nine runs
def test_a_tool_makes_what_ships_and_the_recipe_goes_on_from_it(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("PAIRS", "FACTS"):
        monkeypatch.setattr(smollm2, name, f"--kinds facts --facts 2 2 --filler 0 1 {TINY}")
    monkeypatch.setattr(smollm2, "KINDS", f"{smollm2.KINDS} --length 1200 --window 600 --steps 6 --warmup 0")
    monkeypatch.setattr(recall, "STEPS", {1: 2, 2: 2})
    monkeypatch.setattr(recall, "LORA_STEPS", 2)
    monkeypatch.setattr(recall, "WINDOW", 600)
    argv = ["--model", str(base), "--out", "runs/tiny", "--ship", "shipped"]
    smollm2.main(argv)
    facts, kinds = (RunFolder.open(f"runs/tiny/{name}") for name in ("facts", "kinds"))
    # The tool ends with the recipe's longest run.
    config, longest = kinds.config(), recall.longest(facts.exported)
    assert config == replace(longest, train=replace(longest.train, save_every=config.train.save_every))
    # Both have memory layers in the upper half, which is what more passes would loop.
    saved = json.loads(Path("shipped/config.json").read_text())
    assert saved["memory_layers"]["after"] == [2] and saved["sleep"]["consolidator"]["loop"] == [2, 4]
    shipped, trained = (
        dict(load_pretrained(path).named_parameters()) for path in ("shipped", kinds.exported)
    )
    assert all((shipped[name] - p).abs().max() < 0.01 * p.abs().max() + 1e-6 for name, p in trained.items())
    assert lmsleep.open("shipped").sleep.window == 600
    # Nothing is trained twice.
    before = kinds.report()
    smollm2.main(argv[:4])
    assert kinds.report() == before
    # A head of eight numbers for two heads of keys, in one layer; this model cannot keep so little.
    assert recall._bytes(facts.exported) == 2 * 8 * 8 * 4
    monkeypatch.setattr(recall, "_bytes", lambda adapter: 10_000)
    capsys.readouterr()
    code, out, err = run_command(
        capsys, "reproduce", "recall", "--weights", facts.exported, "--steps", 1, "--seeds", 1,
        "--workers", 1, "--out", "here",
    )  # fmt: skip
    assert code == 0, err
    cells = recall.fine_tuned("demo", facts.exported)
    assert all(f"| {cell.label} |" in out for cell in cells)
    header = next(line for line in out.splitlines() if line.startswith("| model"))
    assert [cell.strip() for cell in header.split("|")][4:-2] == [*recall.COLUMNS]
    assert out.count("| chance |") == out.count("| constant |") == 1  # one for all cells


def test_every_kind_of_question_stands_in_one_column():
    task = recall.task(Path("bytes"))
    counted = [key for keys in RECIPES["recall"].together.values() for key in keys]
    assert sorted(counted) == [*range(len(task.difficulty_labels))]


def test_a_search_of_memory_layers_that_goes_on_tries_what_it_would_have_tried(base, monkeypatch):
    monkeypatch.syspath_prepend(Path(smollm2.__file__).parent)  # where a script finds its neighbours
    memory_layers = importlib.import_module("memory_layers")
    monkeypatch.setattr("lmsleep.shipped.find", lambda name: base)
    losses, found, names = iter([3.0, 2.0, 4.0, 2.5, 1.5, 1.0, 3.0, 0.5]), [], []
    for due in memory_layers.rounds("smollm2", found):
        names += [trial.what for trial in due]
        found += [{**trial.what, "seed": 100, "loss": next(losses)} for trial in due]
    kinds, rates = (
        {what["layers"]["kind"] for what in names[3:]},
        [what["layers"]["lr"] for what in names[5:]],
    )
    assert (
        len(names) == 8 and kinds == {names[1]["layers"]["kind"]} and rates == 3 * [names[4]["layers"]["lr"]]
    )
    assert [t.what for due in memory_layers.rounds("smollm2", found) for t in due] == names
