import csv
import json
import time
from dataclasses import replace
from math import log
from pathlib import Path

import pytest

from lmsleep.cli import main
from lmsleep.recipes import RECIPES, catalogue, results
from lmsleep.recipes import estimate as estimates
from lmsleep.recipes import run as command
from lmsleep.recipes.estimate import estimate, estimated, side_by_side
from lmsleep.recipes.figure import draw
from lmsleep.recipes.results import Result, interval, together
from lmsleep.recipes.run import _chain
from lmsleep.recipes.table import as_markdown
from lmsleep.sleep import Hard, Sliding
from lmsleep.tasks import batch_rng
from lmsleep.training import RunFolder, Trainer, compute

BOTH = ("depo", "rule110")  # at equal tokens and at equal compute


def reproduce(*argv: str) -> None:
    workers = [] if argv[0] == "6" else ["--workers", "1"]  # it is timed in one process
    main(["reproduce", *argv, *workers])


@pytest.fixture(autouse=True)
def flops_by_a_rule_of_thumb(monkeypatch):
    # The counter takes a second for each model; test_baselines.py and test_training.py show that it is right.
    def count(objective, batch, sleep):
        weights = sum(p.numel() for p in objective.parameters())
        return 6 * weights * batch.num_tokens * (sleep.passes + sleep.wake_passes - 1)

    monkeypatch.setattr(compute, "count_flops", count)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("figure", RECIPES)
@pytest.mark.parametrize("scale", ["demo", "small", "paper"])
def test_the_cells_of_a_figure_differ_in_name_and_run(figure, scale):
    if scale == "paper" and figure in (*BOTH, "compute-matched", "compute-matched-depo"):
        pytest.skip("builds many large models")
    if scale != "demo" and figure in ("4a", "4b", "5"):
        with pytest.raises(ValueError, match=rf"^figure {figure} at scale={scale} needs pretrained weights"):
            RECIPES[figure].cells(scale)
        return
    if figure == "recall":
        with pytest.raises(ValueError, match=r"^recall begins with an adapter .* tools/smollm2.py"):
            RECIPES[figure].cells(scale)
        return
    if scale != "demo" and figure.startswith(("rivals-", "depth")):
        with pytest.raises(ValueError, match=rf"^{figure} at scale={scale}: .* use scale=demo"):
            RECIPES[figure].cells(scale)
        return
    every = RECIPES[figure].cells(scale)
    assert len({(cell.label, cell.budget) for cell in every}) == len(every)
    cells = [cell for cell in every if cell.reading is None]  # the others are one of these, read otherwise
    assert {cell.folder_for(0) for cell in every} == {cell.folder_for(0) for cell in cells}
    assert len({cell.folder_for(0) for cell in cells}) == len(cells) > 1
    assert len({json.dumps(cell.config.to_dict()) for cell in cells}) == len(cells)
    assert cells[0].with_seed(3).train.seed == 3


def test_settings_that_the_paper_gives():
    (_, two) = RECIPES["2b"].cells("paper")[:2]
    assert (two.config.task.t, two.config.task.width, two.config.task.states) == (32, 24, 4)
    assert (two.config.sleep.window, two.config.sleep.passes, two.config.train.batch_size) == (24, 2, 512)
    assert [cell.config.task.t for cell in RECIPES["2a"].cells("paper")] == [4, 8, 10, 12, 14, 16]
    # 40 million tokens, the end of the paper's axis; 5 billion for figure 2b.
    once = RECIPES["2a"].cells("paper")[0].config
    assert (once.train.steps, once.train.eval_every, two.config.train.steps) == (773, 50, 97_000)
    tokens = once.task.batch(batch_rng(0, "train", 0), 2, "train").num_tokens // 2
    assert abs(once.train.steps * once.train.batch_size * tokens - 40e6) < 1e5
    (four,) = (cell.config for cell in RECIPES["3"].cells("paper") if cell.config.sleep.passes == 4)
    assert (four.task.nodes, four.task.hops, four.sleep.window, four.train.steps) == (75, 16, 75, 100_000)


