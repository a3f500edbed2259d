"""Compute the delta rule with a decay per channel: `S = (I - beta k k^T) Diag(e^g) S + beta k v^T`.

Source: Kimi Team, "Kimi Linear", arXiv 2510.26692, section 3 (Kimi Delta Attention).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmsleep.ops.rules import channel_decay
from lmsleep.ops.rules.rule import NOTHING_LEFT, Rule, Sizes, log_spaced_forgetting, write_strength


def by_token(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Follow the definition: `g` `[B, T, H, K]` fades each row of `S` by itself; then the delta rule."""
    S, outputs = state, []
    for t in range(q.shape[1]):
        S = g[:, t, :, :, None].exp() * S
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, scale * q[:, t]))
    return (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v)), S


def by_chunk(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Do what `by_token` does, chunk-parallel, by a triangular system as in `head_decay`."""
    B, T, H, _ = q.shape
    if not q.shape[:3].numel():  # no token, row or head
        return torch.zeros_like(v), state
    q, k, v, g, beta = (
        channel_decay.split(x) for x in (scale * q, k, v, g.clamp(min=NOTHING_LEFT), beta[..., None])
    )
    decays = channel_decay.Decays.of(g)
    erased = beta * k
    system = channel_decay.products(erased, k, decays)
    # Both right-hand sides at once: what is written if S = 0, and how S changes that. The diagonal of the
    # system counts as 1 and is not read.
    asked = torch.cat([beta * v, erased * decays.start], -1)
    solved = torch.linalg.solve_triangular(system, asked, upper=False, unitriangular=True)
    values, reads = solved.split((v.shape[-1], k.shape[-1]), -1)
    starts, us = channel_decay.states(
        state.flatten(0, 1), decays, k, lambda c, S: torch.baddbmm(values[c], reads[c], S, alpha=-1)
    )
    o = channel_decay.products(q, k, decays) @ torch.stack(us) + (q * decays.start) @ starts[:-1]
    return channel_decay.join(o, B, T), starts[-1].unflatten(0, (B, H))


def by_kernel(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Do what `by_token` does, by `fla.ops.kda.chunk_kda`."""
    # Here and not above: fla needs Triton just to be imported.
    from fla.ops.kda import chunk_kda

    o, final = chunk_kda(q, k, v, g, beta, scale=scale, initial_state=state, output_final_state=True)
    return o, final


class ChannelGates:
    """The gates of Kimi Linear: a decay for every channel of the keys, through K hidden units; beta per head.

    `g = -exp(A_log) softplus(W_b W_a x + dt_bias)`, `beta = beta_scale sigmoid(W x)`. In every head channels
    forget between `forget[0]` and `forget[1]` a token at first (log-spaced).
    """

    def build(self, layer: Any, d_model: int) -> None:
        """Add `f_a_proj`, `f_b_proj`, `b_proj`, `A_log` `[H]` and `dt_bias` `[H K]`."""
        H, K = layer.num_heads, layer.key_dim
        layer.f_a_proj = nn.Linear(d_model, K, bias=False)  # forgetting
        layer.f_b_proj = nn.Linear(K, H * K, bias=False)
        layer.b_proj = nn.Linear(d_model, H, bias=True)  # writing
        layer.A_log = nn.Parameter(torch.empty(H))
        layer.dt_bias = nn.Parameter(torch.empty(H * K))

    def reset(self, layer: Any) -> None:
        """Set gates that do not depend on the input yet."""
        # One factor of the decay is zero, not both: then neither would get a gradient.
        nn.init.normal_(layer.f_a_proj.weight, std=layer.f_a_proj.in_features**-0.5)
        layer.f_b_proj.weight.zero_()
        layer.b_proj.weight.zero_()
        layer.b_proj.bias.fill_(1.0)
        log_spaced_forgetting(layer.A_log, layer.dt_bias.view(layer.num_heads, -1), layer.forget)

    def __call__(self, layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute `g` `[B, T, H, K]` and `beta` `[B, T, H]`."""
        # From the projections on in the dtype of the parameters: a low one would round decays near 0, which
        # add up over a stream.
        dt = F.softplus(layer.f_b_proj(layer.f_a_proj(x)).to(layer.dt_bias.dtype) + layer.dt_bias)
        g = -layer.A_log.exp()[:, None] * dt.unflatten(-1, (layer.num_heads, -1))
        return g, write_strength(layer, x)


def _sizes(K: int, V: int) -> Sizes:
    return Sizes((K,), (), (K, V))


RULE = Rule(by_token, by_chunk, by_kernel, ChannelGates(), _sizes)
