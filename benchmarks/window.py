"""The paper's figure 6 on a small model: what windows cost in training, and what passes do."""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.sessions import SMALL
from benchmarks.table import Cell, Table
from benchmarks.timing import flops, matmul_peak, ms, peak_bytes, ratio, take_turns
from lmsleep import HybridConfig, HybridLM, SleepConfig, sleep_forward


def tables(repeats: int, tiny: bool) -> dict[str, Callable[[], Table]]:
    """One table."""
    T, windows = (32, (8, 16)) if tiny else (12_000, (1000, 2000, 4000))
    return {"length": lambda: lengths(SMALL, T, windows, (1, 2, 4), repeats)}


def lengths(
    config: HybridConfig, T: int, windows: tuple[int, ...], passes: tuple[int, ...], repeats: int
) -> Table:
    """Forward and backward over one sequence, whole or window by window, every token predicted."""
    torch.manual_seed(0)
    model, tokens = HybridLM(config), torch.randint(256, (1, T), generator=torch.Generator().manual_seed(0))
    whole = (0, 1)
    cases = [whole, *((L, n) for L in windows for n in passes)]

    def step(L: int, n: int) -> None:
        sleep = SleepConfig(window=L or None, passes=n, checkpoint=True)
        loss = sleep_forward(model, tokens, tokens >= 0, sleep, return_logits=False).loss
        assert loss is not None
        loss.backward()
        model.zero_grad()

    calls = {case: partial(step, *case) for case in cases}
    peak = matmul_peak()
    cpu = {case: times.cpu for case, times in take_turns(calls, repeats).items()}
    rows: list[dict[str, Cell]] = [
        {
            "window": f"L = {L}" if L else "none, all in parallel",
            "N": n,
            "CPU ms": ms(cpu[L, n]),
            "tokens/s": T / (ms(cpu[L, n]) / 1e3),
            "throughput to N = 1": ratio(cpu[L, 1], cpu[L, n]),
            "to all in parallel": ratio(cpu[whole], cpu[L, n]),
            "peak, MB": peak_bytes(calls[L, n]) / 1e6,
            "% of the matrix product's rate": 100 * flops(calls[L, n]) / peak / (ms(cpu[L, n]) / 1e3),
        }
        for L, n in cases
    ]
    note = (
        f"Forward and backward over one sequence of {T:,} random bytes, every token predicted; "
        f"blocks {' and '.join(config.blocks)} of width {config.d_model}, random weights, float32, one "
        f"thread, activations recomputed. {repeats} repeats that took turns; ratios of throughput within a "
        "repeat: median [10th ... 90th percentile]."
    )
    return Table(rows=rows, note=note)