def test_a_figure_writes_data_table_and_picture(here, capsys):
    reproduce("passes", "--steps", "2", "--seeds", "2")
    assert "N drawn from 1 ... 4" in capsys.readouterr().out
    out = here / "results/passes-demo-2-steps"
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 2 * 6 * 4  # cells, seeds, passes read, hops
    with (out / "results.csv").open() as file:
        assert [float(row["accuracy"]) for row in csv.DictReader(file)] == [row["accuracy"] for row in rows]
    own = next(
        r for r in rows if (r["cell"], r["seed"], r["passes_read"], r["difficulty"]) == ("N = 2", 1, 2, 3)
    )
    report = RunFolder.open("runs/reproduce/passes-demo-2-steps/N---2-seed1").report()
    assert report is not None and own["accuracy"] == report["eval"]["per_difficulty"]["3"]
    page = (out / "README.md").read_text()
    assert "chance" in page and "torch" in page and "\nSeeds 0, 1.\n" in page
    assert (out / "figure.png").stat().st_size > 10_000

    before = (out / "results.jsonl").read_bytes()
    reproduce("passes", "--steps", "2", "--seeds", "2", "--json")  # nothing is trained again
    assert json.loads(capsys.readouterr().out) == rows
    assert (out / "results.jsonl").read_bytes() == before


def train_here(jobs, workers, launcher):
    # What run_all does (test_training.py), without a new process for each recipe.
    for job in jobs:
        for each in (job.shorter, job):
            if each is not None and not each.path.exists():
                Trainer(RunFolder.create(each.path, each.config), each.config).fit()


# One of a task and model of each kind; the others take as long.
QUICK = {"2a", "4b", "rule"}


@pytest.mark.parametrize(
    "figure",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in sorted(set(RECIPES) - {"passes", "recall"})
    ],
)
def test_every_recipe_runs_to_its_end(here, figure, monkeypatch, capsys):
    monkeypatch.setattr(catalogue, "SLEEPS", (1, 4, 12))
    monkeypatch.setattr(results, "TIMED_STEPS", 1)
    monkeypatch.setattr(command, "run_all", train_here)
    reproduce(figure, "--steps", "1", "--seeds", "1", "--out", "here")
    assert {path.name for path in Path("here").iterdir()} == {
        "README.md", "curves.jsonl", "figure.png", "results.csv", "results.jsonl",
    }  # fmt: skip
    recipe, page = RECIPES[figure], Path("here/README.md").read_text()
    assert recipe.caution in page and recipe.caution in capsys.readouterr().out
    assert all(f"| {cell.label} |" in page for cell in recipe.cells("demo"))


def test_memory_blocks_are_first_trained_alone_for_figure_5_and_every_stage_starts_from_the_one_before():
    for figure, eviction in (("4b", Hard()), ("5", Sliding())):
        cells = {cell.config.sleep.passes: cell for cell in RECIPES[figure].cells("demo")}
        for passes, cell in cells.items():
            chain = _chain(cell, 2, Path("runs"))
            first, *alone, whole = (job.config for job in chain)
            assert {job.config.train.seed for job in chain} == {2}
            assert set(first.model.blocks) == {"attention"} and first.sleep.window is None
            assert [c.train.only_inserted for c in (*alone, whole)] == [*[True] * (figure == "5"), False]
            stage = (*alone, whole)[0]  # the one in which blocks are inserted
            inserted = {i for i, kind in enumerate(stage.model.blocks) if kind != "attention"}
            assert set(stage.train.inserted) == inserted and len(inserted) == 2
            assert not (alone and whole.train.inserted)
            assert all(c.sleep.eviction == (Hard() if passes > 1 else eviction) for c in alone)
            assert whole.sleep.eviction == eviction and whole.train.steps == 600
            assert [job.config.train.start for job in chain[1:]] == [job.path for job in chain[:-1]]
        starts = {_chain(cell, 0, Path("runs"))[0].path for cell in cells.values()}
        assert len(starts) == 1  # all N go on from the same model


