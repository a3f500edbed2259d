"""Blocks against passes: the same small search for every depth, all at the same training FLOPs.

    python tools/depth.py depth --workers 2          (hours; stop it when you like, the same command goes on)
    python tools/depth.py depth-8 --table            (prints what is there, best first)

Each depth of `lmsleep.recipes.depth` gets one seed, none of those that are reported, and in this order: three
of Muon's rates, and one more beyond the end where the best of them is; at the best, a short convolution
that is open at the start; with the better start, a longer curriculum. The best has the lowest loss. Trials
are lines of results/depth-search/PROBLEM.jsonl; the best are in `lmsleep.recipes.depth.FOUND`.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace

from search import Row, Trial, best, beyond, main

from lmsleep.recipes.depth import DEPTHS, PROBLEMS, Depth, Found, budget, run
from lmsleep.recipes.searched import RATES

SEED = 100


def rounds(name: str, found: list[Row]) -> Iterator[list[Trial]]:
    """Yield the rates for every depth, rates beyond them, the open convolution, then a longer curriculum."""
    problem, flops = PROBLEMS[name], budget(PROBLEMS[name])

    def trial(depth: Depth, options: Found) -> Trial:
        config = run(problem, depth, options, flops)
        seeded = replace(config, train=replace(config.train, seed=SEED))
        return Trial({"depth": asdict(depth), "options": asdict(options)}, seeded)

    def so_far(depth: Depth, *, opened: bool) -> Found:
        """Return the best with the usual curriculum, and unless `opened` the usual start."""
        tried = [row for row in found if row["options"]["curriculum"] == Found.curriculum]
        tried = [row for row in tried if opened or row["options"]["conv_init"] == Found.conv_init]
        return Found(**best(tried, depth=asdict(depth))["options"])

    yield [trial(depth, Found(lr)) for lr in RATES for depth in DEPTHS]
    further = {depth: beyond(RATES, so_far(depth, opened=False).lr) for depth in DEPTHS}
    yield [trial(depth, Found(lr)) for depth, lr in further.items() if lr is not None]
    yield [trial(depth, replace(so_far(depth, opened=False), conv_init=0.5)) for depth in DEPTHS]
    yield [trial(depth, replace(so_far(depth, opened=True), curriculum=0.6)) for depth in DEPTHS]


if __name__ == "__main__":
    main(__doc__, "depth", PROBLEMS, rounds)
