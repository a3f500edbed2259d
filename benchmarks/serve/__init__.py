"""Serving measured: streams together, waiting, turns of a long conversation, and what HTTP costs."""

from collections.abc import Callable

from benchmarks.serve import loopback, together, turns, waiting
from benchmarks.table import Table
from lmsleep import HybridConfig

SMALL = HybridConfig(d_model=64, blocks=("attention", "gated_delta_net"))
MIDDLE = HybridConfig()  # four blocks of width 256: 3 million parameters


def tables(repeats: int, tiny: bool) -> dict[str, Callable[[], Table]]:
    """Return all tables, of models with random weights."""
    model, window = (SMALL, 32) if tiny else (MIDDLE, 256)
    width, contexts = (64, (24, 40)) if tiny else (256, (512, 16_000))
    counts = (1, 2) if tiny else (1, 8, 32, 128)
    sleepers = waiting.Asked(model, window, question=window // 16, answer=window // 8)
    return {
        "together": lambda: together.streams(
            width,
            window=32 if tiny else 1024,
            contexts=contexts,
            counts=(1, 2) if tiny else (1, 8, 32),
            tokens=4 if tiny else 16,
            repeats=repeats,
        ),
        "waiting": lambda: waiting.waits(sleepers, counts=counts, repeats=2 * repeats),
        "stalls": lambda: waiting.stalls(sleepers, count=counts[1], repeats=repeats),
        "policies": lambda: waiting.policies(sleepers, count=counts[1], repeats=repeats),
        "turns": lambda: turns.turn(model, window=window, length=200 if tiny else 100_000, repeats=repeats),
        "http": lambda: loopback.overhead(
            model, window=window, count=counts[-2], tokens=8 if tiny else 64, repeats=repeats
        ),
    }
