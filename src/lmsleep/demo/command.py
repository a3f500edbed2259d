"""`lmsleep demo`: train the small models side by side, then show what longer sleep bought."""

import json
import sys
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from lmsleep.demo.report import HEADINGS, Section, page
from lmsleep.demo.runs import collect, demo_jobs
from lmsleep.files import write_atomic
from lmsleep.plots import plot_demo
from lmsleep.training import run_all


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Train small hybrids with N = 1, 2 and 4 passes a sleep and compare them.

    Same data order and wake compute for every N; at equal training tokens and at equal training compute.
    Stop it when you like: the same command goes on where it was.
    """

    out: Path = Path("runs/demo")
    """Folder for the runs, the picture, the page and results.json."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds to train; the committed result has five (0 1 2 3 4)."""
    tasks: tuple[Literal["depo", "rule110"], ...] = ("depo",)
    """Tasks to train: the pointer chase, Rule 110, or both. The committed results of both are shown."""
    workers: int | None = None
    """Runs at a time, one thread each; default one for each GPU, or without one for each core."""
    scale: float = 1.0
    """Shortens all runs alike, for a quick look at the mechanics (0.02: a minute; nothing is learned)."""
    json: bool = False
    """Print results.json instead of the tables."""


def run(options: DemoOptions) -> None:
    """Train, collect, draw, report."""
    if not options.seeds or len(set(options.seeds)) != len(options.seeds):
        raise ValueError(f"seeds must name at least one seed, each once, got {options.seeds}")
    if not 0 < options.scale <= 1:
        raise ValueError(f"scale must lie in (0, 1], got {options.scale}")
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    run_all(demo_jobs(options.out, options.seeds, options.tasks, options.scale), options.workers)
    result = collect(options.out, options.seeds, options.tasks)
    write_atomic(options.out / "results.json", (json.dumps(result) + "\n").encode())
    sections = [_section(result, task, options.out, committed=False) for task in options.tasks]
    if committed := committed_result():
        sections += [_section(committed, t, options.out, committed=True) for t in HEADINGS if t in committed]
    write_atomic(options.out / "demo.html", page(sections).encode())
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    for section in sections:
        sys.stdout.write(section.text())
    sys.stdout.write(_next_steps(options, time.monotonic() - started))


def _section(result: dict[str, Any], task: str, out: Path, *, committed: bool) -> Section:
    picture = out / f"{'committed-' if committed else ''}{task}.png"
    plot_demo(result[task], picture)
    return Section(result, task, picture, committed)


def committed_result() -> dict[str, Any] | None:
    """The result that the documentation quotes, shipped with the package."""
    path = files("lmsleep.demo") / "results.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _next_steps(options: DemoOptions, seconds: float) -> str:
    out = options.out
    return (
        f"\n{seconds / 60:.1f} minutes. Look at {out / 'demo.html'} (pictures: {out}/*.png).\n"
        f"Go on with:  source .venv/bin/activate    (where make made the environment)\n"
        f"             lmsleep eval {out}/depo-N4-seed{options.seeds[0]} --passes 1 2 3 4 6\n"
        "             lmsleep train depo --passes 4 --nodes 12 --hops 6 --names 12 --window 12 --steps 4000\n"
    )
