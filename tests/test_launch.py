import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import fake_slurm
import pytest
import torch
from conftest import run_command

import lmsleep
from lmsleep import HybridConfig, SleepConfig
from lmsleep.tasks import Rule110
from lmsleep.training import (
    Job,
    RunConfig,
    RunFolder,
    TrainConfig,
    Trainer,
    find_launcher,
    lease,
    run_all,
)
from lmsleep.training.launch import remote, slurm
from lmsleep.training.sources import Sources

SOURCES = Path(lmsleep.__file__).parents[1]


def config(seed: int = 0, *, steps: int = 8, **options) -> RunConfig:
    defaults = {
        "batch_size": 4, "eval_every": 8, "eval_batches": 1, "save_every": 100, "device": "cpu", "threads": 1,
    }  # fmt: skip
    return RunConfig(
        task=Rule110(width=4, states=2, t=2),
        model=HybridConfig(d_model=8, num_heads=2, mlp_dim=8, blocks=("attention", "gated_delta_net")),
        sleep=SleepConfig(window=4, passes=2),
        train=TrainConfig(steps=steps, seed=seed, decay=0.25, **{**defaults, **options}),
    )


def grid(folder: Path, steps: int = 8) -> list[Job]:
    # Two runs of other seeds, and one with a shorter twin.
    jobs = [Job(folder / f"seed{seed}", config(seed, steps=steps)) for seed in (1, 2)]
    short = Job(folder / "short", config(steps=steps // 2))
    return [*jobs, Job(folder / "long", config(steps=steps), short)]


def stages(folder: Path, launcher, workers=None) -> None:
    # A grid, and a run that begins with the weights of one of them.
    run_all(grid(folder), workers, launcher)
    after = config(5)
    after = replace(after, train=replace(after.train, start=folder / "seed1"))
    run_all([Job(folder / "after", after)], workers, launcher)


def weights(folder: Path) -> dict[str, list[torch.Tensor]]:
    names = ("seed1", "seed2", "short", "long", "after")
    found = [RunFolder.open(folder / name) for name in names]
    assert all(run.report() is not None for run in found)
    return {run.path.name: [*run.model().state_dict().values()] for run in found}


def same(one, other) -> bool:
    return all(torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True))


def steps_logged(run: Path) -> list[int]:
    return [line["step"] for line in RunFolder(run).metrics() if "loss" in line]


def wait_for(what, seconds: float = 120.0):
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    # What the runs of `stages` are, made one after the other in this process.
    folder = tmp_path_factory.mktemp("expected")
    for job in grid(folder):
        job.train()
    after = config(5)
    after = replace(after, train=replace(after.train, start=folder / "seed1"))
    Job(folder / "after", after).train()
    return weights(folder)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    # A Slurm of this machine; its jobs see these sources.
    folder = tmp_path / "slurm"
    for name, value in fake_slurm.install(folder).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(fake_slurm, "HERE", folder)
    monkeypatch.setattr(slurm, "POLL", 0.2)
    packages = [str(SOURCES), *sys.path]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(packages))
    yield folder
    # Whatever a test that failed has left: they run until they are done, and requeue nothing.
    for task, state in fake_slurm.states(folder).items():
        if state in ("PENDING", "RUNNING", "REQUEUED"):
            fake_slurm.scancel(task)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Slurm


@pytest.mark.slow
def test_a_grid_over_slurm_is_what_it_is_here(cluster, here, expected):
    launcher = find_launcher("slurm", ["partition=tests", "gpus_per_node=0", "time=7", "comment=two words"])
    stages(Path("runs"), launcher, workers=2)  # relative, while jobs run anywhere
    assert same(weights(here / "runs"), expected)
    array, alone = (path.read_text() for path in sorted(cluster.glob("*.sh")))
    assert "--array=0-2%2" in array and "--array" not in alone
    for line in ("--partition=tests", "--time=7", "--job-name=lmsleep", "--comment='two words'"):
        assert f"#SBATCH {line}\n" in array
    assert not [*here.glob("runs/.slurm/*.json")]
    run_all(grid(Path("runs")), launcher=launcher)  # nothing is submitted again
    assert len([*cluster.glob("*.sh")]) == 2


@pytest.mark.slow
def test_a_job_whose_time_is_nearly_up_saves_its_run_and_goes_on(cluster, here):
    job = Job(here / "run", config(steps=120, save_every=1000))
    launcher = find_launcher("slurm")
    waiting = threading.Thread(target=lambda: [*launcher.run([job], None)])
    waiting.start()
    wait_for(lambda: steps_logged(job.path))
    fake_slurm.send("100", slurm.SIGNAL)
    waiting.join(120)
    assert RunFolder.open(job.path).report()["step"] == 120
    log = (here / ".slurm/100_0_log.out").read_text()
    assert "Requeued job 100" in log and "stopped after step" in log
    Job(here / "alone", job.config).train()
    models = (RunFolder(here / name).model().state_dict() for name in ("run", "alone"))
    assert all(torch.equal(*both) for both in zip(*(model.values() for model in models), strict=True))


