"""Rotary position embedding (Su et al., arXiv 2104.09864)."""

import torch
from torch import Tensor


def rotate(x: Tensor, first: int, theta: float) -> Tensor:
    """Rotate `x` `[B, T, H, D]` (D even) as positions `first ... first + T - 1`.

    Angles are computed in float32 or better; halves of the head are paired (the NeoX layout).
    """
    T, D = x.shape[1], x.shape[3]
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequency = theta ** (-torch.arange(0, D, 2, device=x.device, dtype=dtype) / D)
    angle = torch.arange(first, first + T, device=x.device, dtype=dtype)[:, None] * frequency
    cos, sin = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
