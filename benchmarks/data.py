"""How quickly samples are drawn: by one process, in CPU time, so that busy neighbours do not count."""

import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.table import Table
from lmsleep.tasks import TASKS, GSMInfinite, Text, batch_rng

SIZE = 64  # samples in a batch


def tables(repeats: int, tiny: bool) -> dict[str, Callable[[], Table]]:
    """Return one table."""
    return {"speed": lambda: speed(repeats, 0.01 if tiny else 1.0)}


def speed(repeats: int, at_least: float) -> Table:
    """Time every task with its defaults, and GSM-Infinite, of 2,000 to 3,300 tokens, in its four kinds."""
    with tempfile.TemporaryDirectory() as folder:
        rows: Any = [
            {"task": name, **_speeds(task, repeats, at_least)} for name, task in _tasks(Path(folder)).items()
        ]
    return Table(rows=rows, note="Samples a second and core, in CPU time.")


def _tasks(folder: Path) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    for subset in ("medium", "hard"):
        for mode in ("forward", "reverse"):
            ops = (2 if subset == "medium" else 1, 8)
            options: dict[str, Any] = {"subset": subset, "mode": mode, "ops": ops}
            tasks[f"gsm-infinite, {subset}, {mode}"] = GSMInfinite(**options)
    for name, cls in TASKS.items():
        if cls is Text:
            document = folder / "document.txt"
            document.write_text("the quick brown fox " * 50_000)
            tasks[name] = Text(data=(document,))
        elif cls is not GSMInfinite:
            tasks[name] = cls()
    return tasks


def _speeds(task: Any, repeats: int, at_least: float) -> dict[str, float]:
    """Count samples a second over at least so many seconds; the first batch of each is left out."""
    index, speeds = count(), []
    for _ in range(repeats):
        task.batch(batch_rng(0, "train", next(index)), SIZE, "train")
        samples, started = 0, time.process_time()
        while (seconds := time.process_time() - started) < at_least:
            task.batch(batch_rng(0, "train", next(index)), SIZE, "train")
            samples += SIZE
        speeds.append(samples / seconds)
    return {"median": statistics.median(speeds), "lowest": min(speeds), "highest": max(speeds)}
