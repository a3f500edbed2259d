"""Runs as people start them: torchrun itself, its signals, its children."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from test_processes import TINY, metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
WAIT = 200  # seconds
LONG = (*TINY, "--steps", "4000", "--save-every", "4000")


@pytest.fixture
def begin():
    begun = []
    yield lambda *given: begun.append(_begin(*given)) or begun[-1]
    for process in begun:  # whatever a test that failed has left; ranks are in sessions of their own
        with suppress(ProcessLookupError, FileNotFoundError):
            for pid in (process.pid, *ranks_of(process)):
                os.kill(pid, signal.SIGKILL)


def _begin(folder, *words):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "lmsleep")
    return subprocess.Popen(
        [sys.executable, *launch, *words], cwd=folder, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip


def end(process):
    out, errors = process.communicate(timeout=WAIT)
    said = [line for line in errors.splitlines() if line.startswith("lmsleep: ")]
    return process.returncode, out, said


def ranks_of(process):
    """The processes that torchrun has started, once they take steps."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def until_it_trains(run, step=0):
    until = time.monotonic() + WAIT
    while not (run / "metrics.jsonl").exists() or max([0, *(m["step"] for m in metrics(run))]) <= step:
        assert time.monotonic() < until
        time.sleep(0.5)


@pytest.mark.parametrize("shard", [(), ("--shard", "2")])
def test_a_run_to_its_end(begin, shard, tmp_path):
    code, out, said = end(begin(tmp_path, *TINY, "--out", "run", *shard))
    assert (code, said) == (0, [])
    assert out.count("run is complete") == 1
    assert metrics(tmp_path / "run")[-1]["step"] == 6


@pytest.mark.parametrize("whom", ["torchrun", "all, as Ctrl-C does", "one"])
def test_a_signal_stops_it_and_it_goes_on(begin, whom, tmp_path):
    process = begin(tmp_path, *LONG, "--out", "run")
    until_it_trains(tmp_path / "run")
    match whom:
        case "torchrun":
            process.send_signal(signal.SIGTERM)
        case "one":
            os.kill(ranks_of(process)[1], signal.SIGTERM)
        case _:
            os.killpg(process.pid, signal.SIGINT)
    code, _, said = end(process)
    [line] = said
    assert code != 0 and line.startswith("lmsleep: stopped after step ")
    [saved] = (tmp_path / "run" / "checkpoints").iterdir()
    assert f"stopped after step {int(saved.name[-8:])};" in line
    again = begin(tmp_path, "train", "--resume", "run")
    until_it_trains(tmp_path / "run", int(saved.name[-8:]))
    again.send_signal(signal.SIGTERM)
    assert "lmsleep: stopped after step " in end(again)[2][0]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_is_killed_ends_it_and_leaves_nobody(begin, rank, tmp_path):
    process = begin(tmp_path, *LONG, "--out", "run")
    until_it_trains(tmp_path / "run")
    children = ranks_of(process)
    os.kill(children[rank], signal.SIGKILL)
    code, _, said = end(process)
    [line] = said
    assert code == 1 and line.startswith("lmsleep: a process of this run has ended")
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


def test_when_torchrun_is_killed_its_processes_save_the_run_and_end(begin, tmp_path):
    process = begin(tmp_path, *LONG, "--out", "run")
    until_it_trains(tmp_path / "run")
    process.kill()
    # Its pipes are theirs too: they are read to the end when the last of them has ended.
    code, _, said = end(process)
    assert code == -signal.SIGKILL
    assert said and all(line.startswith("lmsleep: stopped after step ") for line in said)
    assert len([*(tmp_path / "run" / "checkpoints").iterdir()]) == 1
