"""Rivals on one bench: what else could keep a window, at equal bytes and for equal training FLOPs.

Bytes are those of `S` in one Gated DeltaNet block, a quarter and four times as many. Every method has the
learning rate, and the one choice of its own, that the same small search found for it (`tools/rivals.py`; the
trials are in results/rivals-search).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lmsleep.models import HybridConfig
from lmsleep.ops.matching import Method
from lmsleep.recipes.recipe import Cell
from lmsleep.recipes.searched import LONGER, RATES, check_scale, paid, trained_longer
from lmsleep.recipes.settings import DEPO, PAIR, Scale
from lmsleep.sleep import Compact, Eviction, GradientSteps, GradMem, Hard, InPlace, MemoryTokens, SleepConfig
from lmsleep.tasks import MQAR, GSMInfinite, Task, Variables, WordProblem
from lmsleep.training import RunConfig, TrainConfig, training_flops

HEADS = {"1/4": 8, "1": 16, "4": 32}  # size of a head of S, by its share of the bytes
WIDTH, NUM_HEADS = 64, 4
MLP = 32  # of attention models, which then have about the parameters of the hybrid at its own bytes
NUMBER = 4  # bytes of a float32
TOKENS = ("memory tokens", "GradMem")


@dataclass(frozen=True)
class Bench:
    """A task of the bench: how it is read, and for how long N = 4 is trained, which is everyone's budget."""

    title: str
    task: Task
    window: int
    steps: int
    curriculum: float
    batch_size: int = 64
    later: tuple[str, ...] = TOKENS
    """Methods that few steps are left to: trained longer too, to tell "later" from "not at all"."""
    shown: tuple[int, ...] = ()
    """Difficulties that tell methods apart; by default the easiest and the hardest."""


# Contexts of 4 to 96 tokens, of two windows (of words: one to three): what a model of 40,000 parameters, and
# the embeddings of words, learns in a minute or two of one core.
BENCHES = {
    "depo": Bench(
        "the pointer chase: one hop is storage, three are depth",
        replace(DEPO, nodes=6, names=6, hops=3, queries=6),
        window=6,
        steps=500,
        curriculum=0.35,
        shown=(1, 2, 3),
    ),
    "mqar": Bench(
        "MQAR: storage alone",
        MQAR(pairs=8, keys=16, values=16, queries=8),
        window=8,
        steps=200,
        curriculum=0,
    ),
    "word-problem": Bench(
        "the word problem of S3: keeping track",
        WordProblem(group="S3", length=4, queries=4, held_out_words=True),
        window=2,
        steps=500,
        curriculum=0,
        shown=(3, 4),
    ),
    "variables": Bench(
        "variables: a chain of names is depth, its first one storage",
        Variables(chains=2, hops=2, names=12, queries=6),
        window=12,
        steps=400,
        curriculum=0.35,
        later=("N = 4", *TOKENS),
        shown=(0, 1),
    ),
    "gsm-infinite": Bench(
        "short GSM-Infinite: in words, two operations are a look-up, three mostly a chain of two",
        GSMInfinite(
            subset="medium",
            mode="forward",
            ops=(2, 3),
            length=(0, 96),
            noise=False,
            question="last",
            modulus=23,
            templates=("harbour",),
        ),
        window=32,
        steps=150,
        curriculum=0,
        batch_size=32,
        later=("N = 4", *TOKENS),
    ),
}


@dataclass(frozen=True)
class Found:
    """What the search found: Muon's rate, and whether the method's own choice is the other one."""

    lr: float = RATES[0]
    other: bool = False


Parts = tuple[HybridConfig, SleepConfig]  # of a run, but for its task and training


def bytes_of(share: str) -> int:
    """Return how many bytes a sequence may keep: those of `S` of one block, or a share of them."""
    return NUM_HEADS * HEADS[share] ** 2 * NUMBER


def _key_bytes(blocks: int) -> int:
    """Return the bytes of a key in every head: itself, its value, and three numbers of `Compact`."""
    return blocks * (2 * WIDTH + 3 * NUM_HEADS) * NUMBER


