"""Rivals on one bench: what else could keep a window, at equal bytes and for equal training FLOPs.

Bytes are those of `S` in one Gated DeltaNet block, a quarter and four times as many. Every method has the
learning rate, and the one choice of its own, that the same small search found for it (`tools/rivals.py`; the
trials are in results/rivals-search).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lmsleep.models import HybridConfig
from lmsleep.recipes.recipe import Cell
from lmsleep.recipes.settings import DEPO, PAIR, Scale
from lmsleep.sleep import (
    Compact,
    Eviction,
    GradientSteps,
    GradMem,
    InPlace,
    MemoryTokens,
    Passes,
    SleepConfig,
    Sliding,
)
from lmsleep.tasks import MQAR, Task, Variables, WordProblem
from lmsleep.training import RunConfig, TrainConfig, flops_per_step, training_flops

HEADS = {"1/4": 8, "1": 16, "4": 32}  # size of a head of S, by its share of the bytes
WIDTH, NUM_HEADS = 64, 4
MLP = 32  # of attention models, which then have the parameters of the hybrid
NUMBER = 4  # bytes of a float32
RATES = (0.015, 0.0075, 0.03)  # Muon's, in the order of the search
LONGER = 3  # times the training, for those that learned nothing: later, or not at all?


@dataclass(frozen=True)
class Bench:
    """A task of the bench: how it is read, and for how long N = 4 is trained, which is everyone's budget."""

    task: Task
    window: int
    steps: int
    curriculum: float
    batch_size: int = 64


# Contexts of 8 to 36 tokens: what a model of 40,000 parameters learns in a minute of one core.
BENCHES = {
    "depo": Bench(replace(DEPO, nodes=6, names=6, hops=3, queries=6), window=6, steps=500, curriculum=0.35),
    "mqar": Bench(MQAR(pairs=8, keys=16, values=16, queries=8), window=8, steps=200, curriculum=0),
    "word-problem": Bench(WordProblem(group="S3", length=4, queries=4), window=2, steps=700, curriculum=0.35),
    "variables": Bench(
        Variables(chains=3, hops=2, names=9, queries=9), window=18, steps=400, curriculum=0.35
    ),
}


@dataclass(frozen=True)
class Found:
    """What the search found: Muon's rate, and whether the method's own choice is the other one."""

    lr: float = RATES[0]
    other: bool = False


@dataclass(frozen=True)
class Method:
    """A way to keep a window.

    Attributes:
        make: from a share of the bytes (a key of `HEADS`) and the choice, model and sleep without its window;
            None where so few bytes keep nothing.
        other: what the search tries besides rates.
    """

    make: Callable[[str, bool], tuple[HybridConfig, SleepConfig] | None]
    other: str


def bytes_of(share: str) -> int:
    """Return how many bytes a sequence may keep: those of `S` of one block, or a share of them."""
    return NUM_HEADS * HEADS[share] ** 2 * NUMBER


