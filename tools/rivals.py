"""The choices of every rival: the same small search for each, the same training FLOPs for each trial.

    python tools/rivals.py depo --workers 2          (stop it when you like, the same command goes on)
    python tools/rivals.py depo --table              (prints what is there, best first)

At the bytes of S, on one seed that no result has: three of Muon's rates, and one more beyond the end where
the best of them is; at the best, the one choice that the method has of its own. The best has the lowest loss.
Trials are lines of results/rivals-search/TASK.jsonl; the best are in `lmsleep.recipes.rivals.FOUND`.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace

from search import Row, Trial, best, beyond, main

from lmsleep.recipes.rivals import BENCHES, METHODS, Found, budget, run
from lmsleep.recipes.searched import RATES

SEED = 100


def rounds(name: str, found: list[Row]) -> Iterator[list[Trial]]:
    """Yield the rates for every method, rates beyond them, then each method's own choice."""
    bench, flops = BENCHES[name], budget(BENCHES[name])

    def trial(method: str, choice: Found) -> Trial:
        config = run(bench, method, "1", choice, flops)
        assert config is not None
        seeded = replace(config, train=replace(config.train, seed=SEED))
        return Trial({"method": method, "choice": asdict(choice)}, seeded)

    def rate(method: str) -> float:
        tried = [row for row in found if not row["choice"]["other"]]
        return float(best(tried, method=method)["choice"]["lr"])

    yield [trial(method, Found(lr)) for lr in RATES for method in METHODS]
    further = {method: beyond(RATES, rate(method)) for method in METHODS}
    yield [trial(method, Found(lr)) for method, lr in further.items() if lr is not None]
    yield [trial(method, Found(rate(method), other=True)) for method in METHODS]


if __name__ == "__main__":
    main(__doc__, "rivals", BENCHES, rounds)
