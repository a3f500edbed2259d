"""Causal depthwise short convolution with a carried tail."""

import torch
from torch import Tensor


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
    # A sum of W shifted products: for W <= 4 faster than conv1d on CPU, and free of transposes.
    y = sum(padded[:, i : i + x.shape[1]] * weight[:, i] for i in range(W))
    assert isinstance(y, Tensor)
    return y, seen[:, max(seen.shape[1] - (W - 1), 0) :]
