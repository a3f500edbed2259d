"""Convolve causally and depthwise over a few tokens, with a carried tail."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmsleep.ops.align import right_align


def short_conv(x: Tensor, weight: Tensor, tail: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Convolve each channel over the current and the `W - 1` previous tokens.

    Args:
        x: inputs `[B, T, C]`.
        weight: `[C, W]`; `weight[:, -1]` multiplies the current token.
        tail: the inputs just before `x`, `[B, t, C]` with any `t <= W - 1`; missing ones are zeros.
        valid: `[B, T]` bool: False for padding at the end of a row, which the new tail leaves out.

    Returns:
        Outputs `[B, T, C]` and the new tail: the last `W - 1` inputs (fewer if fewer were seen), so
        that a sequence cut anywhere gives the result of the uncut one.
    """
    seen = torch.cat([tail, x], dim=1)
    y: Tensor = _Taps.apply(seen, weight, x.shape[1])  # type: ignore[no-untyped-call]
    # Outputs of padding are never read, but as inputs it would lie between this window and the next one.
    if valid is not None:
        seen = right_align(seen, valid)
    # Counted from the front: with W = 1 a slice from -0 would keep all.
    return y, seen[:, max(seen.shape[1] - (weight.shape[1] - 1), 0) :]


class _Taps(torch.autograd.Function):
    """`y_t = sum_j weight_{W-1-j} x_{t-j}` over the inputs there are: shifted products, summed in place.

    For the few taps and tokens of a window faster on a CPU than conv1d, which wants channels first.
    """

    @staticmethod
    def forward(ctx: Any, seen: Tensor, weight: Tensor, T: int) -> Tensor:
        taps = weight.mT.contiguous()  # [W, C], newest last
        ctx.save_for_backward(seen, taps)
        ctx.T, past = T, seen.shape[1] - T
        # The current token first, in a fresh tensor that the earlier inputs can then be added to in place.
        y = seen[:, past:] * taps[-1]
        for tap, first, inputs in _lags(len(taps), T, past):
            y[:, first:].addcmul_(seen[:, inputs], taps[tap])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        seen, taps = ctx.saved_tensors
        past = seen.shape[1] - ctx.T
        # The tail gets gradients too: sliding windows hand it on, and so the graphs of two windows are one.
        dseen, dtaps = F.pad(dy * taps[-1], (0, 0, past, 0)), torch.zeros_like(taps)
        dtaps[-1] = (dy * seen[:, past:]).sum((0, 1))
        for tap, first, inputs in _lags(len(taps), ctx.T, past):
            dseen[:, inputs].addcmul_(dy[:, first:], taps[tap])
            dtaps[tap] = (dy[:, first:] * seen[:, inputs]).sum((0, 1))
        return dseen, dtaps.mT, None


def _lags(W: int, T: int, past: int) -> Iterator[tuple[int, int, slice]]:
    """Yield for each earlier input its tap, the first output that has it, and where the inputs lie."""
    # A short tail has no input for the first outputs at long lags: these begin at `first`.
    for lag in range(1, min(W, past + T)):
        first = max(lag - past, 0)
        yield W - 1 - lag, first, slice(past + first - lag, past + T - lag)