@pytest.mark.parametrize("scale", ["demo", "small", "paper"])
def test_the_grid_varies_load_and_depth_and_nothing_else(scale):
    cells = RECIPES["grid"].cells(scale)
    tasks = [cell.config.task for cell in cells if cell.config.sleep.passes == 1]
    assert len({task.nodes for task in tasks}) == len(tasks) > 1
    assert len({replace(task, nodes=8).context_length for task in tasks}) == 1
    assert len({task.vocab_size for task in tasks}) == len({cell.config.sleep.window for cell in cells}) == 1
    for task in tasks:
        assert task.nodes >= 2 * task.hops  # no hop back that is shorter
        assert task.context_length == 2 * max(t.nodes for t in tasks)
    assert [cell.at for cell in cells] == 2 * [task.nodes for task in tasks]


def test_colour_is_accuracy_above_chance():
    rows = [
        {"cell": f"load {at}", "line": "N = 1", "seed": seed, "passes": 1, "passes_read": 1, "at": at,
         "difficulty": key, "accuracy": accuracy, "chance": chance, "constant": 0.1}
        for at, chance in ((8, 0.2), (12, 0.5))
        for key in (1, 2)
        for seed, accuracy in ((0, 1.0), (1, chance))
    ]  # fmt: skip
    (ax,) = draw(Result(RECIPES["grid"], "k", rows, [], "")).axes
    assert ax.images[0].get_array().tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert [text.get_text() for text in ax.texts] == 4 * ["0.50"]


@pytest.mark.parametrize("scale", ["demo", "small", "paper"])
def test_memory_is_read_after_more_and_more_sleeps(scale):
    config = RECIPES["sleeps"].cells(scale)[0].config
    assert RECIPES["sleeps"].read is not None
    assert config.train.curriculum == 0  # fewer pairs would share their window with filler
    readings = RECIPES["sleeps"].read(config)
    assert [*readings] == [1, 4, 10, 100, 1000] and readings[4] == config
    for sleeps, reading in readings.items():
        assert reading.task.filler == sleeps * reading.sleep.window
        assert reading.sleep.window == 2 * reading.task.pairs  # all facts are read in one window


def test_floors_are_given_for_each_difficulty_and_for_each_cell_where_they_differ():
    spent = {"step": 1, "flops": 1e12, "passes": 1, "passes_read": 1, "seed": 0, "at": None, "accuracy": 0.75}
    rows = [
        {"cell": cell, "difficulty": key, "answers": 100, "chance": 0.125, "constant": constant + key / 100}
        | spent
        for cell, constant in (("one", 0.2), ("two", 0.3))
        for key in (1, 2)
    ]
    page = Result(RECIPES["3"], "k", rows, [], "`made`").page().splitlines()
    assert "Seed 0 [95 % interval of its answers]." in page
    assert "| chance |  |  | 0.125 | 0.125 |" in page
    assert "| constant, one |  |  | 0.210 | 0.220 |" in page
    assert "| constant, two |  |  | 0.310 | 0.320 |" in page


def test_test_loss_by_difficulty_is_drawn_where_it_was_measured():
    spent = {
        "flops": 1e12,
        "tokens": 10,
        "seconds": 1.0,
        "passes": 1,
        "passes_read": 1,
        "seed": 0,
        "at": None,
    }
    row = {
        "cell": "N = 1",
        "line": "N = 1",
        "difficulty": 1,
        "accuracy": 0.5,
        "answers": 9,
        "chance": 0.1,
        "step": 2,
    }
    old = {"cell": "N = 1", "step": 1, "per_difficulty": {"1": 0.5, "2": 0.2}, **spent}
    new = [old | {"step": s, "loss_per_difficulty": {"1": 1.0 / s, "2": 2.0 / s}} for s in (1, 2)]
    assert len(draw(Result(RECIPES["3"], "k", [row | spent], [old], "`made`")).axes) == 2
    losses, *others = draw(Result(RECIPES["3"], "k", [row | spent], new, "`made`")).axes
    assert len(others) == 2 and losses.get_ylabel().startswith("test loss")
    lines = {line.get_label(): line.get_ydata().tolist() for line in losses.get_lines()}
    assert lines == {"N = 1, k = 1": [1.0, 0.5], "N = 1, k = 2": [2.0, 1.0]}


