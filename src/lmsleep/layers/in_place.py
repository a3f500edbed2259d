"""What the fast weights of In-Place TTT are to say (arXiv 2604.06169): the tokens that come next."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TAPS = 5  # of the convolution: two tokens before, the token itself, and the two after it


class Lesson(NamedTuple):
    """What the tokens that are read are to teach a layer.

    Attributes:
        embedded: `[B, T, d]`, their embeddings.
        rate: eta of the paper.
    """

    embedded: Tensor
    rate: float


class NextTokens(nn.Module):
    """`V = conv(X) W` of token embeddings `X`: a depthwise convolution that looks ahead, and a projection.

    It begins as the embedding of the next token: one tap is 1, the others are 0, and `W` is the identity.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.conv = nn.Parameter(torch.empty(d_model, TAPS))
        self.target_proj = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Begin with the embedding of the next token."""
        self.conv.zero_()
        self.conv[:, TAPS // 2 + 1] = 1.0
        nn.init.eye_(self.target_proj.weight)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Map embeddings `[B, T, d]` to targets `[B, T, d]`; beyond the T tokens there is nothing, zeros.

        Padding, False in `valid` `[B, T]`, has the target zero and is no part of others.
        """
        real = None if valid is None else valid[..., None].to(x.dtype)
        x = x if real is None else x * real
        seen = F.conv1d(x.mT, self.conv.to(x.dtype)[:, None], padding=TAPS // 2, groups=x.shape[-1]).mT
        targets: Tensor = self.target_proj(seen)
        return targets if real is None else targets * real
