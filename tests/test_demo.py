import json
import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from lmsleep.cli import main
from lmsleep.demo import settings
from lmsleep.demo.command import committed_result
from lmsleep.demo.report import as_text, table
from lmsleep.demo.runs import PASSES, demo_jobs, equal_steps
from lmsleep.training import Job, RunConfig, RunFolder, Trainer, flops_per_step, run_all


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    main(["demo", "--out", str(out), "--scale", "0.004", "--workers", "2"])
    return out


@pytest.mark.parametrize("make", [settings.depo, settings.rule110])
def test_equal_compute_is_equal_to_within_a_step(make):
    budget = 100 * flops_per_step(make(4, 0, 1))
    for passes in PASSES:
        spent = equal_steps(make, passes, 100) * flops_per_step(make(passes, 0, 1))
        assert 0 <= budget - spent < flops_per_step(make(passes, 0, 1))


def test_models_differ_in_their_passes_and_tuned_settings_alone(tmp_path):
    jobs = {j.path.name: j for j in demo_jobs(tmp_path, [0, 1], ["depo"])}
    assert {"depo-N1-seed0", "depo-N2-seed1", "depo-N4-seed0", "depo-transformer-cached-seed0"} <= jobs.keys()
    four, one = jobs["depo-N4-seed0"].config, jobs["depo-N1-seed0"]
    assert one.shorter is not None and one.shorter.config.train.steps == four.train.steps
    assert (one.config.task, one.config.model) == (four.task, four.model)
    assert one.config.sleep == replace(four.sleep, passes=1)
    tuned = set().union(*settings.DEPO_TUNED.values())
    same = {k: v for k, v in vars(one.config.train).items() if k not in {"steps", *tuned}}
    assert same == {k: v for k, v in vars(four.train).items() if k in same}


def test_a_shorter_run_that_shares_its_start_equals_one_trained_alone(tmp_path):
    config = settings.depo(2, 0, 20, curriculum=10, eval_every=5)
    short = replace(config, train=replace(config.train, steps=10))
    run_all([Job(tmp_path / "long", config, Job(tmp_path / "short", short))], workers=1)
    alone = Trainer(RunFolder.create(tmp_path / "alone", short), short)
    alone.fit()

    def exact(path):
        return [{k: v for k, v in m.items() if k != "seconds"} for m in RunFolder.open(path).metrics()]

    assert exact(tmp_path / "short") == exact(tmp_path / "alone")
    assert RunFolder.open(tmp_path / "long").report()["step"] == 20


def test_a_branch_of_another_configuration_is_refused(tmp_path):
    config = settings.depo(2, 0, 20)
    other = replace(config, train=replace(config.train, steps=10, lr=0.5))
    with pytest.raises(RuntimeError, match=r"must differ from .* in its steps alone"):
        run_all([Job(tmp_path / "long", config, Job(tmp_path / "short", other))], workers=1)


def test_finished_runs_are_not_repeated_and_foreign_ones_refused(demo, capsys):
    before = {p: p.stat().st_mtime_ns for p in demo.rglob("report.json")}
    main(["demo", "--out", str(demo), "--scale", "0.004", "--json"])
    assert before == {p: p.stat().st_mtime_ns for p in demo.rglob("report.json")}
    assert json.loads(capsys.readouterr().out)["depo"]["seeds"] == [0, 1]
    with pytest.raises(SystemExit) as leaving:
        main(["demo", "--out", str(demo), "--scale", "0.005"])
    assert leaving.value.code == 2 and "another configuration" in capsys.readouterr().err


def test_page_and_table_hold_every_row(demo):
    result = json.loads((demo / "results.json").read_text())
    lines = table(result, "depo")
    assert [line[:2] for line in lines[1:]] == [
        *(["tokens", f"hybrid, N = {n}"] for n in PASSES),
        ["tokens", "transformer, cache evicted"],
        ["tokens", "transformer, cache kept"],
        *(["compute", f"hybrid, N = {n}"] for n in PASSES),
        ["", "chance"],
        ["", "best constant answer"],
    ]
    assert len(as_text(lines).splitlines()) == len(lines) + 1
    page = (demo / "demo.html").read_text()
    # The letters of a picture in base64 spell anything by chance, so the text is looked at without them.
    text, pictures = re.subn(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page)
    assert pictures > 0 and "http" not in text
    assert page.count("<tr>") >= len(lines)


def test_the_committed_result_was_made_with_these_settings():
    result = committed_result()
    assert "depo" in result
    for task, part in result.items():
        make = getattr(settings, task)
        steps = part["config"]["train"]["steps"]
        assert RunConfig.from_dict(part["config"]) == make(4, 0, steps)
        assert part["tuned"] == {str(n): t for n, t in getattr(settings, f"{task.upper()}_TUNED").items()}
        seeds = {r["seed"] for r in part["rows"] if r["label"] == "hybrid, N = 4"}
        assert len(seeds) >= 5


def test_the_tables_in_the_documentation_are_those_of_the_committed_result():
    root = Path(__file__).parents[1]
    publish = runpy.run_path(str(root / "experiments/publish.py"))
    for page in publish["PAGES"]:
        text = page.read_text()
        assert "<!-- table:depo -->" in text
        assert publish["with_tables"](text, committed_result()) == text
