"""Next-token loss: what each position must predict, and how badly it did."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def next_tokens(tokens: Tensor, loss_mask: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """`[B, T]`: at each position the token it must predict, -100 for none."""
    if loss_mask is None:
        return None
    wanted = loss_mask.bool() if valid is None else loss_mask.bool() & valid
    return F.pad(tokens.masked_fill(~wanted, -100)[:, 1:], (0, 1), value=-100)


def nll(logits: Tensor, targets: Tensor, reduction: Literal["sum", "none"] = "sum") -> Tensor:
    """Cross entropy in nats of logits `[B, T, V]`, in float32 or better: summed, or `[B T]`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