def _hybrid(
    share: str, consolidator: Passes, *, opened: bool, blocks: int = 1, halves: int = 1, **sleep: Any
) -> tuple[HybridConfig, SleepConfig]:
    """Return pairs of blocks whose `S` take the bytes together (divided by `halves`)."""
    size = HEADS[share]
    fast = {"head_dim": size, "value_dim": size // (blocks * halves)}
    model = HybridConfig(
        d_model=WIDTH,
        num_heads=NUM_HEADS,
        blocks=blocks * PAIR,
        mlp_dim=0,
        forget=(0.001, 0.001),
        conv_init=0.5 if opened else 0.0,
        overrides={2 * pair + 1: fast for pair in range(blocks)},
    )
    return model, SleepConfig(consolidator=consolidator, **sleep)


def _attention(
    consolidator: Any = None,
    eviction: Eviction | str = "hard",
    last: Mapping[str, Any] | None = None,
    blocks: int = 2,
    **model: Any,
) -> tuple[HybridConfig, SleepConfig]:
    """Return blocks of attention; `last` are options of the second."""
    overrides = {0: {"mlp_dim": MLP}, **({1: last} if last else {})}
    made = HybridConfig(
        d_model=WIDTH,
        num_heads=NUM_HEADS,
        blocks=("attention",) * blocks,
        mlp_dim=0,
        overrides=overrides,
        **model,
    )
    return made, SleepConfig(consolidator=consolidator or Passes(), eviction=eviction)


def _sleeps(passes: int, blocks: int = 1) -> Method:
    """Make a sleep in passes, of one or more pairs of blocks."""
    return Method(
        lambda share, other: _hybrid(share, Passes(passes), opened=other, blocks=blocks),
        "a short convolution that is open at the start",
    )


def _with_keys(share: str, other: bool) -> tuple[HybridConfig, SleepConfig] | None:
    """Make four passes into half of the bytes, and keys for the other half."""
    if bytes_of(share) // 2 < _key_bytes(blocks=1):
        return None
    keys = Compact(bytes=bytes_of(share) // 2, method="attended")
    return _hybrid(share, Passes(4), opened=other, halves=2, eviction=keys)


def _key_bytes(blocks: int) -> int:
    """Return the bytes of a key in every head: itself, its value, and three numbers of `Compact`."""
    return blocks * (2 * WIDTH + 3 * NUM_HEADS) * NUMBER


def _sliding(share: str, other: bool) -> tuple[HybridConfig, SleepConfig]:
    return _attention(eviction=Sliding(), qk_norm=other)


def _tokens(kind: type[MemoryTokens | GradMem]) -> Method:
    def make(share: str, other: bool) -> tuple[HybridConfig, SleepConfig]:
        return _attention(kind(3 if other else 2), memory_tokens=bytes_of(share) // (WIDTH * NUMBER))

    return Method(make, "a second write")


def _in_place(share: str, other: bool) -> tuple[HybridConfig, SleepConfig]:
    hidden = bytes_of(share) // (WIDTH * NUMBER)
    return _attention(InPlace(3 if other else 2), last={"mlp_dim": hidden, "in_place_mlp": True})


def _steps(share: str, other: bool) -> tuple[HybridConfig, SleepConfig]:
    hidden = bytes_of(share) // (3 * WIDTH * NUMBER)  # all three matrices are trained
    return _attention(GradientSteps(3 if other else 2), last={"mlp_dim": hidden, "trained_mlp": True})


# By task and method, from the committed trials; a method that is not named has the first of everything.
FOUND: dict[str, dict[str, Found]] = {}
METHODS: dict[str, Method] = {
    "N = 4": _sleeps(4),
    "N = 2": _sleeps(2),
    "N = 1": _sleeps(1),
    "N = 1, twice the blocks": _sleeps(1, blocks=2),
    "N = 4, half of it keys": Method(_with_keys, "a short convolution that is open at the start"),
    "gradient steps": Method(_steps, "a second step"),
    "In-Place TTT": Method(_in_place, "a second reading"),
    "memory tokens": _tokens(MemoryTokens),
    "GradMem": _tokens(GradMem),
    "sliding": Method(_sliding, "normalised queries and keys"),
    "whole cache": Method(lambda _, other: _attention(qk_norm=other), "normalised queries and keys"),
    "whole cache, twice the blocks": Method(
        lambda _, other: _attention(blocks=4, qk_norm=other), "normalised queries and keys"
    ),
}
KEYS: dict[str, Literal["attention", "attended"]] = {
    "keys, fitted": "attention",
    "keys, as they are": "attended",
}  # of the whole cache, without training
FREE = ("whole cache", "whole cache, twice the blocks")  # whose bytes nobody sets
TOKENS = ("memory tokens", "GradMem")


def run(bench: Bench, method: str, share: str, found: Found, flops: int | None = None) -> RunConfig | None:
    """Return a run of a method for so many training FLOPs (None: those of the bench).

    Returns:
        None where so few bytes keep nothing.
    """
    made = METHODS[method].make(share, found.other)
    if made is None:
        return None
    model, sleep = made
    window: int | None = bench.window
    if method == "sliding":
        # A token of the cache, in two blocks.
        window = 1 + bytes_of(share) // (2 * 2 * WIDTH * NUMBER)
    if method in FREE:
        window = None
    train = TrainConfig(
        batch_size=bench.batch_size, steps=bench.steps, lr=found.lr, adam_lr=0.02, eval_every=100, threads=1,
        save_every=250,
    )  # fmt: skip
    made_run = RunConfig(task=bench.task, model=model, sleep=replace(sleep, window=window), train=train)
    return _for_flops(made_run, bench, budget(bench) if flops is None else flops)


def budget(bench: Bench) -> int:
    """Return the training FLOPs that every method has: those of N = 4 at the bytes of `S`."""
    model, sleep = _hybrid("1", Passes(4), opened=False)
    train = TrainConfig(batch_size=bench.batch_size, steps=bench.steps)
    sleep = replace(sleep, window=bench.window)
    return training_flops(RunConfig(task=bench.task, model=model, sleep=sleep, train=train))


def _for_flops(made: RunConfig, bench: Bench, flops: int) -> RunConfig:
    steps = max(math.floor(flops / flops_per_step(made)), 1)
    curriculum = round(bench.curriculum * steps)
    return replace(made, train=replace(made.train, steps=steps, curriculum=curriculum))


def cells(task: str) -> Callable[[Scale], list[Cell]]:
    """Return every method on a task of the bench, at each share of the bytes."""

    def made(scale: Scale) -> list[Cell]:
        if scale != "demo":
            raise ValueError(
                f"rivals-{task} at scale={scale}: the rivals' rates were searched at the demo's size alone; "
                "use scale=demo, and tools/rivals.py to search at another"
            )
        bench, chosen = BENCHES[task], FOUND.get(task, {})
        flops, found = budget(bench), list[Cell]()
        for share in HEADS:
            for method in METHODS:
                choice = chosen.get(method, Found())
                config = run(bench, method, share, choice, flops)
                if config is None or method in FREE:
                    continue
                at = bytes_of(share)
                name = f"{method} ({share})"
                found.append(Cell(name, config, at=at, line=method))
                if share == "1" and method in TOKENS:
                    longer = run(bench, method, share, choice, LONGER * flops)
                    assert longer is not None
                    label = f"{name}, {LONGER} times the training"
                    found.append(Cell(label, longer, at=at, line=label, once=True))
        return found + _bounds(bench, chosen, flops)

    return made


def _bounds(bench: Bench, chosen: Mapping[str, Found], flops: int) -> list[Cell]:
    """Return whole caches, the keys of one compacted when it is read, and that model with nothing kept."""
    found, whole = list[Cell](), None
    for method in FREE:
        config = run(bench, method, "1", chosen.get(method, Found()), flops)
        assert config is not None
        found.append(Cell(method, config))
        whole = whole or config
    assert whole is not None
    forgets = replace(whole, sleep=SleepConfig(window=bench.window))
    found.append(Cell("nothing kept", forgets, once=True))
    for share in HEADS:
        if bytes_of(share) < _key_bytes(blocks=2):
            continue
        for label, method in KEYS.items():
            keys = Compact(bytes=bytes_of(share), method=method)
            asleep = SleepConfig(window=bench.window, eviction=keys)
            found.append(Cell(f"{label} ({share})", whole, line=label, folder="whole-cache", reading=asleep))
    return found
