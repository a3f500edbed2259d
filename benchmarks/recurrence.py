"""The gated delta rule, ours against transformers' PyTorch form."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from benchmarks.table import Cell, Table
from benchmarks.timing import flops, matmul_peak, ms, ratio, take_turns
from lmsleep import ops

HEADS = 4
BATCH = {24: 64, 75: 16, 512: 4, 2000: 1}  # sequences: 1,200 to 2,048 tokens in all
# Behind the decorator, which would look for a kernel on the Hub.
theirs = getattr(torch_chunk_gated_delta_rule, "__wrapped__", torch_chunk_gated_delta_rule)


def tables(repeats: int, tiny: bool) -> dict[str, Callable[[], Table]]:
    """One table."""
    lengths, sizes = ((24,), (8,)) if tiny else (tuple(BATCH), (32, 64, 128))
    return {"delta": lambda: delta(lengths, sizes, repeats)}


def delta(lengths: tuple[int, ...], sizes: tuple[int, ...], repeats: int) -> Table:
    """Forward, and forward with backward, for K = V in `sizes`."""
    peak, rows = matmul_peak(), []
    for dtype in (torch.float32, torch.bfloat16):
        for T in lengths:
            for K in sizes:
                rows.append(_row(T, K, dtype, repeats, peak))
    note = (
        f"Gated delta rule, batches of {', '.join(f'{BATCH[T]} x {T}' for T in lengths)} tokens, "
        f"{HEADS} heads, one thread. CPU time, medians of {repeats} repeats that took turns; ratios of two "
        "calls in the same repeat: median [10th ... 90th percentile]. q, k and v have the dtype given; both "
        "compute in float32. Limit: the FLOPs of our matrix products at the measured "
        f"{peak / 1e9:.0f} GFLOP/s."
    )
    return Table(rows=rows, note=note)


def ours(x: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The state of `x = [q, k, v, g, beta, S]` after its tokens, and outputs."""
    return ops.gated_delta_rule(*x[:5], initial_state=x[5])


def peer(x: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The same by transformers."""
    result: tuple[Tensor, Tensor] = theirs(*x[:5], initial_state=x[5], output_final_state=True)
    return result


def inputs(T: int, K: int, dtype: torch.dtype) -> list[Tensor]:
    """Random q, k, v, g, beta and S."""
    rng = torch.Generator().manual_seed(0)
    B = BATCH[T]

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    q, k = (F.normalize(randn(B, T, HEADS, K), dim=-1).to(dtype) for _ in "qk")
    g, beta = -0.1 * torch.rand(B, T, HEADS, generator=rng), torch.rand(B, T, HEADS, generator=rng)
    x = [q, k, randn(B, T, HEADS, K).to(dtype), g, beta, randn(B, HEADS, K, K)]
    return [y.requires_grad_() for y in x]


def _row(T: int, K: int, dtype: torch.dtype, repeats: int, peak: float) -> dict[str, Cell]:
    x = inputs(T, K, dtype)
    weights = [torch.ones_like(y) for y in ours(x)]

    def forward(rule: Callable[[list[Tensor]], tuple[Tensor, Tensor]]) -> None:
        with torch.no_grad():
            rule(x)

    def both(rule: Callable[[list[Tensor]], tuple[Tensor, Tensor]]) -> None:
        torch.autograd.grad(rule(x), x, weights)

    calls = {
        (way.__name__, rule.__name__): partial(way, rule) for way in (forward, both) for rule in (ours, peer)
    }
    cpu = {case: times.cpu for case, times in take_turns(calls, repeats).items()}
    return {
        "dtype": str(dtype)[6:],
        "T": T,
        "K = V": K,
        "forward, ms": ms(cpu["forward", "ours"]),
        "transformers, ms": ms(cpu["forward", "peer"]),
        "times as fast": ratio(cpu["forward", "peer"], cpu["forward", "ours"]),
        "with backward, ms": ms(cpu["both", "ours"]),
        "transformers' too, ms": ms(cpu["both", "peer"]),
        "times as fast with backward": ratio(cpu["both", "peer"], cpu["both", "ours"]),
        "% of the limit": 100 * flops(calls["both", "ours"]) / peak / (ms(cpu["both", "ours"]) / 1e3),
    }
