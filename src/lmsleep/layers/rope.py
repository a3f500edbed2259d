"""Rotary position embedding (Su et al., arXiv 2104.09864)."""

from functools import lru_cache

import torch
from torch import Tensor

from lmsleep.ops import append


def rotate(x: Tensor, first: int, theta: float) -> Tensor:
    """Rotate `x` `[B, T, H, D]` (D even) as positions `first ... first + T - 1`.

    Angles are computed in float32 or better; halves of the head are paired (the NeoX layout).
    """
    cos, sin = _table(first, x.shape[1], x.shape[3], theta, x.dtype, x.device)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rotate_on(x: Tensor, past: Tensor, theta: float) -> Tensor:
    """Do `rotate(x, 0, theta)` for `x` that begins with `past`, without rotating that again and again.

    Token by token and without gradients, `x` remembers how it is rotated, for when it is the past.
    """
    t = past.shape[1]
    if torch.is_grad_enabled() or not t:  # what is read at once need not remember anything
        return rotate(x, 0, theta)
    before: Tensor | None = getattr(past, "rotated", None)
    rotated = rotate(x, 0, theta) if before is None else append(before, rotate(x[:, t:], t, theta))
    x.rotated = rotated  # type: ignore[attr-defined]
    return rotated


def turned_back(x: Tensor, by: Tensor, theta: float) -> Tensor:
    """Turn rotated `x` `[B, t, H, D]` back by `by` `[B, t, H]` positions, as if it stood so much earlier."""
    exact = torch.promote_types(x.dtype, torch.float32)
    angle = by[..., None].to(exact) * _frequency(x.shape[-1], theta, exact, x.device)
    cos, sin = angle.cos(), angle.sin()
    a, b = x.to(exact).chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).to(x.dtype)


@lru_cache(maxsize=64)  # the passes over a window ask for the same few tables again and again
def _table(
    first: int, T: int, D: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines `[T, 1, D / 2]`."""
    # In half precision neighbouring positions beyond a few hundred would have the same angle.
    exact = torch.promote_types(dtype, torch.float32)
    # A table that is made while generating stays in the cache and must serve training later, which refuses
    # tensors of inference mode.
    with torch.inference_mode(False):
        position = torch.arange(first, first + T, device=device, dtype=exact)[:, None]
        angle = position * _frequency(D, theta, exact, device)
        return angle.cos()[:, None].to(dtype), angle.sin()[:, None].to(dtype)


def _frequency(D: int, theta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return by which angle each pair of numbers turns in a position, `[D / 2]`."""
    return theta ** (-torch.arange(0, D, 2, device=device, dtype=dtype) / D)
