"""Which memory layers learn soonest whose a fact is: kinds, rates, number and places, on SmolLM2.

    python tools/memory_layers.py smollm2 --workers 2     (hours; stop it when you like, it goes on)
    python tools/memory_layers.py smollm2 --table         (prints what is there, best first)

Every trial is a beginning of the first run of `tools/smollm2.py`, so many steps on texts of exactly four
facts, by one seed that no reported run has, in this order: three kinds of layer; with the best, rates half
and twice as high; with the better of these, fewer layers, more, and as many spread over all blocks. The best
has the lowest loss. Trials are lines of results/memory-layers-search/smollm2.jsonl.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from search import Row, Trial, best, main

from lmsleep import shipped
from lmsleep.hf.finetune import FineTune
from lmsleep.layers import MemoryKind
from lmsleep.sleep import SleepConfig
from lmsleep.tasks import Recall
from lmsleep.training import RunConfig, TrainConfig

SEED, STEPS = 100, 250
UPPER = tuple(range(15, 29, 2))  # behind every other block of the upper half
PLACES = {
    "three": (15, 21, 27),
    "all of the upper half": tuple(range(15, 29)),
    "spread": tuple(range(3, 30, 4)),
}


@dataclass(frozen=True)
class Layers:
    """What is searched: the kind of layer, Muon's rate (AdamW's is a tenth), and the blocks before them."""

    kind: MemoryKind = "gated_delta_net"
    lr: float = 0.02
    after: tuple[int, ...] = UPPER


def trial(layers: Layers) -> Trial:
    """Return the beginning of a run with these layers."""
    base = shipped.find(shipped.SMOLLM2)
    config = RunConfig(
        task=Recall(kinds=("facts",), facts=(4, 4), filler=(0, 1), length=96, tokenizer=str(base)),
        model=FineTune(
            folder=base,
            train="memory",
            insert=len(layers.after),
            insert_kind=layers.kind,
            insert_after=layers.after,
        ),
        sleep=SleepConfig(window=128),
        train=TrainConfig(
            steps=STEPS,
            batch_size=16,
            lr=layers.lr,
            adam_lr=layers.lr / 10,
            decay=0,
            seed=SEED,
            batches=100,
            keep=Path("runs/states"),
            eval_every=50,
            eval_batches=2,
            save_every=50,
            threads=1,
        ),
    )
    return Trial({"layers": {**asdict(layers), "after": [*layers.after]}}, config)


def rounds(name: str, found: list[Row]) -> Iterator[list[Trial]]:
    """Yield the kinds, the rates of the best, then other places for the best of both."""

    def so_far(**before: Any) -> Layers:
        """Return the best of the trials that have what was not varied yet."""
        rows = [row for row in found if all(row["layers"][name] == value for name, value in before.items())]
        given = best(rows)["layers"]
        return Layers(**{**given, "after": tuple(given["after"])})

    yield [trial(Layers(kind)) for kind in get_args(MemoryKind)]
    kind = so_far(lr=Layers.lr, after=[*UPPER])
    yield [trial(replace(kind, lr=lr)) for lr in (0.01, 0.04)]
    rate = so_far(after=[*UPPER])
    yield [trial(replace(rate, after=after)) for after in PLACES.values()]


if __name__ == "__main__":
    main(__doc__, "memory-layers", [shipped.SMOLLM2], rounds)
