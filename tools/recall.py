"""What a model remembers of texts that were evicted: a run on the task recall, beside the plain model.

    lmsleep finetune smollm2-folder --task recall ... --out runs/facts
    lmsleep convert smollm2 plain --insert 2          (layers are silent until trained)
    python tools/recall.py runs/facts --plain plain --ceiling runs/lora

Rows: each run asleep, as it was trained (at other numbers of passes too: --passes); the plain model with
everything in attention, with a sliding window, and with the text evicted, which is left to guess; and runs
that learned the same with everything in attention (--ceiling). All read the same texts. Columns: accuracy
over all questions, of texts as in training, with names, wordings and lengths that training never has [95 %
interval of the answers, Wilson], and bits an answer token.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lmsleep.evaluation import Score, evaluate, wilson
from lmsleep.opening import find
from lmsleep.sleep import SleepConfig, Sliding
from lmsleep.tasks import Recall
from lmsleep.tasks.recall.planted import TOLD
from lmsleep.training import RunFolder
from lmsleep.training.device import autocast, choose_device, in_bfloat16

COLUMNS = ("all", *TOLD)


def readings(
    runs: Sequence[Path], plain: Path | None, ceilings: Sequence[Path], passes: Sequence[int]
) -> Iterator[tuple[str, Path, SleepConfig]]:
    """Yield a name, the model and how it sleeps, for each row."""
    own = RunFolder.open(runs[0]).config().sleep
    for run in runs:
        sleep = RunFolder.open(run).config().sleep
        for n in passes or (sleep.passes,):
            yield f"{run.name}, asleep, N = {n}", run, sleep.with_passes(n)
    if plain is not None:
        one = own.with_passes(1)
        yield "plain, everything in attention", plain, replace(one, window=None)
        yield "plain, sliding window", plain, replace(one, eviction=Sliding())
        yield "plain, evicted", plain, one
    for run in ceilings:
        yield f"{run.name}, everything in attention", run, RunFolder.open(run).config().sleep


def by_column(score: Score, labels: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return right answers and questions for each column."""
    found = dict.fromkeys(COLUMNS, (0, 0))
    for key, total in score.total.items():
        told = labels[key].partition("+")[2] or TOLD[0]
        for column in ("all", told):
            right, asked = found[column]
            found[column] = (right + round(score.per_difficulty[key] * total), asked + total)
    return found


def said(right: int, asked: int) -> str:
    """Write a share with its interval."""
    if not asked:
        return ""
    low, high = wilson(right, asked)
    return f"{right / asked:.3f} [{low:.3f}, {high:.3f}]"


def main(argv: Sequence[str]) -> None:
    """Print the table, a line when it is known."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="runs of lmsleep finetune on recall")
    parser.add_argument("--plain", type=Path, help="folder of the model with silent memory layers")
    parser.add_argument("--ceiling", nargs="*", type=Path, default=[], help="runs with --window None")
    parser.add_argument("--passes", nargs="*", type=int, default=[], help="N, default that of each run")
    parser.add_argument("--batches", type=int, default=16)
    options = parser.parse_args(argv)
    config = RunFolder.open(options.runs[0]).config()
    task: Any = config.task
    if not isinstance(task, Recall):
        raise SystemExit(f"recall: {options.runs[0]} is a run on {config.task_name}, not on recall")
    device = choose_device(config.train.device)
    bfloat16 = in_bfloat16(config.train, device)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    sys.stdout.write(f"| | {' | '.join(COLUMNS)} | bits |\n|---|{'---|' * (len(COLUMNS) + 1)}\n")
    for name, path, sleep in readings(options.runs, options.plain, options.ceiling, options.passes):
        model = find(path).backbone(str(device))[0]
        with autocast(device, bfloat16):
            score = evaluate(
                model, task, sleep, batches=options.batches, batch_size=config.train.batch_size, device=device
            )
        cells = [said(*counts) for counts in by_column(score, task.difficulty_labels).values()]
        sys.stdout.write(f"| {name} | {' | '.join(cells)} | {score.bits():.3f} |\n")
        sys.stdout.flush()
    floor = task.floors()
    sys.stdout.write(f"Guessing among the answers of its kind in the text: {floor['chance']:.3f}.\n")


if __name__ == "__main__":
    main(sys.argv[1:])
