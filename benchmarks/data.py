"""How quickly samples are drawn: by one process, in CPU time, so that busy neighbours do not count."""

import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch

from lmsleep.tasks import TASKS, GSMInfinite, Text, stream

UNIT = "samples a second and core"
SIZE = 64  # samples in a batch
FOLDER = tempfile.TemporaryDirectory()


def cases() -> dict[str, Callable[[], float]]:
    """Every task with its defaults; GSM-Infinite, of 2,000 to 3,300 tokens, in its four kinds."""
    torch.set_num_threads(1)
    tasks: dict[str, Any] = {}
    for subset in ("medium", "hard"):
        for mode in ("forward", "reverse"):
            ops = (2 if subset == "medium" else 1, 8)
            options: dict[str, Any] = {"subset": subset, "mode": mode, "ops": ops}
            tasks[f"gsm-infinite, {subset}, {mode}"] = GSMInfinite(**options)
    for name, cls in TASKS.items():
        if cls is Text:
            document = Path(FOLDER.name) / "document.txt"
            document.write_text("the quick brown fox " * 50_000)
            tasks[name] = Text(data=(document,))
        elif cls is not GSMInfinite:
            tasks[name] = cls()
    return {name: _measure(task) for name, task in tasks.items()}


def _measure(task: Any) -> Callable[[], float]:
    index = count()

    def speed() -> float:
        """Samples a second, over at least a second's batches; the first ever is not counted."""
        task.batch(stream(0, "train", next(index)), SIZE, "train")
        samples, started = 0, time.process_time()
        while (seconds := time.process_time() - started) < 1:
            task.batch(stream(0, "train", next(index)), SIZE, "train")
            samples += SIZE
        return samples / seconds

    return speed
