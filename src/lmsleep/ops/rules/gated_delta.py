"""Compute the gated delta rule `S = e^g (I - beta k k^T) S + beta k v^T`: that of the paper's experiments.

Source: Yang et al., "Gated Delta Networks", arXiv 2412.06464, eq. 10.
"""

import torch
from torch import Tensor

from lmsleep.ops.rules.head_decay import in_chunks
from lmsleep.ops.rules.rule import Rule


def by_token(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Follow the definition: decay, error of what the key finds, write, read. Any dtype, no hidden casts."""
    S, outputs = state, []
    for t in range(q.shape[1]):
        S = g[:, t, :, None, None].exp() * S
        # After the decay: the key finds what has faded already. The read comes last and sees this token too.
        error = v[:, t, :, None] - k[:, t, :, None] @ S  # [B, H, 1, V]
        S = torch.addcmul(S, k[:, t, :, :, None], beta[:, t, :, None, None] * error)
        outputs.append((scale * q[:, t, :, None] @ S)[:, :, 0])
    return (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v)), S


def by_chunk(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Do what `by_token` does, chunk-parallel; same arguments, same result."""
    return in_chunks(q, k, v, g, beta, scale, state, delta=True)


def by_kernel(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Do what `by_token` does, by `fla.ops.gated_delta_rule.chunk_gated_delta_rule`."""
    # Here and not above: fla needs Triton just to be imported.
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    o, final = chunk_gated_delta_rule(
        q, k, v, g, beta, scale=scale, initial_state=state, output_final_state=True
    )
    return o, final


RULE = Rule(by_token, by_chunk, by_kernel)