@pytest.mark.slow
def test_a_failed_job_is_named_with_its_log_and_the_others_finish(cluster, here):
    jobs = grid(Path("runs"))
    other = replace(jobs[2], shorter=Job(Path("runs/short"), config(steps=4, lr=0.5)))
    with pytest.raises(RuntimeError) as failed:
        run_all([*jobs[:2], other], launcher=find_launcher("slurm"))
    said = str(failed.value)
    assert said.startswith("runs/long: ") and "in its steps alone" in said and "\n" not in said
    log = Path(said.rpartition("(log: ")[2].rstrip(")"))
    assert "Traceback" in log.read_text()
    assert all(job.finished() for job in jobs[:2])


@pytest.mark.slow
def test_a_job_that_dies_is_named_and_the_same_call_goes_on_from_its_checkpoint(cluster, here, monkeypatch):
    monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 0)
    job = Job(here / "run", config(steps=200, save_every=10))
    launcher, ended = find_launcher("slurm"), []
    waiting = threading.Thread(target=lambda: ended.extend(launcher.run([job], None)))
    waiting.start()
    wait_for(lambda: RunFolder(job.path).checkpoints())
    fake_slurm.send("100", signal.SIGKILL)
    waiting.join(120)
    assert ended[0].path == job.path and "log: " in ended[0].error and "\n" not in ended[0].error
    assert not job.finished()
    begun = int(RunFolder(job.path).latest().name[-8:])
    assert begun > 0
    run_all([job], launcher=launcher)
    assert job.finished() and steps_logged(job.path) == [*range(10, 201, 10)]


KILLED = """
import sys
from test_launch import find_launcher, run_all, two
if __name__ == "__main__":
    run_all(two(), 1, find_launcher("slurm"))
"""


@pytest.fixture
def submitter(cluster, here):
    (here / "submitter.py").write_text(KILLED)
    process = subprocess.Popen(
        [sys.executable, "submitter.py"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], str(Path(__file__).parent)]),
        },
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


def two(steps: int = 300) -> list[Job]:
    return [Job(Path("run"), config(steps=steps)), Job(Path("run2"), config(1, steps=steps))]


@pytest.mark.slow
def test_a_killed_submitter_leaves_jobs_that_the_same_command_finds(cluster, here, submitter, capfd):
    wait_for(lambda: steps_logged(Path("run")))
    submitter.kill()
    assert "PENDING" in fake_slurm.states(cluster).values()
    # Another version must not wait for what these sources do.
    record = here / ".slurm/run2.json"
    said = record.read_text()
    record.write_text(json.dumps({**json.loads(said), "files": "others"}))
    with pytest.raises(ValueError, match=r"with Slurm as job 100_1, by other sources"):
        run_all(two(), launcher=find_launcher("slurm"))
    record.write_text(said)
    run_all(two(), launcher=find_launcher("slurm"))
    assert "run2 is with Slurm already, as job 100_1" in capfd.readouterr().err
    assert all(job.finished() for job in two())
    assert len([*cluster.glob("*.sh")]) == 1
    assert steps_logged(Path("run")) == [*range(10, 301, 10)]  # trained once


@pytest.mark.slow
def test_ctrl_c_cancels_what_was_submitted_and_runs_save_themselves(cluster, here, submitter):
    wait_for(lambda: steps_logged(Path("run")))
    submitter.send_signal(signal.SIGINT)
    _, err = submitter.communicate(timeout=60)
    assert "stopped; the same command goes on where it was" in err
    assert set(fake_slurm.states(cluster).values()) == {"CANCELLED"}
    wait_for(lambda: RunFolder(Path("run")).checkpoints())  # no step was a multiple of save_every
    assert not Path("run2").exists() and not [*here.glob(".slurm/*.json")]
    run_all(two(), launcher=find_launcher("slurm"))
    assert all(job.finished() for job in two())


# submitit's debug executor leaves its logs open
unclosed = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@unclosed
@pytest.mark.parametrize("where", [pytest.param("local", marks=pytest.mark.slow), "debug"])
def test_submitit_without_slurm(here, where, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SOURCES), *sys.path]))
    monkeypatch.setattr(slurm, "POLL", 0.2)
    job = Job(Path("run"), config())
    run_all([job], launcher=find_launcher("slurm", [f"cluster={where}"]))
    assert job.finished()


# What launchers are told


def test_other_sources_are_refused(here):
    job = Job(here / "run", config())
    mine = Sources.here()
    assert mine == replace(mine, name="the same files under another commit")
    said = remote.Work(job, replace(mine, files="a" * 64)).done()
    assert said is not None and socket.gethostname() in said and "files aaaaaaaaaaaa" in said
    assert not job.path.exists()
    assert remote.Work(job, mine).done() is None and job.finished()


