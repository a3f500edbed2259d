"""Align rows of different length at their ends."""

import torch
from torch import Tensor


def right_align(x: Tensor, valid: Tensor) -> Tensor:
    """Move the padding of every row from its end to its beginning, as zeros.

    Args:
        x: `[B, t, ...]`, whose newest `T <= t` positions are described by `valid`.
        valid: `[B, T]` bool, False for the padding at the end of a row.

    Returns:
        `[B, t, ...]`: each row's last valid position is the last one.
    """
    padding = (~valid).sum(dim=1)
    # Position i of the result comes from i - padding. Negative ones have no source: any index will do, since
    # they are zeroed afterwards.
    source = torch.arange(x.shape[1], device=x.device) - padding[:, None]
    index = source.clamp(min=0).view(*source.shape, *[1] * (x.ndim - 2)).expand_as(x)
    gone = (source < 0).view(*source.shape, *[1] * (x.ndim - 2))
    return x.gather(1, index).masked_fill(gone, 0)
