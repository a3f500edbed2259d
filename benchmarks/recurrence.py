"""The gated delta rule in PyTorch against fla's kernels or, without them, against transformers."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from benchmarks.processor import Processor, has_kernels
from benchmarks.table import Cell, Table
from benchmarks.timing import ms, ratio, take_turns
from lmsleep import ops
from lmsleep.flops import flops_of

HEADS = 4
BATCH = {24: 64, 75: 16, 512: 4, 2000: 1}  # sequences: 1,200 to 2,048 tokens in all
# Behind the decorator, which would look for a kernel on the Hub.
theirs = getattr(torch_chunk_gated_delta_rule, "__wrapped__", torch_chunk_gated_delta_rule)


def tables(repeats: int, tiny: bool, processor: Processor) -> dict[str, Callable[[], Table]]:
    """Return one table."""
    # On a GPU the sizes of the paper's models: each takes fla's kernels tens of seconds to compile.
    lengths, sizes = ((24,), (16,)) if tiny else (tuple(BATCH), (64, 128) if processor.gpu else (32, 64, 128))
    return {"delta": lambda: delta(processor, lengths, sizes, repeats)}


def delta(processor: Processor, lengths: tuple[int, ...], sizes: tuple[int, ...], repeats: int) -> Table:
    """Time forward, and forward with backward, for K = V in `sizes`."""
    peak, rows = processor.matmul_peak(torch.float32), []
    for dtype in (torch.float32, torch.bfloat16):
        for T in lengths:
            for K in sizes:
                rows.append(_row(processor, T, K, dtype, repeats, peak))
    note = (
        f"Gated delta rule, batches of {', '.join(f'{BATCH[T]} x {T}' for T in lengths)} tokens, "
        f"{HEADS} heads, {'one GPU. Its' if processor.gpu else 'one thread. CPU'} time, medians of {repeats} "
        "repeats that took turns; ratios of two calls in the same repeat: median [10th ... 90th percentile]. "
        f"q, k, v have the dtype given; {'ours computes' if processor.gpu else 'both compute'} in float32. "
        f"Limit: the FLOPs of our matrix products at the measured {peak / 1e9:.0f} GFLOP/s."
    )
    return Table(rows=rows, note=note)


def ours(x: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return outputs for `x = [q, k, v, g, beta, S]`, and the state after its tokens."""
    return ops.gated_delta_rule(*x[:5], initial_state=x[5], backend="chunked")


def peer(x: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute the same by transformers."""
    result: tuple[Tensor, Tensor] = theirs(*x[:5], initial_state=x[5], output_final_state=True)
    return result


def kernels(x: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute the same by flash-linear-attention."""
    return ops.gated_delta_rule(*x[:5], initial_state=x[5], backend="fla")


def inputs(T: int, K: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Tensor]:
    """Draw random q, k, v, g, beta and S."""
    rng = torch.Generator().manual_seed(0)
    B = BATCH[T]

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    q, k = (F.normalize(randn(B, T, HEADS, K), dim=-1).to(dtype) for _ in "qk")
    g, beta = -0.1 * torch.rand(B, T, HEADS, generator=rng), torch.rand(B, T, HEADS, generator=rng)
    x = [q, k, randn(B, T, HEADS, K).to(dtype), g, beta, randn(B, HEADS, K, K)]
    return [y.to(device).requires_grad_() for y in x]


def _row(
    processor: Processor, T: int, K: int, dtype: torch.dtype, repeats: int, peak: float
) -> dict[str, Cell]:
    x = inputs(T, K, dtype, processor.device)
    weights = [torch.ones_like(y) for y in ours(x)]

    def forward(rule: Callable[[list[Tensor]], tuple[Tensor, Tensor]]) -> None:
        with torch.no_grad():
            rule(x)

    def both(rule: Callable[[list[Tensor]], tuple[Tensor, Tensor]]) -> None:
        torch.autograd.grad(rule(x), x, weights)

    name, other = ("fla", kernels) if processor.gpu and has_kernels() else ("transformers", peer)
    calls = {
        (way.__name__, whose): partial(way, rule)
        for way in (forward, both)
        for whose, rule in (("ours", ours), ("peer", other))
    }
    spent = {case: processor.seconds(times) for case, times in take_turns(calls, repeats).items()}
    return {
        "dtype": str(dtype)[6:],
        "T": T,
        "K = V": K,
        "forward, ms": ms(spent["forward", "ours"]),
        f"{name}, ms": ms(spent["forward", "peer"]),
        "times as fast": ratio(spent["forward", "peer"], spent["forward", "ours"]),
        "with backward, ms": ms(spent["both", "ours"]),
        f"{name} with backward, ms": ms(spent["both", "peer"]),
        "times as fast with backward": ratio(spent["both", "peer"], spent["both", "ours"]),
        "% of the limit": 100 * flops_of(calls["both", "ours"]) / peak / (ms(spent["both", "ours"]) / 1e3),
    }
