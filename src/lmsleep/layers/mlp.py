"""SwiGLU feed-forward layer (Shazeer, arXiv 2002.05202), whose matrices a sequence may train for itself."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """`W_down (silu(W_gate x) * W_up x)`.

    With `trained=True` every sequence adds its own `S` to the three matrices, each times a learned scale: the
    weights of test-time training (TTT-E2E, arXiv 2512.23675). A step of rate r on `S` then moves a matrix
    at rate `r scale^2`.
    """

    def __init__(self, d_model: int, hidden: int, *, trained: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, hidden, bias=False)
        self.up_proj = nn.Linear(d_model, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, d_model, bias=False)
        self.scale = nn.Parameter(torch.ones(3)) if trained else None

    @property
    def memory_shape(self) -> tuple[int, int, int]:
        """The shape of `S` for one sequence: gate, up and (transposed) down."""
        return 3, *self.gate_proj.weight.shape

    def forward(self, x: Tensor, S: Tensor | None = None) -> Tensor:
        """Map `x` `[B, T, d]` to the same shape, with `S` `[B, 3, hidden, d]` added to the weights."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if S is None or self.scale is None:
            return self.down_proj(F.silu(gate) * up)
        # The three are kept in one tensor, so `down` lies transposed, as `[hidden, d]`.
        own_gate, own_up, own_down = (S.to(x.dtype) * self.scale[:, None, None].to(x.dtype)).unbind(1)
        h = F.silu(gate + x @ own_gate.mT) * (up + x @ own_up.mT)
        return self.down_proj(h) + h @ own_down
