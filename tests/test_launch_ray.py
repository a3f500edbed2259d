import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import run_command
from test_launch import SOURCES, config, expected, grid, here, same, stages, steps_logged, wait_for, weights

from lmsleep.training import Job, RunFolder, find_launcher, run_all, sources

__all__ = ["expected", "here"]  # fixtures
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def ray(monkeypatch):
    # A cluster of this machine, of two cores, for each test; its workers see these sources.
    ray = pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    paths = [str(SOURCES), str(Path(__file__).parent), *sys.path]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


def process_of(job: Job) -> int:
    return json.loads((job.path / ".training.lease").read_text())["pid"]


def test_a_grid_over_ray_is_what_it_is_here(here, expected):
    # Named by a relative path, while workers are elsewhere.
    stages(Path("runs"), find_launcher("ray", ["num_cpus=1"]), workers=2)
    assert same(weights(here / "runs"), expected)


def test_a_worker_that_is_killed_is_done_again_and_a_failed_job_is_named(here):
    # The last of them fails, the first is killed on the way.
    (first, second, long) = grid(Path("runs"))
    first = replace(first, config=config(1, steps=400, save_every=20))
    failing = replace(long, shorter=Job(Path("runs/short"), config(steps=4, lr=0.5)))

    def kill():
        wait_for(lambda: RunFolder(first.path).checkpoints())
        os.kill(process_of(first), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RuntimeError) as failed:
        run_all([first, second, failing], launcher=find_launcher("ray"))
    killer.join()
    said = str(failed.value)
    assert said.startswith("runs/long: ") and "in its steps alone (log: " in said and "\n" not in said
    assert "Traceback" in Path(said.rpartition("(log: ")[2].rstrip(")")).read_text()
    assert first.finished() and second.finished()
    assert steps_logged(first.path) == [*range(10, 401, 10)]


def test_a_worker_that_is_told_to_go_saves_its_run_first(here):
    job = Job(Path("run"), config(steps=400, save_every=1000))

    def leave():
        wait_for(lambda: steps_logged(job.path))
        os.kill(process_of(job), signal.SIGTERM)
        # Not a multiple of anything: it was saved where it was.
        seen.append(wait_for(lambda: RunFolder(job.path).checkpoints())[0].name)

    seen = []
    leaver = threading.Thread(target=leave)
    leaver.start()
    run_all([job], launcher=find_launcher("ray"))
    leaver.join()
    assert job.finished() and seen[0] != "step-00000400"
    assert steps_logged(job.path) == [*range(10, 401, 10)]


SUBMITTER = """
from test_launch import find_launcher, run_all, two
if __name__ == "__main__":
    run_all(two(), None, find_launcher("ray", ["num_cpus=1"]))
"""


def test_ctrl_c_stops_the_tasks_and_their_runs_save_themselves(here, ray):
    ray.shutdown()
    (here / "submitter.py").write_text(SUBMITTER)
    process = subprocess.Popen([sys.executable, "submitter.py"], stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: steps_logged(Path("run")))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert "stopped; the same command goes on where it was" in err
    assert RunFolder(Path("run")).checkpoints()


def test_other_sources_are_refused_by_workers(here, monkeypatch):
    job = Job(Path("run"), config())
    other = sources.Sources("a" * 64, "of another commit")
    monkeypatch.setattr(sources.Sources, "here", classmethod(lambda _: other))
    with pytest.raises(RuntimeError, match=r"run: .* other sources .* \(of another commit"):
        run_all([job], launcher=find_launcher("ray"))
    assert not job.path.exists()


def test_a_bad_option_is_one_line(here, capsys):
    argv = ("reproduce", "3", "--steps", 1, "--launcher", "ray", "--launcher-options", "fast=1")
    code, _, err = run_command(capsys, *argv)
    assert code == 2 and "launcher_options: " in err and "fast" in err and err.count("\n") == 1
