"""The paper's figure 6: what windows cost in training, and what passes do; on a CPU with a small model."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.processor import Processor
from benchmarks.sessions import SMALL
from benchmarks.table import Cell, Table
from benchmarks.timing import ms, ratio, take_turns
from lmsleep import HybridConfig, HybridLM, SleepConfig, sleep_forward
from lmsleep.flops import flops_of
from lmsleep.recipes.catalogue import RECIPES
from lmsleep.training.held import peak_bytes

# The paper's figure is of a model of 1.4 billion parameters: that of the recipe, which reads bytes here.
LARGE = replace(RECIPES["6"].cells("paper")[0].config.architecture, vocab_size=256)


def tables(repeats: int, tiny: bool, processor: Processor) -> dict[str, Callable[[], Table]]:
    """Return one table."""
    T, windows = (32, (8,)) if tiny else (12_000, (1000, 2000, 4000))
    model = LARGE if processor.gpu and not tiny else SMALL
    return {"length": lambda: lengths(processor, model, T, windows, (1, 2, 4), repeats)}


def lengths(
    processor: Processor,
    config: HybridConfig,
    T: int,
    windows: tuple[int, ...],
    passes: tuple[int, ...],
    repeats: int,
) -> Table:
    """Time forward and backward over one sequence, whole or by windows, every token predicted."""
    torch.manual_seed(0)
    with processor.device:
        model = HybridLM(config)
    params = sum(p.numel() for p in model.parameters())
    # Weights and gradients take half of the memory at most.
    low = processor.gpu and processor.holds() < 16 * params
    model.to(torch.bfloat16 if low else torch.float32)
    tokens = torch.randint(256, (1, T), generator=torch.Generator().manual_seed(0)).to(processor.device)
    whole = (0, 1)
    cases = [whole, *((L, n) for L in windows for n in passes)]

    def loss(sleep: SleepConfig) -> Tensor:
        found = sleep_forward(model, tokens, tokens >= 0, sleep, return_logits=False, checkpoint=True).loss
        assert found is not None
        return found

    def step(L: int, n: int) -> None:
        sleep = SleepConfig(window=L or None, passes=n)
        try:
            processor.within(partial(loss, sleep))().backward()
        finally:
            model.zero_grad()  # of a step that did not fit too

    calls = {case: partial(step, *case) for case in cases}
    if processor.gpu:
        calls = {case: call for case, call in calls.items() if _fits(call)}
    peak = processor.matmul_peak()
    spent = {case: processor.seconds(times) for case, times in take_turns(calls, repeats).items()}
    rows: list[dict[str, Cell]] = [
        {
            "window": f"L = {L}" if L else "none, all in parallel",
            "N": n,
            f"{processor.clock} ms": ms(spent[L, n]),
            "tokens/s": T / (ms(spent[L, n]) / 1e3),
            "throughput to N = 1": ratio(spent[L, 1], spent[L, n]),
            "to all in parallel": ratio(spent[whole], spent[L, n]) if whole in spent else None,
            "peak, MB": peak_bytes(calls[L, n]) / 1e6,
            "% of the matrix product's rate": 100 * flops_of(calls[L, n]) / peak / (ms(spent[L, n]) / 1e3),
        }
        for L, n in calls
    ]
    note = (
        f"Forward and backward over one sequence of {T:,} random bytes, every token predicted; "
        f"{len(config.blocks)} blocks ({' and '.join(dict.fromkeys(config.blocks))}) of width "
        f"{config.d_model}, {params / 1e6:,.1f} million random weights{' in bfloat16' if low else ''}, "
        f"{processor.text}, activations recomputed. {repeats} repeats that took turns; ratios of "
        "throughput within a repeat: median [10th ... 90th percentile]."
    )
    if len(calls) < len(cases):
        note += " What is missing does not fit into the GPU's memory."
    return Table(rows=rows, note=note)


def _fits(call: Callable[[], object]) -> bool:
    try:
        call()
    except torch.OutOfMemoryError:
        pass
    else:
        return True
    torch.cuda.empty_cache()
    return False