REPRODUCE = ("reproduce", "3", "--steps", 1)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([*REPRODUCE, "--launcher", "kubernetes"], "kubernetes"),
        ([*REPRODUCE, "--launcher", "slurm"], "no srun on this machine"),
        ([*REPRODUCE, "--launcher-options", "a=1"], "the launcher local has none, got a"),
        ([*REPRODUCE, "--launcher", "slurm", "--launcher-options", "fast"], "'fast' is not KEY=VALUE"),
        ([*REPRODUCE, "--launcher", "slurm", "--launcher-options", "a=1", "a=2"], "a is named twice"),
        ([*REPRODUCE, "--launcher", "slurm", "--launcher-options", "nodes=2"], "a run is one process"),
        (
            [*REPRODUCE, "--launcher", "slurm", "--launcher-options", "array_parallelism=2"],
            "name --workers",
        ),
        ([*REPRODUCE, "--launcher", "slurm", "--launcher-options", "time=01:00:00"], "a whole number"),
        ([*REPRODUCE, "--launcher", "slurm", "--launcher-options", "time=1", "timeout_min=1"], "said twice"),
        (
            [*REPRODUCE, "--launcher", "slurm", "--launcher-options", "cluster=debug", "fast=1"],
            "Unknown argument 'fast'",
        ),
        (
            [*REPRODUCE, "--launcher", "slurm", "--launcher-options", "cluster=debug", "gpus_per_node=many"],
            "gpus_per_node",
        ),
        ([*REPRODUCE, "--launcher", "slurm", "--launcher-options", "cluster=moon"], "moon"),
        (["reproduce", "6", "--launcher", "slurm", "--launcher-options", "cluster=debug"], "is timed in one"),
        (["demo", "--launcher", "slurm"], "no srun on this machine"),
    ],
)
def test_what_a_launcher_cannot_do_is_one_line(argv, said, here, capsys):
    code, out, err = run_command(capsys, *argv)
    assert code == 2 and said in err and err.count("\n") == 1, err
    assert not out and not list(here.iterdir())


@pytest.mark.parametrize(("name", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_package_that_is_missing_is_named_with_its_extra(name, package, here, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"lmsleep.training.launch.{name}", raising=False)
    code, _, err = run_command(capsys, *REPRODUCE, "--launcher", name)
    assert code == 2 and f"launcher={name} needs {package}: pip install 'lmsleep[{name}]'" in err
    assert not list(here.iterdir())


@unclosed
def test_a_grid_is_reproduced_over_a_launcher(here, capsys):
    argv = ["--launcher", "slurm", "--launcher-options", "cluster=debug"]
    code, out, err = run_command(capsys, "reproduce", "3", "--steps", 1, *argv)
    assert code == 0 and "N = 4" in out, err
    assert (here / "results/3-demo-1-steps/figure.png").exists()


# Leases


@pytest.fixture
def elsewhere(monkeypatch):
    # From here on this process seems to be on another machine, where locks of this one are not known.
    def move():
        monkeypatch.setattr(lease, "_machine", lambda: "another boot")
        monkeypatch.setattr(socket, "gethostname", lambda: "node2")

    return move


def test_a_run_is_trained_by_one_machine_at_a_time(here, elsewhere, monkeypatch):
    monkeypatch.setattr(lease, "SETTLE", 0.1)
    run = RunFolder(here / "run")
    with run.locked():
        (run.path / ".training.lock").unlink()  # as on a file system whose locks end at the machine
        host = socket.gethostname()
        elsewhere()
        with pytest.raises(ValueError, match=rf"trained by process {os.getpid()} on {host}; wait for it"):
            RunFolder(here / "run").locked().__enter__()
        monkeypatch.setattr(lease, "LOST", 0.0)  # its machine is gone
        with RunFolder(here / "run").locked():
            assert "node2" in (run.path / ".training.lease").read_text()
        assert not (run.path / ".training.lease").exists()
    assert not [*run.path.iterdir()]


def test_a_lease_is_kept_alive_and_does_not_outlive_its_holder(here, monkeypatch):
    monkeypatch.setattr(lease, "SETTLE", 0.1)
    monkeypatch.setattr(lease, "BEAT", 0.05)
    path = here / "lease"
    with lease.leased(path, alone=True):
        os.utime(path, (1, 1))
        wait_for(lambda: path.stat().st_mtime > 1)
    assert not path.exists()
    path.touch()  # of one that was killed before it could sign
    with lease.leased(path, alone=True):
        assert str(os.getpid()) in path.read_text()
    assert not [*here.iterdir()]


def test_who_waits_for_a_run_goes_on_with_what_the_other_one_made_of_it(here, monkeypatch):
    monkeypatch.setattr("lmsleep.training.runs.PAUSE", 0.05)
    job = Job(here / "run", config())
    Trainer.begin(job.path, job.config)
    first = RunFolder.open(job.path)
    with first.locked():
        waiting = threading.Thread(target=lambda: job.train(patience=60))
        waiting.start()
        time.sleep(0.2)
        Trainer(first, job.config).fit()
        report = (job.path / "report.json").read_bytes()
    waiting.join(60)
    assert (job.path / "report.json").read_bytes() == report
