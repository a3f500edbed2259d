# The day on a GPU: rehearsed on the CPU, and how parts end, are noted and gone on with.
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benchmarks.gpu import command, cuda_tests, environment, passes, updates
from benchmarks.gpu.page import NOTHING, as_block, publish
from benchmarks.gpu.part import Disagrees, Outcome, Part, Try
from benchmarks.gpu.plan import PARTS, WHOLE
from benchmarks.processor import Processor
from gpu_parts import TABLE

from lmsleep.recipes.catalogue import RECIPES
from lmsleep.training import Interrupted, Job, RunFolder, Trainer

ROOT = Path(__file__).parents[1]
CPU = Processor(torch.device("cpu"), tiny=True)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rehearsal")
    argv = [sys.executable, "-m", "benchmarks", "gpu", "--rehearse", "--minutes", "600"]
    done = subprocess.run(argv, cwd=ROOT, env={**os.environ, "TMPDIR": str(folder)}, capture_output=True)
    (where,) = folder.glob("lmsleep-rehearsal-*")
    found = {path.stem: json.loads(path.read_bytes()) for path in where.glob("*.json")}
    return done, found


@pytest.mark.timeout(900)  # eleven processes, on cores that others use too
def test_a_rehearsal_makes_every_part(rehearsal):
    done, found = rehearsal
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    assert {*found} == {part.name for part in PARTS}
    for part in PARTS:
        result = found[part.name]
        assert result["rehearsal"] and result["rows"] and not {"error", "unfinished"} & {*result}
        made = result["made_by"]
        assert {"commit", "hardware", "packages", "torch", "seed"} <= {*made}
        assert made["command"] == "python -m benchmarks gpu --rehearse --minutes 600"
    assert all(row["agrees"] == "yes" for row in found["kernels"]["rows"])
    assert {row["N"] for row in found["kernels"]["rows"]} == {1, 2, 4}
    assert found["tests"]["rows"] == [
        {"file": "tests/test_muon.py", "passed": 1, "failed": 0, "skipped": 0, "what failed": ""}
    ]
    for name in ("automaton", "depo", "joined"):
        assert [row["N"] for row in found[name]["rows"]] == [1, 2, 4]
    assert [row["steps"] for row in found["figure-2a"]["rows"]] == [4, 4]
    assert sum(len(json.dumps(result)) for result in found.values()) < 100_000


def test_a_rehearsal_is_no_result(rehearsal):
    done, _ = rehearsal
    assert "says nothing about a GPU" in done.stdout.decode()
    path = ROOT / "benchmarks/results/gpu"
    assert not [p for p in path.glob("*.json") if json.loads(p.read_bytes()).get("rehearsal")]


def test_parts_fit_into_the_minutes():
    assert sum(part.seconds for part in PARTS) <= WHOLE
    assert PARTS[-1].name == "figure-2a"


