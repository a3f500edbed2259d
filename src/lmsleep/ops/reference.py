"""The recurrences, token by token: the definitions that every fast path is held to.

Shapes: q, k `[B, T, H, K]`, v `[B, T, H, V]`, g (log decay, <= 0) and beta `[B, T, H]`, state
`[B, H, K, V]`. The state is the transpose of the paper's `S` (fla's layout), so the paper's
`S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T` reads
`S = exp(g) (I - beta k k^T) S + beta k v^T` here. All dtypes, no hidden casts.
"""

import torch
from torch import Tensor


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Gated delta rule (Yang et al., arXiv 2412.06464, eq. 10)."""
    S, outputs = state, []
    for t in range(q.shape[1]):
        S = g[:, t, :, None, None].exp() * S
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, scale * q[:, t]))
    return (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v)), S


def gated_linear_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Gated Hebbian rule, the Mamba-2 form: `S = exp(g) S + beta k v^T` (the paper's eq. 3)."""
    S, outputs = state, []
    for t in range(q.shape[1]):
        S = g[:, t, :, None, None].exp() * S
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * v[:, t])
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, scale * q[:, t]))
    return (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v)), S


def dynamic_conv(x: Tensor, kernels: Tensor, tail: Tensor) -> Tensor:
    """Causal convolution of `x` `[B, T, C]` after `tail` `[B, t, C]`, with a kernel `[C, W]` a token."""
    B, T, C, W = kernels.shape
    seen = torch.cat([x.new_zeros(B, W - 1, C), tail, x], dim=1)
    first = seen.shape[1] - T - (W - 1)
    outputs = [
        torch.einsum("bwc,bcw->bc", seen[:, first + t : first + t + W], kernels[:, t]) for t in range(T)
    ]
    return torch.stack(outputs, dim=1) if outputs else x
