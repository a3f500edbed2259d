"""A Slurm of one machine, as far as submitit knows it: `sbatch`, `srun`, `sacct`, `scancel` and `scontrol`.

State is a folder (`FAKE_SLURM`): for every task of an array a file ID.state and, while it runs, ID.pid.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(os.environ.get("FAKE_SLURM", "."))


def install(folder: Path) -> dict[str, str]:
    # The environment in which its commands are found first.
    (folder / "bin").mkdir(parents=True)
    for name in ("sbatch", "srun", "sacct", "scancel", "scontrol"):
        command = folder / "bin" / name
        command.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        command.chmod(0o755)
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FAKE_SLURM": str(folder)}


def states(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.state"))}


def sbatch(script: str) -> None:
    text, number = Path(script).read_text(), len([*HERE.glob("*.sh")]) + 100
    # What the tests look at.
    (HERE / f"{number}.sh").write_text(text)
    array = re.search(r"--array=0-(\d+)%(\d+)", text)
    tasks = [f"{number}_{i}" for i in range(int(array[1]) + 1)] if array else [str(number)]
    for task in tasks:
        (HERE / f"{task}.state").write_text("PENDING")
    controller = [sys.executable, __file__, "control", str(number), array[2] if array else "1", *tasks]
    none = subprocess.DEVNULL  # it outlives sbatch, whose output somebody reads to its end
    subprocess.Popen(controller, start_new_session=True, stdin=none, stdout=none, stderr=none)
    print(f"Submitted batch job {number}")


def control(number: str, width: str, *tasks: str) -> None:
    # Runs so many tasks at a time; one that was requeued runs again.
    running: dict[str, subprocess.Popen] = {}
    left = [*tasks]
    while left or running:
        for task, process in [*running.items()]:
            if process.poll() is None:
                continue
            del running[task]
            (HERE / f"{task}.pid").unlink()
            state = HERE / f"{task}.state"
            if state.read_text() == "REQUEUED":
                left.append(task)
            elif state.read_text() == "RUNNING":
                state.write_text("COMPLETED" if process.returncode == 0 else "FAILED")
        left = [task for task in left if (HERE / f"{task}.state").read_text() != "CANCELLED"]
        while left and len(running) < int(width):
            task = left.pop(0)
            environment = {**os.environ, "SLURM_JOB_ID": number}
            if "_" in task:
                environment |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": task.split("_")[1]}
            (HERE / f"{task}.state").write_text("RUNNING")
            running[task] = subprocess.Popen(["/bin/bash", HERE / f"{number}.sh"], env=environment)
            (HERE / f"{task}.pid").write_text(str(running[task].pid))
        time.sleep(0.05)


def srun(*words: str) -> None:
    output = words[words.index("--output") + 1]
    number, index = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_ARRAY_TASK_ID")
    task = f"{number}_{index}" if index else number
    for mark, value in (("%A", number), ("%a", index or ""), ("%j", task), ("%t", "0")):
        output = output.replace(mark, value)
    command = words[words.index("--output") + 2 :]
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    (HERE / f"{task}.step").write_text(str(os.getpid()))
    os.environ["SLURM_PROCID"] = "0"
    os.execvp(command[0], command)


def sacct(*words: str) -> None:
    print("JobID|State|NodeList")
    for task, state in states(HERE).items():
        if task.split("_")[0] in words:
            print(f"{task}|{state}|here")


def send(task: str, signum: signal.Signals) -> None:
    os.kill(int((HERE / f"{task}.step").read_text()), signum)


def scancel(task: str) -> None:
    before = (HERE / f"{task}.state").read_text()
    (HERE / f"{task}.state").write_text("CANCELLED")
    if before == "RUNNING":
        send(task, signal.SIGCONT)
        send(task, signal.SIGTERM)


def scontrol(word: str, task: str) -> None:
    assert word == "requeue"
    (HERE / f"{task}.state").write_text("REQUEUED")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
