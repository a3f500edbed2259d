"""`lmsleep data`: samples of a task, to read or as files."""

import json
import os
import shutil
import sys
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any, Literal

from lmsleep.cli.options import listed_tasks, parse, say_rows, task_field
from lmsleep.cli.scores import floor_text, floors_text
from lmsleep.evaluation import EVAL_SEED
from lmsleep.files import write_atomic
from lmsleep.recipes.settings import preset
from lmsleep.tasks import batch_rng, find_task
from lmsleep.tasks.base import difficulty_text
from lmsleep.tasks.samples import records, show


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What is drawn, and where it goes."""

    samples: int = 3
    """Samples; one with several questions on its own forks gives as many rows."""
    split: Literal["train", "test"] = "train"
    """Held-out samples or those of training."""
    seed: int | None = None
    """The stream of training: that of the first batch of a run with this seed and as large a batch; default
    0."""
    window: int | None = None
    """L: mark evictions in the samples shown as with this window; default the preset's."""
    jsonl: Path | None = None
    """Write JSON lines to this file, which must not exist, instead of showing the samples."""
    dataset: Path | None = None
    """Write a folder for datasets.load_from_disk, which must not exist, likewise (needs the extra "hf")."""


def data(argv: list[str]) -> None:
    """Run `lmsleep data TASK [OPTIONS]`."""
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(DATA_HELP)
        return
    cls, sections = find_task(argv[0]), preset(argv[0], "demo")
    # The task's fields are known only now; the preset's task gives their defaults.
    both = make_dataclass("Options", [task_field(argv[0], sections), ("data", DataOptions, DataOptions())])
    options = parse(both, argv[1:], f"lmsleep data {argv[0]}", cls.__doc__)
    task, chosen = options.task, options.data
    if chosen.samples < 1:
        raise ValueError(f"samples must be at least 1, got {chosen.samples}")
    if chosen.window is not None and chosen.window < 1:
        raise ValueError(f"window must be at least 1 token, got {chosen.window}")
    if chosen.split == "test" and chosen.seed is not None:
        raise ValueError("--seed is for --split train: samples of the test are those that evaluation sees")
    # Before the first sample is drawn: long texts take a while.
    for option, path in (("--jsonl", chosen.jsonl), ("--dataset", chosen.dataset)):
        if path is None:
            continue
        if chosen.window is not None:
            raise ValueError(f"--window marks samples that are shown; {option} writes them without marks")
        if path.exists():
            raise FileExistsError(f"{path} exists; name another {option} or remove it")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{option} {path}: there is no folder {path.parent}")
    seed = EVAL_SEED if chosen.split == "test" else chosen.seed or 0
    say_rows(task)
    batch = task.batch(batch_rng(seed, chosen.split, 0), chosen.samples, chosen.split)
    if chosen.jsonl is not None or chosen.dataset is not None:
        _export(list(records(task, batch)), chosen)
        return
    # Only marks: where windows end does not change what is drawn.
    window = chosen.window or sections["sleep"].window
    for row in range(len(batch.tokens)):
        sys.stdout.write(show(task, batch, row, window) + "\n")
    floors = task.floors()
    sys.stdout.write(
        f"\n{task.vocab_size} tokens in the vocabulary; floors of accuracy: {floors_text(floors)}\n"
    )
    # Of the kinds that were shown: a task may have many.
    for key in batch.difficulty.unique().tolist():
        name = difficulty_text(task, key)
        sys.stdout.write(f"{name}{told}\n" if (told := floor_text(floors, name)) else "")


DATA_HELP = f"""usage: lmsleep data TASK [OPTIONS]

Samples of a task: the evicted windows end with ‖, answers stand in brackets.

{listed_tasks()}

All options, with their defaults: lmsleep data TASK --help
"""


def _export(rows: list[dict[str, Any]], chosen: DataOptions) -> None:
    """Write the rows to each file and folder that was asked for."""
    if chosen.jsonl is not None:
        write_atomic(chosen.jsonl, "".join(json.dumps(row) + "\n" for row in rows).encode())
        sys.stdout.write(f"{chosen.jsonl}: {len(rows)} rows\n")
    if chosen.dataset is not None:
        _write_dataset(chosen.dataset, rows)
        sys.stdout.write(f"{chosen.dataset}: {len(rows)} rows\n")


def _write_dataset(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows as a folder of datasets, complete or not at all."""
    try:
        # An extra, and slow to import.
        import datasets
    except ImportError:
        raise ValueError("--dataset needs datasets: pip install 'lmsleep[hf]'") from None
    datasets.disable_progress_bars()
    # Written aside and renamed: a kill leaves no half of a data set under the name.
    partial = folder.parent / f".{folder.name}.{os.getpid()}"
    try:
        datasets.Dataset.from_list(rows).save_to_disk(str(partial))
        partial.rename(folder)
    # Ctrl-C too must leave no litter.
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
