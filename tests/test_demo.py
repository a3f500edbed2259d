import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tools import publish

from lmsleep import shipped
from lmsleep.cli import main
from lmsleep.recipes import RECIPES, figure, settings
from lmsleep.recipes import run as command
from lmsleep.recipes.answers import Answers
from lmsleep.recipes.catalogue import LIVE
from lmsleep.recipes.demo import committed
from lmsleep.recipes.results import Result
from lmsleep.recipes.table import published
from lmsleep.training import Job, RunFolder, Trainer, run_all, training_flops

FULL = ("--full", "--seeds", "0", "1", "--scale", "0.004")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    main(["demo", *FULL, "--out", str(out), "--workers", "2"])
    return out


@pytest.mark.parametrize("cells", [RECIPES["depo"].cells, RECIPES["rule110"].cells, LIVE.cells])
def test_equal_compute_is_equal_to_within_a_step(cells):
    runs = [cell.config for cell in cells("demo") if cell.budget in (None, "compute", "both")]
    (budget,) = (training_flops(run) for run in runs if run.sleep.passes == 4)
    for run in runs:
        spent = training_flops(run)
        assert 0 <= budget - spent < spent / run.train.steps


def test_models_differ_in_their_passes_and_tuned_settings_alone():
    cells = RECIPES["depo"].cells("demo")
    assert [cell.folder_for(1) for cell in cells] == [
        "depo-N1-tokens-seed1", "depo-N1-seed1", "depo-N2-tokens-seed1", "depo-N2-seed1", "depo-N4-seed1",
        "depo-transformer-evicted-seed1", "depo-transformer-cached-seed1",
    ]  # fmt: skip
    tokens, one, four = cells[0].config, cells[1].config, cells[4].config
    assert cells[1].shorter == cells[0] and tokens.train.steps == four.train.steps < one.train.steps
    assert (one.task, one.model, one.sleep) == (four.task, four.model, four.sleep.with_passes(1))
    tuned = set().union(*settings.DEPO_TUNED.values())
    same = {k: v for k, v in vars(one.train).items() if k not in {"steps", *tuned}}
    assert same == {k: v for k, v in vars(four.train).items() if k in same}


def test_the_live_runs_are_the_demo_s_cut_short_alike():
    one, four = (cell.config for cell in LIVE.cells("demo"))
    whole = settings.depo("demo", 4)
    assert (one.task, one.model, one.sleep) == (whole.task, whole.model, whole.sleep.with_passes(1))
    share = four.train.steps / whole.train.steps
    assert share == one.train.curriculum / settings.DEPO_TUNED[1]["curriculum"] < 1
    changed = {"steps": whole.train.steps, "curriculum": whole.train.curriculum, "save_every": 250}
    assert replace(four, train=replace(four.train, **changed)) == whole


def test_a_shorter_run_that_shares_its_start_equals_one_trained_alone(tmp_path):
    config = settings.depo("demo", 2, steps=8, curriculum=4, eval_every=4)
    short = replace(config, train=replace(config.train, steps=4))
    run_all([Job(tmp_path / "long", config, Job(tmp_path / "short", short))], workers=1)
    alone = Trainer(RunFolder.create(tmp_path / "alone", short), short)
    alone.fit()

    def exact(path):
        return [{k: v for k, v in m.items() if k != "seconds"} for m in RunFolder.open(path).metrics()]

    assert exact(tmp_path / "short") == exact(tmp_path / "alone")
    assert RunFolder.open(tmp_path / "long").report()["step"] == 8


def test_a_branch_of_another_configuration_is_refused(tmp_path):
    config = settings.depo("demo", 2, steps=20)
    other = replace(config, train=replace(config.train, steps=10, lr=0.5))
    with pytest.raises(RuntimeError, match=r"must differ from .* in its steps alone"):
        run_all([Job(tmp_path / "long", config, Job(tmp_path / "short", other))], workers=1)


@pytest.mark.slow
def test_finished_runs_are_not_repeated_and_foreign_ones_refused(demo, capsys):
    before = {p: p.stat().st_mtime_ns for p in demo.rglob("report.json")}
    assert len(before) == 2 * 5 + 2  # the bounds once
    main(["demo", *FULL, "--out", str(demo), "--json"])
    assert before == {p: p.stat().st_mtime_ns for p in demo.rglob("report.json")}
    said = json.loads(capsys.readouterr().out)
    assert {row["seed"] for row in said["trained"]["depo"]} == {0, 1}
    with pytest.raises(SystemExit) as leaving:
        main(["demo", *FULL[:-1], "0.005", "--out", str(demo)])
    assert leaving.value.code == 2 and "another configuration" in capsys.readouterr().err


