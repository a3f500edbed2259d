"""SwiGLU feed-forward layer (Shazeer, arXiv 2002.05202), whose matrices a sequence may train for itself."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmsleep.layers.in_place import Lesson, NextTokens


class SwiGLU(nn.Module):
    """`W_down (silu(W_gate x) * W_up x)`.

    With `own="all"` every sequence adds its own `S` to the three matrices, each times a learned scale: the
    weights of test-time training (TTT-E2E, arXiv 2512.23675). A step of rate r on `S` then moves a matrix
    at rate `r scale^2`. With `own="down"` it adds its own `S` to the last matrix alone, which is written by
    `learn`: the fast weights of In-Place TTT (arXiv 2604.06169).
    """

    def __init__(self, d_model: int, hidden: int, *, own: Literal["all", "down"] | None = None) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, hidden, bias=False)
        self.up_proj = nn.Linear(d_model, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, d_model, bias=False)
        self.scale = nn.Parameter(torch.ones(3)) if own == "all" else None
        self.target = NextTokens(d_model) if own == "down" else None

    @property
    def memory_shape(self) -> tuple[int, int, int] | None:
        """The shape of `S` for one sequence: gate, up and (transposed) down, or down alone; None for none."""
        if self.scale is None and self.target is None:
            return None
        return 1 if self.scale is None else 3, *self.gate_proj.weight.shape

    def forward(self, x: Tensor, S: Tensor | None = None) -> Tensor:
        """Map `x` `[B, T, d]` to the same shape, with `S` `[B, 1 or 3, hidden, d]` added to the weights."""
        if S is None or self.memory_shape is None:
            return self.down_proj(self._activated(x))
        if self.scale is None:
            return self._down(self._activated(x), S)
        # The three are kept in one tensor, so `down` lies transposed, as `[hidden, d]`.
        own_gate, own_up, own_down = (S.to(x.dtype) * self.scale[:, None, None].to(x.dtype)).unbind(1)
        h = F.silu(self.gate_proj(x) + x @ own_gate.mT) * (self.up_proj(x) + x @ own_up.mT)
        return self.down_proj(h) + h @ own_down

    def learn(self, x: Tensor, S: Tensor, lesson: Lesson, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what `forward` does, and `S + rate Z^T V` `[B, 1, hidden, d]`: what `S` is after the tokens.

        `Z` `[B, T, hidden]` is what enters the last matrix, `V` the targets that the `lesson` gives. Padding,
        False in `valid` `[B, T]`, writes nothing.
        """
        assert self.target is not None
        Z = self._activated(x)
        targets = self.target(lesson.embedded, valid)
        return self._down(Z, S), S + lesson.rate * (Z.mT.to(S.dtype) @ targets.to(S.dtype))[:, None]

    def _activated(self, x: Tensor) -> Tensor:
        return F.silu(self.gate_proj(x)) * self.up_proj(x)

    def _down(self, Z: Tensor, S: Tensor) -> Tensor:
        y: Tensor = self.down_proj(Z)
        return y + Z @ S[:, 0].to(Z.dtype)