def test_an_interval_says_what_its_seeds_can():
    def rows(*accuracies):
        return [{"seed": s, "accuracy": a, "answers": 100} for s, a in enumerate(accuracies)]

    assert interval(rows(0.5)) == "0.500 [0.404, 0.596]"  # Wilson's, of 50 in 100
    assert interval(rows(0.5, 0.7)) == "0.500 0.700"
    assert interval(rows(0.5, 0.6, 0.7)) == "0.600 [0.352, 0.848]"  # Student's, 4.303 * .1 / sqrt(3)
    more = [{"seed": 0, "accuracy": 1.0, "answers": 300}]
    assert interval([*rows(0.2), *more]).startswith("0.800 ")  # difficulties by their answers


def test_difficulties_are_taken_together_by_answers_and_bits_by_their_tokens():
    def row(key, accuracy, answers, loss, tokens, chance):
        names = ("difficulty", "accuracy", "answers", "loss", "answer_tokens", "chance")
        return dict(zip(names, (key, accuracy, answers, loss, tokens, chance), strict=True))

    rows = [
        row(1, 1.0, 10, 0.0, 10, 0.5),
        row(2, 0.5, 30, log(2), 90, 0.1),
        row(5, 0.25, 4, 2 * log(2), 8, 0.0),
    ]
    found = together(rows, {"near": (1, 2), "none": (3,), "far": (4, 5)})
    near, far = found
    assert (near["difficulty"], near["answers"], near["answer_tokens"]) == (0, 40, 100)
    assert near["accuracy"] == 0.625 and near["chance"] == 0.2 and near["loss"] == pytest.approx(0.9 * log(2))
    assert (far["difficulty"], far["accuracy"], far["chance"]) == (2, 0.25, 0.0)
    assert together(rows, {}) == rows
    recipe = replace(RECIPES["rule"], together={"near": (1, 2), "none": (3,), "far": (4, 5)})
    who = {"cell": "N = 1", "line": "N = 1", "seed": 0, "at": None, "passes": 1, "passes_read": 1}
    spent = {"step": 1, "flops": 1e12}
    result = Result(recipe, "kind", [{**who, **some, **spent} for some in found], [], "`x`")
    header, line, floor = result.lines()
    assert header[3:] == ["near", "far", "bits of an answer's token"]
    assert line[3].startswith("0.625 [") and float(line[5]) == pytest.approx(
        (0.9 * 100 + 2 * 8) / 108, abs=5e-4
    )
    assert floor == ["chance", "", "", "0.200", "0.000", ""]
    (ax,) = draw(replace(result, recipe=replace(recipe, panels=("difficulty",)))).axes
    assert [text.get_text() for text in ax.get_xticklabels()] == ["near", "far"]