def _hybrid(
    bench: Bench, share: str, opened: bool, passes: int, *, pairs: int = 1, kept: Eviction | None = None
) -> Parts:
    """Make pairs of blocks whose `S`, with what is `kept` besides, take the bytes together."""
    fast = {"head_dim": HEADS[share], "value_dim": HEADS[share] // pairs // (2 if kept else 1)}
    model = HybridConfig(
        d_model=WIDTH,
        num_heads=NUM_HEADS,
        blocks=pairs * PAIR,
        mlp_dim=0,
        forget=(0.001, 0.001),
        conv_init=0.5 if opened else 0.0,
        overrides={2 * pair + 1: fast for pair in range(pairs)},
    )
    return model, SleepConfig(window=bench.window, passes=passes, eviction=kept or Hard())


def _with_keys(bench: Bench, share: str, opened: bool) -> Parts | None:
    """Make four passes into half of the bytes, and keys for the other half."""
    half = bytes_of(share) // 2
    if half < _key_bytes(blocks=1):
        return None
    return _hybrid(bench, share, opened, 4, kept=Compact(bytes=half, method="attended"))


def _attention(
    sleep: SleepConfig, *, blocks: int = 2, last: Mapping[str, Any] | None = None, **model: Any
) -> Parts:
    """Make blocks of attention; `last` are options of the second."""
    made = HybridConfig(
        d_model=WIDTH,
        num_heads=NUM_HEADS,
        blocks=("attention",) * blocks,
        mlp_dim=0,
        overrides={0: {"mlp_dim": MLP}, **({1: last} if last else {})},
        **model,
    )
    return made, sleep


def _sliding(bench: Bench, share: str, normed: bool) -> Parts:
    tokens = bytes_of(share) // (2 * 2 * WIDTH * NUMBER)  # key and value in two blocks
    return _attention(SleepConfig(window=tokens + 1, eviction="sliding"), qk_norm=normed)


def _whole(bench: Bench, share: str, normed: bool, blocks: int = 2) -> Parts:
    return _attention(SleepConfig(), blocks=blocks, qk_norm=normed)


def _tokens(bench: Bench, share: str, again: bool, kind: type[MemoryTokens | GradMem]) -> Parts:
    sleep = SleepConfig(window=bench.window, consolidator=kind(3 if again else 2))
    return _attention(sleep, memory_tokens=bytes_of(share) // (WIDTH * NUMBER))


def _in_place(bench: Bench, share: str, again: bool) -> Parts:
    last = {"mlp_dim": bytes_of(share) // (WIDTH * NUMBER), "in_place_mlp": True}
    return _attention(SleepConfig(window=bench.window, consolidator=InPlace(3 if again else 2)), last=last)


def _steps(bench: Bench, share: str, again: bool) -> Parts:
    # All three matrices are trained.
    last = {"mlp_dim": bytes_of(share) // (3 * WIDTH * NUMBER), "trained_mlp": True}
    sleep = SleepConfig(window=bench.window, consolidator=GradientSteps(3 if again else 2))
    return _attention(sleep, last=last)


# Each makes parts from a share of the bytes and a choice of its own, or None where so few bytes keep nothing.
# The choice: a convolution that starts open, a second write or step, normed queries and keys.
METHODS: dict[str, Callable[[Bench, str, bool], Parts | None]] = {
    "N = 4": partial(_hybrid, passes=4),
    "N = 2": partial(_hybrid, passes=2),
    "N = 1": partial(_hybrid, passes=1),
    "N = 1, twice the blocks": partial(_hybrid, passes=1, pairs=2),
    "N = 4, half of it keys": _with_keys,
    "gradient steps": _steps,
    "In-Place TTT": _in_place,
    "memory tokens": partial(_tokens, kind=MemoryTokens),
    "GradMem": partial(_tokens, kind=GradMem),
    "sliding": _sliding,
    "whole cache": _whole,
    "whole cache, twice the blocks": partial(_whole, blocks=4),
}
FREE = ("whole cache", "whole cache, twice the blocks")  # whose bytes nobody sets
# Of the whole cache, without training.
KEYS: dict[str, Method] = {"keys, fitted": "attention", "keys, as they are": "attended"}
# By task and method, the best of the committed trials; a task without them has no recipe.
FOUND: dict[str, dict[str, Found]] = {
    "mqar": {
        "N = 4": Found(0.015),
        "N = 2": Found(0.015),
        "N = 1": Found(0.0075),
        "N = 1, twice the blocks": Found(0.0075),
        "N = 4, half of it keys": Found(0.03, other=True),
        "gradient steps": Found(0.03),
        "In-Place TTT": Found(0.03),
        "memory tokens": Found(0.03),
        "GradMem": Found(0.06, other=True),
        "sliding": Found(0.015, other=True),
        "whole cache": Found(0.00375, other=True),
        "whole cache, twice the blocks": Found(0.00375, other=True),
    },
    "depo": {
        "N = 4": Found(0.03),
        "N = 2": Found(0.03),
        "N = 1": Found(0.00375),
        "N = 1, twice the blocks": Found(0.015),
        "N = 4, half of it keys": Found(0.015),
        "gradient steps": Found(0.0075),
        "In-Place TTT": Found(0.0075),
        "memory tokens": Found(0.015),
        "GradMem": Found(0.015),
        "sliding": Found(0.015, other=True),
        "whole cache": Found(0.03, other=True),
        "whole cache, twice the blocks": Found(0.015),
    },
    "word-problem": {
        "N = 4": Found(0.0075, other=True),
        "N = 2": Found(0.015),
        "N = 1": Found(0.015, other=True),
        "N = 1, twice the blocks": Found(0.0075),
        "N = 4, half of it keys": Found(0.0075),
        "gradient steps": Found(0.0075),
        "In-Place TTT": Found(0.00375),
        "memory tokens": Found(0.03),
        "GradMem": Found(0.03),
        "sliding": Found(0.0075),
        "whole cache": Found(0.0075),
        "whole cache, twice the blocks": Found(0.015),
    },
    "variables": {
        "N = 4": Found(0.00375),
        "N = 2": Found(0.0075),
        "N = 1": Found(0.015),
        "N = 1, twice the blocks": Found(0.0075),
        "N = 4, half of it keys": Found(0.00375, other=True),
        "gradient steps": Found(0.03),
        "In-Place TTT": Found(0.00375),
        "memory tokens": Found(0.03),
        "GradMem": Found(0.015),
        "sliding": Found(0.00375),
        "whole cache": Found(0.00375),
        "whole cache, twice the blocks": Found(0.0075),
    },
    "gsm-infinite": {
        "N = 4": Found(0.015, other=True),
        "N = 2": Found(0.0075),
        "N = 1": Found(0.015, other=True),
        "N = 1, twice the blocks": Found(0.015, other=True),
        "N = 4, half of it keys": Found(0.015),
        "gradient steps": Found(0.0075),
        "In-Place TTT": Found(0.00375),
        "memory tokens": Found(0.0075),
        "GradMem": Found(0.03),
        "sliding": Found(0.015),
        "whole cache": Found(0.0075),
        "whole cache, twice the blocks": Found(0.015, other=True),
    },
}


def run(bench: Bench, method: str, share: str, found: Found, flops: int) -> RunConfig | None:
    """Return a run of a method for so many training FLOPs; None where so few bytes keep nothing."""
    parts = METHODS[method](bench, share, found.other)
    if parts is None:
        return None
    made = _run(bench, parts, lr=found.lr, adam_lr=0.02, save_every=250, threads=1)
    return paid(made, flops, bench.curriculum)


def budget(bench: Bench) -> int:
    """Return the training FLOPs that every method has: those of N = 4 at the bytes of `S`."""
    return training_flops(_run(bench, _hybrid(bench, "1", False, 4)))


def _run(bench: Bench, parts: Parts, **train: Any) -> RunConfig:
    model, sleep = parts
    options = TrainConfig(batch_size=bench.batch_size, steps=bench.steps, **train)
    return RunConfig(task=bench.task, model=model, sleep=sleep, train=options)


def cells(task: str) -> Callable[[Scale], list[Cell]]:
    """Return every method on a task of the bench, at each share of the bytes."""

    def made(scale: Scale) -> list[Cell]:
        check_scale(scale, f"rivals-{task}", "tools/rivals.py")
        bench, chosen = BENCHES[task], FOUND[task]
        flops, found = budget(bench), list[Cell]()
        for share in HEADS:
            for method in METHODS:
                choice = chosen[method]
                config = run(bench, method, share, choice, flops)
                if config is None or method in FREE:
                    continue
                name = f"{method} ({share})"
                found.append(Cell(name, config, line=method))
                if share == "1" and method in bench.later:
                    longer = run(bench, method, share, choice, LONGER * flops)
                    assert longer is not None
                    found.append(trained_longer(name, longer))
        return found + _bounds(bench, chosen, flops)

    return made


def _bounds(bench: Bench, chosen: Mapping[str, Found], flops: int) -> list[Cell]:
    """Return whole caches, the keys of one compacted when it is read, and that model with nothing kept."""
    found, whole = list[Cell](), None
    for method in FREE:
        config = run(bench, method, "1", chosen[method], flops)
        assert config is not None
        found.append(Cell(method, config))
        whole = whole or config
    assert whole is not None
    forgets = replace(whole, sleep=SleepConfig(window=bench.window))
    found.append(Cell("nothing kept", paid(forgets, flops, bench.curriculum), once=True))
    for share in HEADS:
        if bytes_of(share) < _key_bytes(blocks=2):
            continue
        for label, method in KEYS.items():
            keys = Compact(bytes=bytes_of(share), method=method)
            asleep = SleepConfig(window=bench.window, eviction=keys)
            found.append(Cell(f"{label} ({share})", whole, line=label, folder="whole-cache", reading=asleep))
    return found
