"""Chunk-parallel forms of the recurrences in plain PyTorch (CPU and any GPU).

Within a chunk of C tokens with cumulative log decay `G_t = g_1 + ... + g_t` and the state `S` that
precedes it, both rules leave `S_t = e^{G_t} S + sum_{s<=t} e^{G_t - G_s} k_s u_s^T`, where `u` are
the values that are really written: `u = beta v` for the linear rule, and for the delta rule the
solution of the unit lower triangular system

    u_t + beta_t sum_{s<t} e^{G_t - G_s} (k_t . k_s) u_s = beta_t (v_t - e^{G_t} S^T k_t)

(the WY form of arXiv 2406.06484, gated as in arXiv 2412.06464). Outputs and the next state are
then matrix products. The systems of all chunks are inverted in one batch; only `S` runs from chunk
to chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # tokens; longer chunks pay more for the C x C systems than they save in steps


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Chunk-parallel `reference.gated_delta_rule`; same arguments, same result."""
    return _chunked(q, k, v, g, beta, scale, state, delta=True)


def gated_linear_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Chunk-parallel `reference.gated_linear_rule`; same arguments, same result."""
    return _chunked(q, k, v, g, beta, scale, state, delta=False)


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    state: Tensor,
    *,
    delta: bool,
) -> tuple[Tensor, Tensor]:
    T, dtype = q.shape[1], state.dtype
    if T == 0:
        return torch.zeros_like(v), state
    C = min(T, CHUNK)
    q, k, v = (_split(x.to(dtype), C) for x in (scale * q, k, v))
    g, beta = (_split(x[..., None], C) for x in (g, beta.to(dtype)))
    # Differences of a long cumulative sum cancel badly in float32 when the gates forget hard.
    G = g.double().cumsum(-2)
    later = torch.ones(C, C, dtype=torch.bool, device=q.device).triu(1)
    between = (G - G.mT).to(dtype).masked_fill(later, -torch.inf).exp()  # e^{G_t - G_s}, s <= t
    since_start = G.to(dtype).exp()
    until_end = (G[..., -1:, :] - G).to(dtype).exp()
    read = (q @ k.mT) * between
    u = beta * v
    if delta:
        A = (beta * (k @ k.mT) * between).tril(-1)
        eye = torch.eye(C, dtype=dtype, device=q.device)
        inverse = torch.linalg.solve_triangular(A + eye, eye, upper=False, unitriangular=True)
        u, w = inverse @ u, inverse @ (beta * since_start * k)
    q, k = q * since_start, (k * until_end).mT
    outputs = []
    for c in range(q.shape[0]):
        written = u[c] - w[c] @ state if delta else u[c]
        outputs.append(q[c] @ state + read[c] @ written)
        state = since_start[c, ..., -1:, :] * state + k[c] @ written
    o = torch.stack(outputs, dim=2)  # [B, H, n, C, V]
    return o.flatten(2, 3)[:, :, :T].transpose(1, 2), state


def _split(x: Tensor, C: int) -> Tensor:
    """`[B, T, H, d]` -> `[n, B, H, C, d]`; a ragged tail is zero-filled: g = beta = 0 writes nothing."""
    x = F.pad(x.transpose(1, 2), (0, 0, 0, -x.shape[1] % C))
    return x.unflatten(2, (-1, C)).permute(2, 0, 1, 3, 4)