def test_intervals_of_seeds_and_of_answers_never_share_a_table():
    def row(cell, seed):
        who = {"cell": cell, "line": cell, "seed": seed, "at": None, "passes": 1, "passes_read": 1}
        return {**who, "difficulty": 1, "accuracy": 0.5 + seed / 10, "answers": 100, "step": 1, "flops": 1e12}

    recipe = RECIPES["rule"]
    many = Result(recipe, "k", [row("N = 1", seed) for seed in range(3)] + [row("bound", 0)], [], "`x`")
    assert [line[-1] for line in many.lines()[1:3]] == ["0.600 [0.352, 0.848]", "0.500"]
    assert "Mean over seeds 0 ... 2 (bound: seed 0) [95 % interval over them]." in many.page()
    alone = Result(recipe, "k", [row("N = 1", 0), row("bound", 0)], [], "`x`")
    assert [line[-1] for line in alone.lines()[1:3]] == 2 * ["0.500 [0.404, 0.596]"]
    assert "\nSeed 0 [95 % interval of its answers].\n" in alone.page()
    ten = Result(
        recipe,
        "k",
        [row("N = 1", seed) for seed in range(10)] + [row("N = 2", 0), row("N = 2", 2)],
        [],
        "`x`",
    )
    assert ten.named_seeds == "seeds 0 ... 9 (N = 2: seeds 0, 2)"


def drawn_from(cells, seeds, recipe="rule", **more):
    """The axes of a figure of cells with these seeds, and its result."""
    rows = [
        {"cell": f"cell {i}", "line": f"cell {i}", "seed": seed, "at": 1, "passes": 1, "passes_read": 1,
         "difficulty": 1, "accuracy": 0.3 + seed / 10, "answers": 100, "step": 1, "tokens": 1, "flops": 1e12,
         "chance": 0.1, "one hop": 0.2, "no chain": 1.0, **more}
        for i in range(cells) for seed in range(seeds)
    ]  # fmt: skip
    curves = [{**row, "per_difficulty": {"1": row["accuracy"]}} for row in rows]
    result = Result(
        replace(RECIPES[recipe], panels=("flops", "difficulty", "final")), "k", rows, curves, "`x`"
    )
    return draw(result).axes, result


def test_figures_show_the_highest_floor_that_is_not_what_is_asked():
    axes, result = drawn_from(cells=1, seeds=1)
    assert results.floor(result.rows) == 0.2
    for ax, along in zip(axes, ("get_ydata", "get_ydata", "get_xdata"), strict=True):
        dotted = [line for line in ax.lines if line.get_linestyle() == ":"]
        assert [{*getattr(line, along)()} for line in dotted] == [{0.2}]


def test_figures_show_seeds_and_no_interval_of_two():
    for seeds in (1, 2, 3):
        (curves, _, ends), _ = drawn_from(cells=1, seeds=seeds)
        points = [line for line in curves.lines if line.get_marker() == "."]
        assert [len(line.get_xdata()) for line in points] == [seeds]
        assert bool(ends.collections) == (seeds == 3)  # whiskers


def test_more_lines_than_colors_are_told_apart():
    (curves, *_), _ = drawn_from(cells=12, seeds=1)
    styles = [(line.get_color(), line.get_linestyle()) for line in curves.lines if line.get_label()[0] != "_"]
    assert len({*styles}) == len(styles) == 12


def test_repeats_of_a_measurement_are_no_seeds():
    recipe = RECIPES["6"]
    rows = [
        {"cell": "N = 1", "line": "N = 1", "seed": i, "at": 1, "passes": 1, "passes_read": 1, "step": 4,
         "tokens_per_second": 10.0 + i, "flops": 1e12} for i in range(3)
    ]  # fmt: skip
    assert (
        "\nMean over 3 measurements [95 % interval over them].\n"
        in Result(recipe, "", rows, [], "`x`").page()
    )


def test_one_run_at_both_budgets_stands_in_both_blocks():
    spent = {"step": 1, "flops": 1e12, "seed": 0, "at": None, "answers": 10, "chance": 0.1, "constant": 0.1}
    rows = [
        {
            "cell": f"N = {n}",
            "passes": n,
            "passes_read": read,
            "budget": budget,
            "difficulty": 1,
            "accuracy": read / 10,
        }
        | spent
        for n, read, budget in ((1, 1, "tokens"), (1, 1, "compute"), (4, 4, "both"), (4, 2, "both"))
    ]
    lines = Result(RECIPES["rule110"], "t", rows, [], "").lines()
    assert [line[:2] for line in lines] == [
        ["at equal", "model"], ["tokens", "N = 1"], ["tokens", "N = 4"], ["compute", "N = 1"],
        ["compute", "N = 4"], ["", "chance"], ["", "constant"],
    ]  # fmt: skip
    assert lines[2][-1].startswith("0.400 ")  # not as it is read with other passes