@pytest.mark.slow
def test_rows_are_those_of_the_reports_and_of_other_readings(demo):
    result = Result.load(RECIPES["depo"], demo / "depo")
    report = RunFolder.open(demo / "depo-N2-tokens-seed1").report()
    (row,) = result.own(cell="hybrid, N = 2", budget="tokens", seed=1, difficulty=3)
    assert report is not None and row["accuracy"] == report["eval"]["per_difficulty"]["3"]
    assert {r["passes_read"] for r in result.rows if r["passes"] == 4} == {1, 2, 3, 4, 6}
    assert all(r["passes_read"] == r["passes"] for r in result.rows if r["passes"] != 4)
    assert {curve["cell"] for curve in result.curves} == {f"hybrid, N = {n}" for n in (1, 2, 4)}
    assert {len(line) for line in result.lines()} == {4 + 4 + 1}
    figure.draw(result)


@pytest.mark.slow
def test_the_page_holds_every_row_and_needs_no_network(demo):
    page = (demo / "demo.html").read_text()
    # The letters of a picture in base64 spell anything by chance, so the text is looked at without them.
    text, pictures = re.subn(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page)
    assert pictures == 3 and "http" not in text  # this run and the committed results
    tables = [Result.load(RECIPES["depo"], demo / "depo"), committed("depo"), committed("rule110")]
    assert page.count("<tr>") == 5 + sum(len(result.lines()) for result in tables)


def test_the_shipped_models_answer_and_two_are_trained(tmp_path, monkeypatch, capsys):
    def train_here(jobs, workers, launcher):
        for job in jobs:
            if not job.path.exists():
                Trainer(RunFolder.create(job.path, job.config), job.config).fit()

    monkeypatch.setattr(command, "run_all", train_here)
    main(["demo", "--out", str(tmp_path), "--scale", "0.004"])
    said = capsys.readouterr().out
    assert said.index("HOP_4") < said.index("side by side") < said.index("demo.html")
    assert {p.name for p in tmp_path.iterdir() if (p / "config.json").exists()} == {
        "depo-live-N1-seed0", "depo-live-N4-seed0",
    }  # fmt: skip
    assert [line[0] for line in Result.load(LIVE, tmp_path / "live").lines()] == [
        "model", "N = 1", "N = 4", "chance", "constant", "one hop",
    ]  # fmt: skip
    main(["demo", "--out", str(tmp_path), "--scale", "0.004", "--json"])
    out, err = capsys.readouterr()
    again = json.loads(out)
    assert "HOP_4" in err and len(again["trained"]["live"]) == 2 * 4


def test_the_answers_are_those_of_each_model_about_graphs_it_never_saw():
    answers = Answers.drawn(11)
    edges = dict(zip(answers.graph.split()[::2], answers.graph.split()[1::2], strict=True))
    node = start = answers.graph.split()[0]
    for k, (question, right, _, by_four) in enumerate(answers.asked, start=1):
        node = edges[node]
        assert (question, right) == (f"HOP_{k} {start}", node) and by_four in edges
    for name, score in answers.scores.items():
        said = RunFolder.open(shipped.find(name)).report()["eval"]
        assert sum(score.total.values()) == 8 * 64 * 8
        assert score.accuracy == pytest.approx(said["accuracy"], abs=0.03)
    assert answers.scores["depo-N4"].per_difficulty[4] - answers.scores["depo-N1"].per_difficulty[4] > 0.5
    assert Answers.drawn(12).graph != answers.graph


def test_the_committed_result_was_made_with_these_settings():
    for name in ("depo", "rule110"):
        result, cells = committed(name), RECIPES[name].cells("demo")
        steps = {r["cell"]: r["step"] for r in result.rows if r["budget"] in ("both", "tokens")}
        assert steps == {c.label: c.config.train.steps for c in cells if c.budget in ("both", "tokens")}
        longer = {r["cell"]: r["step"] for r in result.rows if r["budget"] == "compute"}
        for cell in cells:
            if cell.budget == "compute":  # what else than products is counted has changed since
                assert longer[cell.label] == pytest.approx(cell.config.train.steps, rel=0.01)
        assert {row["seed"] for row in result.rows} == {0, 1, 2, 3, 4}


def test_the_tables_in_the_documentation_are_those_of_the_committed_result():
    blocks = publish.blocks()
    texts = [page.read_text() for page in publish.PAGES]
    assert all(any(f"<!-- {name} -->" in text for text in texts) for name in blocks)
    assert all(published(text, blocks) == text for text in texts)
    for name in ("depo", "rule110"):
        assert committed(name).page() in (Path(publish.COMMITTED) / name / "README.md").read_text()
