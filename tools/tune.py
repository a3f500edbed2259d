"""Learning rate and protocol for each N on the demo's tasks: the sweep behind recipes/settings.py.

    python tools/tune.py depo --out runs/tune-depo            (prints a table, best first)
    python tools/tune.py depo-curriculum --out runs/tune-depo-curriculum
    python tools/tune.py depo-heads --out runs/tune-depo-heads
    python tools/tune.py rule110 --out runs/tune-rule110
    python tools/tune.py depo-variants --out runs/variants    (what else was tried, N = 4)
    python tools/tune.py rule110-variants --out runs/variants

Every N gets the same grid, the same seed (none of the demo's) and the same training compute.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmsleep.recipes import settings
from lmsleep.training import Job, RunConfig, RunFolder, equal_compute, run_all

# None of the demo's 0 ... 4: a rate must not be chosen on the seeds it is then reported with.
SEED = 100
PASSES = (4, 2, 1)  # longest steps first

Grid = list[tuple[str, RunConfig]]
Make = Callable[..., RunConfig]  # settings.depo or settings.rule110


def equal_steps(make: Make, passes: int, steps: int) -> int:
    """Return the steps that cost as many training FLOPs as `steps` steps with N = 4."""
    return equal_compute(make("demo", passes, steps=steps), make("demo", 4, steps=steps)).train.steps


def depo(steps: int) -> Grid:
    """Vary Muon's rate with the curriculum over hops, then drop the curriculum at the middle rate."""
    grid = []
    for passes in PASSES:
        length = equal_steps(settings.depo, passes, steps)
        protocols = [(0.0075, 350), (0.015, 350), (0.03, 350), (0.015, 0)]
        for lr, curriculum in protocols:
            config = settings.depo(
                "demo", passes, seed=SEED, steps=length, lr=lr, adam_lr=0.02, curriculum=curriculum
            )
            grid.append((f"depo-N{passes}-lr{lr}-curriculum{curriculum}", config))
    return grid


def depo_curriculum(steps: int) -> Grid:
    """Try the chosen rates with a long and a short curriculum, two seeds each."""
    grid = []
    for passes in PASSES:
        length = equal_steps(settings.depo, passes, steps)
        for curriculum in (350, 600):
            # Fresh seeds: on SEED the rates were chosen already.
            for seed in (200, 201):
                config = settings.depo("demo", passes, seed=seed, steps=length, curriculum=curriculum)
                grid.append((f"depo-N{passes}-curriculum{curriculum}-seed{seed}", config))
    return grid


def depo_heads() -> Grid:
    """Vary number and size of the heads, N = 4, at about equal compute and beyond."""
    grid = []
    for heads, size, steps in (
        (4, 16, 1300),
        (8, 8, 1300),
        (6, 16, 1100),
        (8, 16, 900),
        (4, 32, 900),
        (8, 16, 1300),
    ):
        config = settings.depo("demo", 4, seed=300, steps=steps, lr=0.02)
        model = replace(config.architecture, num_heads=heads, head_dim=size)
        grid.append((f"depo-{heads}-heads-of-{size}-{steps}-steps", replace(config, model=model)))
    return grid


def rule110(steps: int) -> Grid:
    """Vary Muon's rate, then try one of them with a curriculum over t."""
    grid = []
    for passes in PASSES:
        length = equal_steps(settings.rule110, passes, steps)
        for lr, curriculum in ((0.005, 0), (0.01, 0), (0.02, 0), (0.04, 0), (0.02, 200)):
            config = settings.rule110("demo", passes, seed=SEED, steps=length, lr=lr, curriculum=curriculum)
            grid.append((f"rule110-N{passes}-lr{lr}-curriculum{curriculum}", config))
    return grid


def variants(task: str, make: Make, steps: int, level: int) -> Grid:
    """Change one thing at a time, N = 4."""
    base = make("demo", 4, seed=SEED, steps=steps)
    # Whichever of the two sizes was not chosen.
    other_size = 16 if base.architecture.key_dim == 32 else 32
    changes: dict[str, dict[str, dict[str, Any]]] = {
        "as chosen": {},
        "normalize h between passes": {"sleep": {"normalize": True}},
        "reinject the embedding": {"sleep": {"reinject": True}},
        "backprop through 2 passes": {"train": {"backprop_passes": 2}},
        "residual_init 0.3": {"model": {"residual_init": 0.3}},
        "forget 0.05": {"model": {"forget": (0.05, 0.05)}},
        "negative eigenvalues": {"model": {"negative_eigenvalues": True}},
        f"heads of {other_size}": {"model": {"head_dim": other_size}},
        "no curriculum" if base.train.curriculum else "curriculum": {
            "train": {"curriculum": 0 if base.train.curriculum else level}
        },
    }
    grid = []
    for name, change in changes.items():
        parts = {part: replace(getattr(base, part), **options) for part, options in change.items()}
        grid.append((f"{task}-{name.replace(' ', '-')}", replace(base, **parts)))
    return grid


GRIDS: dict[str, Callable[[int | None], Grid]] = {
    "depo": lambda steps: depo(steps or settings.DEPO_STEPS),
    "depo-curriculum": lambda steps: depo_curriculum(steps or settings.DEPO_STEPS),
    "depo-heads": lambda _: depo_heads(),
    "rule110": lambda steps: rule110(steps or settings.RULE110_STEPS),
    "depo-variants": lambda n: variants("depo", settings.depo, n or settings.DEPO_STEPS, 0),
    "rule110-variants": lambda n: variants("rule110", settings.rule110, n or settings.RULE110_STEPS, 300),
}


def main() -> None:
    """Run a grid and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("grid", choices=GRIDS)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--steps", type=int, help="steps of N = 4")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    options = parser.parse_args()
    jobs = [Job(options.out / name, config) for name, config in GRIDS[options.grid](options.steps)]
    # A sweep that was stopped goes on; what is finished is only read.
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
