"""Causal depthwise short convolution with a carried tail."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def short_conv(x: Tensor, weight: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Convolve each channel over the current and the `W - 1` previous tokens.

    Args:
        x: inputs `[B, T, C]`.
        weight: `[C, W]`; `weight[:, -1]` multiplies the current token.
        tail: the inputs just before `x`, `[B, t, C]` with any `t <= W - 1`; missing ones are zeros.

    Returns:
        Outputs `[B, T, C]` and the new tail: the last `W - 1` inputs (fewer if fewer were seen), so
        that a sequence cut anywhere gives the result of the uncut one.
    """
    W, seen = weight.shape[1], torch.cat([tail, x], dim=1)
    padded = torch.cat([x.new_zeros(x.shape[0], W - 1 - tail.shape[1], x.shape[2]), seen], dim=1)
    y: Tensor = _Taps.apply(padded, weight)  # type: ignore[no-untyped-call]
    return y, seen[:, max(seen.shape[1] - (W - 1), 0) :]


class _Taps(torch.autograd.Function):
    """`y_t = sum_i weight_i x_{t+i}`: W shifted products, summed in place.

    For the few taps and tokens of a window faster on a CPU than conv1d, which wants channels first.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        T, taps = x.shape[1] - weight.shape[1] + 1, weight.unbind(1)
        y = x[:, :T] * taps[0]
        for i, tap in enumerate(taps[1:], start=1):
            y.addcmul_(x[:, i : i + T], tap)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        T, dx = dy.shape[1], torch.zeros_like(x)
        dweight = []
        for i, tap in enumerate(weight.unbind(1)):
            dx[:, i : i + T].addcmul_(dy, tap)
            dweight.append((dy * x[:, i : i + T]).sum((0, 1)))
        return dx, torch.stack(dweight, dim=1)
