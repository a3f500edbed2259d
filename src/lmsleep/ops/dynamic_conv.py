"""Convolve causally and depthwise with another kernel for every token, and a carried tail."""

import torch
from torch import Tensor

from lmsleep.ops.align import right_align


def dynamic_conv(
    x: Tensor, kernels: Tensor, tail: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Convolve each channel over the current and the `W - 1` previous tokens, by the current token's kernel.

    Args:
        x: inputs `[B, T, C]`.
        kernels: `[B, T, C, W]`; `kernels[..., -1]` multiplies the current token.
        tail: the inputs just before `x`, `[B, t, C]` with any `t`; missing ones are zeros.
        valid: `[B, T]` bool: False for padding at the end of a row, which the new tail leaves out.

    Returns:
        Outputs `[B, T, C]` and the new tail: the last `W - 1` inputs (fewer if fewer were seen), so that a
        sequence cut anywhere gives the result of the uncut one.

    Raises:
        ValueError: for shapes that do not fit.

    Source: Gu et al., "Jet-Nemotron", arXiv 2508.15884, section 2.3.
    """
    if kernels.shape[:3] != x.shape or tail.shape[::2] != x.shape[::2]:
        raise ValueError(
            f"kernels must be [B, T, C, W] and tail [B, t, C] for x {tuple(x.shape)}, "
            f"got {tuple(kernels.shape)} and {tuple(tail.shape)}"
        )
    T, W = x.shape[1], kernels.shape[3]
    seen = torch.cat([tail, x], dim=1)
    past = seen.shape[1] - T
    y = x * kernels[..., -1]
    for lag in range(1, min(W, past + T)):
        first = max(lag - past, 0)  # the first token that has an input so long ago
        taps = kernels[:, first:, :, W - 1 - lag] * seen[:, past + first - lag : past + T - lag]
        # Not in place: autograd makes the gradients here.
        y = y + (taps if first == 0 else torch.nn.functional.pad(taps, (0, 0, first, 0)))
    if valid is not None:
        seen = right_align(seen, valid)
    # Counted from the front: with W = 1 a slice from -0 would keep all.
    return y, seen[:, max(past + T - (W - 1), 0) :]