@pytest.fixture
def day(tmp_path, monkeypatch):
    # A day of parts that end in every way, as on a machine with a GPU.
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(command, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(command, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    names = {"good": 200, "wrong": 200, "dies": 200, "hangs": 1}
    parts = tuple(Part(name, name.title(), share, f"gpu_parts:{name}") for name, share in names.items())
    for module in ("command", "page"):
        monkeypatch.setattr(f"benchmarks.gpu.{module}.PARTS", parts)
    monkeypatch.setenv("GPU_PARTS", str(tmp_path / "told"))
    (tmp_path / "told").write_text("wrong\n")
    (tmp_path / "page.md").write_text("before\n<!-- benchmark:gpu -->\nold\n<!-- end -->\nafter\n")

    monkeypatch.setenv("TRITON_CACHE_AUTOTUNING", "1")
    handler = signal.getsignal(signal.SIGTERM)

    def run(*argv):
        with pytest.raises(SystemExit) as leaving:
            command.main([*argv])
        signal.signal(signal.SIGTERM, handler)
        found = {path.stem: json.loads(path.read_bytes()) for path in (tmp_path / "results").glob("*.json")}
        return leaving.value.code, found

    return SimpleNamespace(run=run, told=tmp_path / "told", page=tmp_path / "page.md")


def test_a_part_that_fails_stops_no_other_and_what_is_done_stays(day, capfd):
    code, found = day.run("--only", "good", "wrong", "dies", "--commit", "abc")
    assert code == 1 and found["good"]["rows"] == [{"a": 1}]
    assert found["wrong"]["error"] == "Disagrees: 1 of 2 differs" and found["wrong"]["rows"] == [{"a": 1}]
    assert found["dies"] == {"error": "the process of this part ended with code 3"}
    page = day.page.read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert "### Good" in page and "**Failed**: Disagrees: 1 of 2 differs" in page
    day.told.write_text("")
    code, found = day.run("--only", "good", "wrong")
    assert code == 0 and "error" not in found["wrong"] and "good" not in day.told.read_text()
    assert "done before" in capfd.readouterr().out
    assert day.run("--only", "good", "--again")[0] == 0 and day.told.read_text() == "good\n"


def test_a_part_that_takes_too_long_is_stopped_and_goes_on_another_time(day):
    code, found = day.run("--only", "hangs", "--minutes", str(12 / 60))  # two seconds and the grace
    assert code == 0 and "the same command goes on" in found["hangs"]["unfinished"]
    assert not Outcome(day.page.parent / "results/hangs.json", {}, False).finished()


def test_what_is_kept_on_the_way_is_not_the_end(tmp_path):
    outcome = Outcome(tmp_path / "a.json", {"command": "c", "commit": None}, False)
    outcome.write(TABLE, unfinished="stopped")
    assert not outcome.finished() and outcome.read()["rows"] == TABLE.rows
    outcome.write(error="why")  # the table stays
    assert not outcome.finished() and outcome.read()["rows"] == TABLE.rows
    outcome.write(TABLE)
    assert outcome.finished() and not Outcome(outcome.path, {}, True).finished()
    outcome.path.write_text("{")
    assert not outcome.finished()


def test_runs_of_the_figure_are_gone_on_with(tmp_path, monkeypatch):
    kept = []
    run = Try(CPU, True, tmp_path, {}, kept.append)
    train, begun = Job.train, []

    def stopped(job):
        begun.append(job.path.name)
        if len(begun) < 2:
            return train(job)
        Trainer.begin(job.path, job.config).fit(until=2)
        raise Interrupted(15, "stopped after step 2; to go on: ...")

    monkeypatch.setattr(Job, "train", stopped)
    with pytest.raises(Interrupted):
        updates.updates(run)
    first, second = kept[-1].rows
    assert first["steps"] == 4 and first[updates.END] and not second[updates.END]
    assert (second["after 2"] is None, second["after 4"]) == (False, None)
    shutil.rmtree(tmp_path / begun[0])  # as on another machine
    monkeypatch.setattr(Job, "train", train)
    before = {"rows": kept[-1].rows, "note": kept[-1].note}
    rows = updates.updates(Try(CPU, True, tmp_path, before, kept.append)).rows
    assert rows[0] == first and not (tmp_path / begun[0]).exists()
    assert rows[1]["steps"] == 4 and rows[1][updates.END] and rows[1]["after 2"] == second["after 2"]
    # Of other settings nothing is taken over.
    other = {**before, "note": "another"}
    again = updates.updates(Try(CPU, True, tmp_path / "other", other, kept.append)).rows
    assert (tmp_path / "other" / begun[0]).exists() and again[0]["after 4"] == first["after 4"]


def test_the_figure_has_the_papers_budget():
    run = Try(SimpleNamespace(gpu=True), False, Path(), {}, print)
    for cell in RECIPES["2a"].cells("paper"):
        config = cell.with_train(lambda train: updates._train(run, train)).config
        assert (config.train.steps, config.train.eval_every, config.train.batch_size) == (773, 50, 512)
        length = config.task.batch(np.random.default_rng(0), 1, "train").tokens.shape[1]
        assert 39e6 < 773 * 512 * length < 41e6


@pytest.mark.gpu
def test_a_run_on_a_gpu_is_that_of_a_cpu_and_goes_on(tmp_path):
    (config, *_), losses = (cell.config for cell in RECIPES["2a"].cells("demo")), {}
    short = {"steps": 4, "batch_size": 4, "eval_every": 4, "eval_batches": 1, "save_every": 2}
    for device in ("cpu", "cuda"):
        train = replace(config.train, **short, device=device, precision="float32")
        Trainer.begin(tmp_path / device, replace(config, train=train)).fit(until=2)
        folder = RunFolder(tmp_path / device)
        Trainer.take_up(folder).fit()
        losses[device] = [record["loss"] for record in folder.metrics() if "loss" in record]
    # Muon orthogonalises in bfloat16 there.
    assert losses["cpu"] and losses["cuda"] == pytest.approx(losses["cpu"], rel=0.05)


def test_kernels_that_disagree_are_named(monkeypatch, tmp_path):
    kept = []
    monkeypatch.setattr(passes, "_error", lambda *_: float("nan"))
    with pytest.raises(Disagrees, match="6 of 6 cases"):
        passes.kernels(Try(CPU, True, tmp_path, {}, kept.append))
    assert {row["agrees"] for row in kept[-1].rows} == {"no"}


def test_failed_tests_are_counted_and_named(monkeypatch, tmp_path):
    reports = [
        ("call", "passed", "tests/test_a.py::test_b"),
        ("setup", "passed", "tests/test_a.py::test_c"),
        ("call", "failed", "tests/test_a.py::test_c"),
        ("setup", "skipped", "tests/test_d.py::test_e"),
    ]

    def main(argv, plugins):
        for when, outcome, node in reports:
            plugins[0].pytest_runtest_logreport(
                SimpleNamespace(when=when, outcome=outcome, nodeid=node, longrepr="where\nwhy")
            )
        return 1

    kept = []
    monkeypatch.setattr(pytest, "main", main)
    with pytest.raises(Disagrees, match="1 tests failed"):
        cuda_tests.cuda_tests(Try(CPU, True, tmp_path, {}, kept.append))
    assert [[*row.values()] for row in kept[-1].rows] == [
        ["tests/test_a.py", 1, 1, 0, "test_c: why"],
        ["tests/test_d.py", 0, 0, 1, ""],
    ]
    reports.clear()
    with pytest.raises(RuntimeError, match="ran no test"):
        cuda_tests.cuda_tests(Try(CPU, True, tmp_path, {}, kept.append))
    assert {Path(path).name for path in cuda_tests.files()} >= {"test_ops.py", "test_muon.py"}


def test_the_page_shows_the_committed_results():
    results = {path.stem: json.loads(path.read_bytes()) for path in command.RESULTS.glob("*.json")}
    text = command.PAGE.read_text()
    assert f"<!-- benchmark:gpu -->\n{as_block(results)}\n<!-- end -->" in text
    assert as_block({}) == NOTHING


def test_publishing_changes_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- benchmark:gpu -->\n<!-- end -->\nb\n")
    publish({"floors": {"unfinished": "no time"}}, page)
    said = "### What the machine can do\n\nNot all of it: no time"
    assert page.read_text() == f"a\n<!-- benchmark:gpu -->\n{said}\n<!-- end -->\nb\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--rehearse"),
        (["--minutes", "0"], "--minutes must be more than 0, got 0"),
        (["--minutes", "nan"], "--minutes"),
        (["--only", "nosuch"], "nosuch"),
        (["--bogus"], "--bogus"),
    ],
)
def test_what_does_not_fit_is_one_line(argv, said, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as leaving:
        command.main(argv)
    out, err = capsys.readouterr()
    assert leaving.value.code == 2 and not out and said in err and err.count("\n") == 1


def test_the_environment_keeps_the_torch_that_is_there(tmp_path, monkeypatch, capsys):
    said = []

    def run(command, check):
        said.append(command)
        return SimpleNamespace(returncode=int(any("flash" in word for word in command)))

    monkeypatch.setattr(
        environment.venv, "create", lambda folder, **_: (folder / "lib/x/site-packages").mkdir(parents=True)
    )
    monkeypatch.setattr(environment.subprocess, "run", run)
    environment.main([str(tmp_path / "env"), "--wheels", str(tmp_path)])
    assert (tmp_path / "env/torch.txt").read_text() == f"torch=={torch.__version__}\n"
    (pth,) = tmp_path.glob("env/lib/x/site-packages/machine.pth")
    assert str(Path(torch.__file__).parents[1]) in pth.read_text().splitlines()
    assert all({"--no-index", "--find-links", str(tmp_path)} <= {*command} for command in said)
    assert any(word.startswith("torch>=") for word in said[0])
    assert [command[-1].split(">")[0] for command in said[1:]] == [
        "transformers", "flash-linear-attention", "hypothesis", "pytest", "pytest-timeout"
    ]  # fmt: skip
    assert "without flash-linear-attention" in capsys.readouterr().out
    monkeypatch.setattr(environment.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    with pytest.raises(SystemExit) as leaving:
        environment.main([str(tmp_path / "other")])
    assert leaving.value.code == 1 and "pip could not install" in capsys.readouterr().err
