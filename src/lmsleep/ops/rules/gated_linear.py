"""Compute the gated Hebbian rule in its Mamba-2 form, `S = e^g S + beta k v^T`: the paper's eq. 3."""

import torch
from torch import Tensor

from lmsleep.ops.rules.head_decay import in_chunks
from lmsleep.ops.rules.rule import Rule


def by_token(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Follow the definition: decay, write, read. Any dtype, no hidden casts."""
    S, outputs = state, []
    for t in range(q.shape[1]):
        S = g[:, t, :, None, None].exp() * S
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * v[:, t])
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, scale * q[:, t]))
    return (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v)), S


def by_chunk(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Do what `by_token` does, chunk-parallel; same arguments, same result."""
    return in_chunks(q, k, v, g, beta, scale, state, delta=False)


def by_kernel(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Do what `by_token` does, by `fla.ops.simple_gla.chunk_simple_gla`."""
    from fla.ops.simple_gla import chunk_simple_gla

    o, final = chunk_simple_gla(
        q,
        k,
        v * beta[..., None].to(v.dtype),  # the kernel has no beta; in the dtype that it works in
        g=g,
        scale=scale,
        initial_state=state,
        output_final_state=True,
    )
    return o, final


RULE = Rule(by_token, by_chunk, by_kernel)
