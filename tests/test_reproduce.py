import csv
import json
from pathlib import Path

import pytest

from lmsleep.cli import main
from lmsleep.reproduce import RECIPES, Cell, recipes
from lmsleep.reproduce.command import estimate
from lmsleep.training import RunFolder


def reproduce(*argv: str) -> None:
    main(["reproduce", *argv, "--workers", "1"])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("figure", RECIPES)
@pytest.mark.parametrize("scale", ["demo", "small", "paper"])
def test_the_cells_of_a_figure_differ_in_name_and_run(figure, scale):
    if scale != "demo" and figure.startswith("compute-matched"):
        pytest.skip("counts FLOPs of real steps: minutes at these scales")
    if scale != "demo" and figure in ("4a", "4b", "5"):
        with pytest.raises(ValueError, match=rf"^figure {figure} at scale={scale} needs the weights of"):
            RECIPES[figure].cells(scale)
        return
    cells = RECIPES[figure].cells(scale)
    assert len({cell.label for cell in cells}) == len(cells) > 1
    assert len({json.dumps(cell.config.to_dict()) for cell in cells}) == len(cells)
    assert cells[0].with_seed(3).train.seed == 3


def test_settings_that_the_paper_gives():
    (_, two) = RECIPES["2b"].cells("paper")[:2]
    assert (two.config.task.t, two.config.task.width, two.config.task.states) == (32, 24, 4)
    assert (two.config.sleep.window, two.config.sleep.passes, two.config.train.batch_size) == (24, 2, 512)
    assert [cell.config.task.t for cell in RECIPES["2a"].cells("paper")] == [4, 8, 10, 12, 14, 16]
    (four,) = (cell.config for cell in RECIPES["3"].cells("paper") if cell.config.sleep.passes == 4)
    assert (four.task.nodes, four.task.hops, four.sleep.window, four.train.steps) == (75, 16, 75, 100_000)


def test_a_figure_writes_data_table_and_picture(here, capsys):
    reproduce("passes", "--steps", "2", "--seeds", "2")
    assert "N drawn from 1 ... 4" in capsys.readouterr().out
    out = here / "results/passes-demo"
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 2 * 6 * 4  # cells, seeds, passes read, hops
    with (out / "results.csv").open() as file:
        assert [float(row["accuracy"]) for row in csv.DictReader(file)] == [row["accuracy"] for row in rows]
    own = next(
        r for r in rows if (r["cell"], r["seed"], r["passes_read"], r["difficulty"]) == ("N = 2", 1, 2, 3)
    )
    report = RunFolder.open("runs/reproduce/passes-demo/N---2-seed1").report()
    assert report is not None and own["accuracy"] == report["eval"]["per_difficulty"]["3"]
    page = (out / "README.md").read_text()
    assert "chance" in page and "torch" in page and "Mean over 2 seeds" in page
    assert (out / "figure.png").stat().st_size > 10_000

    before = (out / "results.jsonl").read_bytes()
    reproduce("passes", "--steps", "2", "--seeds", "2", "--json")  # nothing is trained again
    assert json.loads(capsys.readouterr().out) == rows
    assert (out / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize("figure", sorted(set(RECIPES) - {"passes"}))
def test_every_recipe_runs_to_its_end(here, figure, monkeypatch, capsys):
    monkeypatch.setattr(recipes, "SLEEPS", (1, 4, 12))
    reproduce(figure, "--steps", "1", "--seeds", "1", "--out", "here")
    assert {path.name for path in Path("here").iterdir()} == {
        "README.md", "curves.jsonl", "figure.png", "results.csv", "results.jsonl",
    }  # fmt: skip
    recipe, page = RECIPES[figure], Path("here/README.md").read_text()
    assert recipe.caution in page and recipe.caution in capsys.readouterr().out
    assert all(f"| {cell.label} |" in page for cell in recipe.cells("demo"))


def test_a_dry_run_trains_nothing(here, capsys):
    reproduce("3", "--steps", "50", "--dry-run")
    assert "3 x N = 4" in capsys.readouterr().out
    assert not list(here.iterdir())


def test_estimates_grow_with_steps_and_passes():
    cells = RECIPES["3"].cells("demo")
    rows = estimate([cells[0], cells[-1]], seeds=3)
    assert rows[0]["tokens"] == rows[1]["tokens"] == cells[0].config.train.steps * 64 * (16 + 8 * 3)
    assert rows[0]["runs"] == 3 and rows[0]["flops"] < rows[1]["flops"]
    assert isinstance(cells[0], Cell)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["9"], "invalid choice"),
        (["3", "--seeds", "0"], "seeds must be at least 1, got 0"),
        (["3", "--steps", "0"], "steps must be"),
    ],
)
def test_bad_input_is_named(here, argv, message, capsys):
    with pytest.raises(SystemExit) as leaving:
        reproduce(*argv)
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(here.iterdir())
