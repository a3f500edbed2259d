"""The choices of every rival: the same small search for each, the same training FLOPs for each trial.

    python tools/rivals.py depo --workers 2          (stop it when you like, the same command goes on)
    python tools/rivals.py depo --table              (prints what is there, best first)

At the bytes of S, on one seed that no result has: three of Muon's rates; at the best, the one choice that the
method has of its own. Trials are lines of results/rivals-search/TASK.jsonl; the best are in
`lmsleep.recipes.rivals.FOUND`.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from search import Row, Trial, read, search, table

from lmsleep.recipes.rivals import BENCHES, METHODS, RATES, Found, budget, run

SEED = 100
FOLDER = Path("results/rivals-search")


def best(found: list[Row], method: str) -> Found:
    """Return the choice of a method with the best trial."""
    mine = [row for row in found if row["method"] == method]
    return Found(**max(mine, key=lambda row: row["accuracy"])["choice"])


def rounds(name: str, found: list[Row]) -> Iterator[list[Trial]]:
    """Yield the rates for every method, then its own choice at the best."""
    bench, flops = BENCHES[name], budget(BENCHES[name])

    def trial(method: str, choice: Found) -> Trial:
        config = run(bench, method, "1", choice, flops)
        assert config is not None
        seeded = replace(config, train=replace(config.train, seed=SEED))
        return Trial({"method": method, "choice": asdict(choice)}, seeded)

    yield [trial(method, Found(rate)) for rate in RATES for method in METHODS]
    yield [trial(method, replace(best(found, method), other=True)) for method in METHODS]


def main() -> None:
    """Search, or print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("task", choices=BENCHES)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="print what is there")
    options = parser.parse_args()
    file = FOLDER / f"{options.task}.jsonl"
    if not options.table:
        runs = Path("runs/rivals-search") / options.task
        search(file, runs, lambda found: rounds(options.task, found), options.workers)
    sys.stdout.write(f"{table(read(file))}\n")


if __name__ == "__main__":
    main()
