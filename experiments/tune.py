"""Learning rate and protocol for each N on the demo's tasks: the sweep behind demo/settings.py.

    python experiments/tune.py depo --out runs/tune-depo      (prints a table, best first)

Every N gets the same grid, the same seed (none of the demo's) and the same training compute.
"""

import argparse
import sys
from pathlib import Path

from lmsleep.demo import settings
from lmsleep.demo.runs import PASSES, equal_compute
from lmsleep.training import Job, RunFolder, run_all

SEED = 100


def depo(out: Path, steps: int) -> list[Job]:
    """Muon's rate with the curriculum over hops, then without it at the middle rate."""
    jobs = []
    for passes in reversed(PASSES):
        length = equal_compute(settings.depo, passes, steps)
        for lr, curriculum in ((0.015, True), (0.03, True), (0.06, True), (0.03, False)):
            options = {"lr": lr, "adam_lr": 0.02, "curriculum": steps // 2 if curriculum else 0}
            name = f"depo-N{passes}-lr{lr}-curriculum{options['curriculum']}"
            jobs.append(Job(out / name, settings.depo(passes, SEED, length, **options)))
    return jobs


def rule110(out: Path, steps: int) -> list[Job]:
    """Muon's rate, and what may stabilise the passes: normalising h, adding the input again."""
    jobs = []
    for passes in reversed(PASSES):
        length = equal_compute(settings.rule110, passes, steps)
        for lr in (0.01, 0.02, 0.04):
            name = f"rule110-N{passes}-lr{lr}"
            jobs.append(Job(out / name, settings.rule110(passes, SEED, length, lr=lr)))
    return jobs


GRIDS = {"depo": (depo, settings.DEPO_STEPS), "rule110": (rule110, settings.RULE110_STEPS)}


def main() -> None:
    """Run the grid and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("task", choices=GRIDS)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--steps", type=int, help="steps of N = 4")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    options = parser.parse_args()
    grid, steps = GRIDS[options.task]
    jobs = grid(options.out, options.steps or steps)
    run_all(jobs, options.workers)
    rows = []
    for job in jobs:
        report = RunFolder.open(job.path).report()
        if report:
            rows.append((report["eval"]["accuracy"], job.path.name, report["eval"]["per_difficulty"]))
    for accuracy, name, per_difficulty in sorted(rows, reverse=True):
        by_key = "  ".join(f"{k}: {v:.3f}" for k, v in per_difficulty.items())
        sys.stdout.write(f"{accuracy:.3f}  {name}  {by_key}\n")


if __name__ == "__main__":
    main()
