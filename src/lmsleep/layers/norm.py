"""RMS norm as a layer."""

import torch
from torch import Tensor, nn

from lmsleep import ops


class RMSNorm(nn.Module):
    """`ops.rms_norm` over the last dimension, of size `dim`, with a learned weight that starts at one."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., dim]` -> the same."""
        return ops.rms_norm(x, self.weight, self.eps)
