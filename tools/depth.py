"""Blocks against passes: the same small search for every depth, all at the same training FLOPs.

    python tools/depth.py far --workers 2          (hours; stop it when you like, the same command goes on)
    python tools/depth.py near --table             (prints what is there, best first)

A depth is a number of (attention, Gated DeltaNet) pairs, the size of a head, and N. Each gets one seed, none
of those that are reported, and in this order: three of Muon's rates; at the best, a short convolution that is
open at the start; with the better start, a longer curriculum. A finished trial is a line of
`results/depth-search/TASK.jsonl`, which is all that the search goes on from.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from search import Row, Trial, read, search, table

from lmsleep.recipes import settings
from lmsleep.training import RunConfig, equal_compute

SEED = 100
FOUND = Path("results/depth-search")
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


def rounds(problem: Problem, found: list[Row]) -> Iterator[list[Trial]]:
    """Yield the rates for every depth, at the best the open convolution, then a longer curriculum."""

    def trial(depth: Depth, options: Options) -> Trial:
        what = {"depth": asdict(depth), "options": asdict(options)}
        return Trial(what, run(problem, depth, options, SEED))

    def best(depth: Depth) -> Options:
        mine = [row for row in found if Depth(**row["depth"]) == depth]
        return Options(**max(mine, key=lambda row: row["accuracy"])["options"])

    for rate in RATES:
        yield [trial(depth, Options(lr=rate)) for depth in DEPTHS]
    yield [trial(depth, replace(best(depth), conv_init=0.5)) for depth in DEPTHS]
    yield [trial(depth, replace(best(depth), curriculum=0.6)) for depth in DEPTHS]


def main() -> None:
    """Search, or print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("problem", choices=PROBLEMS)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="print what is there")
    options = parser.parse_args()
    name, file = options.problem, FOUND / f"{options.problem}.jsonl"
    if not options.table:
        runs = Path("runs/depth") / name
        search(file, runs, lambda found: rounds(PROBLEMS[name], found), options.workers)
    sys.stdout.write(f"{table(read(file))}\n")


if __name__ == "__main__":
    main()
