"""Draw the next token from logits."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Says how the next token is drawn."""

    temperature: float = 0.0
    """0: always the likeliest token; 1: as the model says; more: flatter."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities sum to p."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and not negative, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """Draw a token from logits `[V]`; in float64 on the CPU, so that a seed means the same everywhere.

        Raises:
            ValueError: for logits with NaN, which say nothing about the next token.
        """
        logits = logits.cpu()
        likeliest = int(logits.argmax())  # NaN, if there is any: it counts as more than all numbers
        if bool(logits[likeliest].isnan()):
            raise ValueError("logits are NaN, so no token can be drawn from what the open window holds")
        if self.temperature == 0:
            return likeliest
        logits = logits.double()
        # The likeliest at 0: divided by a very small temperature, other numbers overflow to plus infinity.
        logits = logits - logits.max()
        # Stable, so that tokens of equal probability keep their order wherever this runs.
        p, token = (logits / self.temperature).softmax(-1).sort(descending=True, stable=True)
        p, token = p[: self.top_k], token[: self.top_k]
        # The share that likelier tokens take already: 0 for the first, so one token is always left. top_p is
        # a share of what top_k left.
        before = p.cumsum(-1) - p
        p = p.where(before < self.top_p * p.sum(), 0)
        # It takes weights, which need not sum to 1.
        return int(token[torch.multinomial(p, 1, generator=generator)])
