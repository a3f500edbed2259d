"""Blocks against passes: the same small search for every depth, all at the same training FLOPs.

    python tools/depth.py far --workers 2          (hours; stop it when you like, the same command goes on)
    python tools/depth.py near --table             (prints what is there, best first)

A depth is a number of (attention, Gated DeltaNet) pairs, the size of a head, and N. Each gets one seed, none
of those that are reported, and in this order: three of Muon's rates; at the best, a short convolution that is
open at the start; with the better start, a longer curriculum. A finished trial is a line of
`benchmarks/results/depth-search/TASK.jsonl`, which is all that the search goes on from.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lmsleep.recipes import settings
from lmsleep.training import Job, RunConfig, RunFolder, equal_compute, run_all

SEED = 100
FOUND = Path("benchmarks/results/depth-search")
RATES = (0.015, 0.0075, 0.03)


@dataclass(frozen=True)
class Depth:
    """What is compared: `pairs` of blocks with four heads of `head_dim`, and N `passes`."""

    pairs: int
    head_dim: int
    passes: int


@dataclass(frozen=True)
class Options:
    """What is searched: Muon's rate, the older taps at the start, the curriculum's share of the steps."""

    lr: float = RATES[0]
    conv_init: float = 0.0
    curriculum: float = 0.35


@dataclass(frozen=True)
class Problem:
    """A pointer chase through half a cycle of `nodes`, at the FLOPs of `steps` steps of two blocks, N = 4."""

    nodes: int
    steps: int


# Four hops are two doublings, as many as four blocks make; six are more than four blocks were seen to make.
PROBLEMS = {"near": Problem(8, 1000), "far": Problem(12, 1500)}
# The most passes for each number of pairs: up to 16 blocks in a row.
MOST = {2: 4, 1: 8, 4: 2, 8: 1}
# Heads of 16 throughout; then the parameters of four blocks for two and for eight.
DEPTHS = (
    *(Depth(pairs, 16, n) for pairs in MOST for n in (1, 4, 2, 8) if n <= MOST[pairs]),
    Depth(1, 32, 4),
    Depth(4, 8, 1),
)


def run(problem: Problem, depth: Depth, options: Options, seed: int) -> RunConfig:
    """Return a run with the training FLOPs of the problem."""
    nodes = problem.nodes
    task = replace(settings.DEPO, nodes=nodes, names=nodes, queries=nodes, hops=nodes // 2)
    model = replace(
        settings.DEPO_MODEL,
        blocks=depth.pairs * settings.PAIR,
        head_dim=depth.head_dim,
        conv_init=options.conv_init,
    )
    base = settings.depo("demo", 4, seed=seed, lr=options.lr, curriculum=0, eval_every=500, save_every=250)
    # Half of the edges in a window, so that no window holds a chain.
    base = replace(base, task=task, sleep=replace(base.sleep, window=nodes))
    yardstick = replace(
        base,
        model=replace(model, blocks=settings.PAIR, head_dim=32),
        train=replace(base.train, steps=problem.steps),
    )
    made = replace(base, model=model, sleep=base.sleep.with_passes(depth.passes))
    steps = equal_compute(made, yardstick).train.steps
    train = replace(made.train, steps=steps, curriculum=round(options.curriculum * steps))
    return replace(made, train=train)


def trials(found: list[dict[str, Any]]) -> Iterator[list[tuple[Depth, Options]]]:
    """Yield rounds of what is to be tried, each of which is chosen by what was found before."""

    def best(depth: Depth) -> Options:
        mine = [row for row in found if Depth(**row["depth"]) == depth]
        return Options(**max(mine, key=lambda row: row["accuracy"])["options"])

    for rate in RATES:
        yield [(depth, Options(lr=rate)) for depth in DEPTHS]
    yield [(depth, replace(best(depth), conv_init=0.5)) for depth in DEPTHS]
    yield [(depth, replace(best(depth), curriculum=0.6)) for depth in DEPTHS]


def search(name: str, workers: int) -> None:
    """Run what is missing."""
    problem, path = PROBLEMS[name], FOUND / f"{name}.jsonl"
    found = read(path)
    for due in trials(found):
        done = [(Depth(**row["depth"]), Options(**row["options"])) for row in found]
        missing = [trial for trial in due if trial not in done]
        for several in (missing[i : i + workers] for i in range(0, len(missing), workers)):
            jobs = [Job(_folder(name, depth, how), run(problem, depth, how, SEED)) for depth, how in several]
            run_all(jobs, workers)
            for job, (depth, how) in zip(jobs, several, strict=True):
                folder = RunFolder.open(job.path)
                report = folder.report()
                assert report is not None
                row = {"depth": asdict(depth), "options": asdict(how), "seed": SEED}
                row |= {key: report[key] for key in ("step", "tokens", "flops", "seconds")}
                row |= {key: report["eval"][key] for key in ("accuracy", "per_difficulty")}
                found.append({**row, "commit": folder.made_by()["commit"]})
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a") as file:
                    file.write(json.dumps(found[-1]) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the finished trials."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(name: str) -> None:
    """Print the finished trials, best first."""
    for row in sorted(read(FOUND / f"{name}.jsonl"), key=lambda row: -row["accuracy"]):
        hops = " ".join(f"{k}: {accuracy:.3f}" for k, accuracy in row["per_difficulty"].items())
        what = " ".join(f"{key}={value}" for part in ("depth", "options") for key, value in row[part].items())
        sys.stdout.write(f"{row['accuracy']:.3f}  {what}  steps={row['step']}  {hops}\n")


def _folder(name: str, depth: Depth, options: Options) -> Path:
    values = [*asdict(depth).values(), *asdict(options).values()]
    return Path("runs/depth") / name / "-".join(map(str, values))


def main() -> None:
    """Search, or print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("problem", choices=PROBLEMS)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="print what is there")
    options = parser.parse_args()
    if not options.table:
        search(options.problem, options.workers)
    table(options.problem)


if __name__ == "__main__":
    main()
