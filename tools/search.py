"""A search in rounds, each chosen by what was found before; a finished trial is a line of a file."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmsleep.training import Job, RunConfig, RunFolder, run_all

Row = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """A run, and the plain values that name it among the others of its search."""

    what: Mapping[str, Any]
    config: RunConfig


def search(
    file: Path, runs: Path, rounds: Callable[[list[Row]], Iterable[list[Trial]]], workers: int
) -> None:
    """Train the trials of all rounds that `file` does not have yet, and write a line for each.

    Args:
        file: one JSON document a line; all that the search goes on from.
        runs: folder of the runs.
        rounds: yields the trials of each round; the list that it is given grows between them.
        workers: runs at a time.
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
            found.append({**row, "commit": folder.made_by()["commit"]})
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a") as lines:
                lines.write(json.dumps(found[-1]) + "\n")


def read(file: Path) -> list[Row]:
    """Return the finished trials."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(rows: Iterable[Row]) -> str:
    """Return the trials as text, best first."""
    lines = []
    for row in sorted(rows, key=lambda row: -row["accuracy"]):
        by_difficulty = " ".join(f"{k}: {accuracy:.3f}" for k, accuracy in row["per_difficulty"].items())
        what = json.dumps(dict(list(row.items())[: list(row).index("seed")]))
        lines.append(f"{row['accuracy']:.3f}  {what}  steps={row['step']}  {by_difficulty}")
    return "\n".join(lines)


def _is_of(row: Row, trial: Trial) -> bool:
    return all(row[key] == value for key, value in trial.what.items())


def _folder(what: Mapping[str, Any]) -> str:
    """Return a name that a file system takes."""
    said = "-".join(
        str(v) for value in what.values() for v in (value.values() if isinstance(value, dict) else [value])
    )
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in said)