@pytest.mark.parametrize(
    "folder",
    sorted(page.parent for page in (Path(__file__).parents[1] / "results").glob("*/README.md")),
    ids=lambda p: p.name,
)
def test_committed_results_are_those_of_their_rows(folder, tmp_path):
    result = Result.load(RECIPES[folder.name.rpartition("-")[0]], folder)
    result.save(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()
    assert as_markdown(result.lines()) in (folder / "README.md").read_text()


def test_a_dry_run_trains_nothing(here, capsys):
    reproduce("3", "--steps", "50", "--dry-run")
    assert "1 x N = 4" in capsys.readouterr().out  # a first look
    reproduce("3", "--steps", "50", "--dry-run", "--seeds", "2")
    assert "2 x N = 4" in capsys.readouterr().out
    assert not list(here.iterdir())


def test_a_line_of_an_estimate_is_said_as_soon_as_it_is_known():
    asked = []

    def rows():
        for n in (1, 2):
            asked.append(n)
            yield {"runs": 1, "cell": f"N = {n}", "steps": 1, "tokens": 1, "flops": 1e12, "seconds": 3600.0}

    lines = estimated(RECIPES["3"], rows(), workers=1)
    assert "Depo" in next(lines) and not asked
    assert "N = 1" in next(lines) and asked == [1]
    assert [*lines][-1].startswith("\nabout 2.0 hours on this machine")


def test_cells_of_one_model_are_timed_once(monkeypatch):
    timed = []
    monkeypatch.setattr(estimates, "_timed", lambda config: timed.append(config) or 10.0)
    rows = [*estimate(RECIPES["2a"].cells("paper"), seeds=3)]
    assert len(rows) == 6 and len(timed) == 1
    assert len({row["seconds"] for row in rows}) == 1 and rows[0]["steps"] == 773


def test_no_step_of_a_model_that_is_large_for_a_cpu_is_taken(monkeypatch):
    monkeypatch.undo()  # FLOPs are counted, and must be those that are found without a step
    cells = RECIPES["3"].cells("demo")[:1]
    (timed,) = estimate(cells, seeds=3)
    monkeypatch.setattr(estimates, "LARGE", 1000)
    monkeypatch.setattr(estimates, "_timed", None)
    (row,) = estimate(cells, seeds=3)
    assert row == {**timed, "seconds": None}
    said = [*estimated(RECIPES["3"], [row], workers=2)]
    assert "TFLOP\n" in said[1] and said[-1].startswith("\nfor a GPU: no step was taken")


@pytest.mark.slow
def test_a_dry_run_at_the_papers_size_takes_no_hour():
    begin = time.monotonic()
    (row,) = estimate(RECIPES["6"].cells("paper")[:1], seeds=1)
    assert row["seconds"] is None and row["flops"] > 1e15 and time.monotonic() - begin < 120


def test_estimates_grow_with_steps_and_passes():
    cells = RECIPES["3"].cells("demo")
    rows = [*estimate([cells[0], cells[-1]], seeds=3)]
    assert rows[0]["tokens"] == rows[1]["tokens"] == cells[0].config.train.steps * 64 * (16 + 8 * 3)
    assert rows[0]["runs"] == 3
    assert rows[0]["flops"] < rows[1]["flops"] and rows[0]["seconds"] < rows[1]["seconds"]


def test_runs_side_by_side_take_no_less_than_the_longest():
    rows = [{"runs": 3, "seconds": 10.0}, {"runs": 1, "seconds": 30.0}]
    assert [side_by_side(rows, workers) for workers in (1, 2, 8)] == [60, 30, 30]


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
