"""Blocks against passes: the same small search for every depth, all at the same training FLOPs.

    python tools/depth.py depth --workers 2          (hours; stop it when you like, the same command goes on)
    python tools/depth.py depth-8 --table            (prints what is there, best first)

Each depth of `lmsleep.recipes.depth` gets one seed, none of those that are reported, and in this order: three
of Muon's rates; at the best, a short convolution that is open at the start; with the better start, a longer
curriculum. A finished trial is a line of `results/depth-search/PROBLEM.jsonl`, which is all that the search
goes on from; the best are in `lmsleep.recipes.depth.FOUND`.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from search import Row, Trial, read, search, table

from lmsleep.recipes.depth import DEPTHS, PROBLEMS, RATES, Depth, Found, budget, run

SEED = 100
FOLDER = Path("results/depth-search")


def best(found: list[Row], depth: Depth) -> Found:
    """Return the options of a depth with the best trial."""
    mine = [row for row in found if Depth(**row["depth"]) == depth]
    return Found(**max(mine, key=lambda row: row["accuracy"])["options"])


def rounds(name: str, found: list[Row]) -> Iterator[list[Trial]]:
    """Yield the rates for every depth, at the best the open convolution, then a longer curriculum."""
    problem, flops = PROBLEMS[name], budget(PROBLEMS[name])

    def trial(depth: Depth, options: Found) -> Trial:
        config = run(problem, depth, options, flops)
        seeded = replace(config, train=replace(config.train, seed=SEED))
        return Trial({"depth": asdict(depth), "options": asdict(options)}, seeded)

    for rate in RATES:
        yield [trial(depth, Found(lr=rate)) for depth in DEPTHS]
    yield [trial(depth, replace(best(found, depth), conv_init=0.5)) for depth in DEPTHS]
    yield [trial(depth, replace(best(found, depth), curriculum=0.6)) for depth in DEPTHS]


def main() -> None:
    """Search, or print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("problem", choices=PROBLEMS)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="print what is there")
    options = parser.parse_args()
    name, file = options.problem, FOLDER / f"{options.problem}.jsonl"
    if not options.table:
        search(file, Path("runs/depth-search") / name, lambda found: rounds(name, found), options.workers)
    sys.stdout.write(f"{table(read(file))}\n")


if __name__ == "__main__":
    main()
