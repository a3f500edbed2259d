"""A search in rounds, each chosen by what was found before; a finished trial is a line of a file."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lmsleep.files import write_atomic
from lmsleep.training import Job, RunConfig, RunFolder, run_all

Row = dict[str, Any]
Rounds = Callable[[str, list[Row]], Iterable[list["Trial"]]]
FOLDER = Path("results")


@dataclass(frozen=True)
class Trial:
    """A run, and the plain values that name it among the others of its search."""

    what: Mapping[str, Any]
    config: RunConfig


def main(doc: str | None, kind: str, problems: Iterable[str], rounds: Rounds) -> None:
    """Search on the problem that the command line names, or print what was found.

    Args:
        doc: what `--help` says.
        kind: lines are in results/KIND-search, runs in runs/KIND-search.
        problems: that may be named.
        rounds: yields the trials of each round, from the problem and the list of what was found, which grows.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("problem", choices=problems)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="print what is there")
    options = parser.parse_args()
    file = FOLDER / f"{kind}-search" / f"{options.problem}.jsonl"
    if not options.table:
        runs = Path("runs") / f"{kind}-search" / options.problem
        search(file, runs, lambda found: rounds(options.problem, found), options.workers)
    sys.stdout.write(f"{table(read(file))}\n")


def search(
    file: Path, runs: Path, rounds: Callable[[list[Row]], Iterable[list[Trial]]], workers: int
) -> None:
    """Train the trials of all rounds that `file` does not have yet, and write a line for each.

    Args:
        file: one JSON document a line; all that the search goes on from.
        runs: folder of the runs.
        rounds: yields the trials of each round; the list that it is given grows between them.
        workers: runs at a time.

    Raises:
        ValueError: if a line has other steps than its trial would have today.
    """
    found = read(file)
    for due in rounds(found):
        missing = [trial for trial in due if not any(_is_of(row, trial) for row in found)]
        jobs = [Job(runs / _folder(trial.what), trial.config) for trial in missing]
        run_all(jobs, workers)
        for job, trial in zip(jobs, missing, strict=True):
            folder = RunFolder.open(job.path)
            report = folder.report()
            assert report is not None
            row = {**trial.what, "seed": trial.config.train.seed}
            row |= {key: report[key] for key in ("step", "tokens", "flops", "seconds")}
            row |= {key: report["eval"][key] for key in ("accuracy", "per_difficulty")}
            losses, answers = (report["eval"][key] for key in ("loss_per_difficulty", "answers"))
            row["loss"] = fmean([losses[key] for key in answers], answers.values())
            found.append({**row, "commit": folder.made_by()["commit"]})
            file.parent.mkdir(parents=True, exist_ok=True)
            # The whole file: a kill must not leave half a line.
            write_atomic(file, "".join(json.dumps(row) + "\n" for row in found).encode())


def best(rows: Iterable[Row], **what: Any) -> Row:
    """Return the row with the lowest loss among those with these values: accuracies may all be 1."""
    return min(
        (row for row in rows if all(row[key] == value for key, value in what.items())),
        key=lambda row: float(row["loss"]),
    )


def read(file: Path) -> list[Row]:
    """Return the finished trials."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(rows: Iterable[Row]) -> str:
    """Return the trials as text, best first."""
    lines = []
    for row in sorted(rows, key=lambda row: float(row["loss"])):
        by_difficulty = " ".join(f"{k}: {accuracy:.3f}" for k, accuracy in row["per_difficulty"].items())
        what = json.dumps(dict(list(row.items())[: list(row).index("seed")]))
        lines.append(f"{row['loss']:.4f} nats  {what}  steps={row['step']}  {by_difficulty}")
    return "\n".join(lines)


def beyond(rates: Sequence[float], rate: float) -> float | None:
    """Return a rate beyond the end of those tried if `rate` is there, else None."""
    if rate == max(rates):
        return 2 * rate
    return rate / 2 if rate == min(rates) else None


def _is_of(row: Row, trial: Trial) -> bool:
    same = all(row[key] == value for key, value in trial.what.items())
    steps = trial.config.train.steps
    if same and row["step"] != steps:
        raise ValueError(
            f"{dict(trial.what)} was tried with {row['step']} steps and has {steps} today: remove its line "
            "and its run to try it again"
        )
    return same


def _folder(what: Mapping[str, Any]) -> str:
    """Return a name that a file system takes."""
    parts = [value.values() if isinstance(value, dict) else [value] for value in what.values()]
    said = "-".join(str(value) for part in parts for value in part)
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in said)
