"""Write to chosen slots: a token fades and overwrites some slots of the memory, and leaves the others alone.

`S` is a table of M slots, each a key and a value: `S = [K | V]`, `M x (K + V)`. A token writes its key and
value into slot m with the strength `beta[m]` where the slot has faded by `e^g[m]`, and reads by attention:

    S = Diag(e^g) S + beta [k, v]^T,    o = V^T softmax(scale K q)

(gated slot attention, Zhang et al., arXiv 2409.07146). Raven has a router choose: `g` is zero but for the
slots with the highest scores, and `beta = 1 - e^g`.

Source: Afzal, Bick et al., "Raven: High-Recall Sequence Modeling with Sparse Memory Routing", 2026; the
equations are those of its code (goombalab/raven at afc329f).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmsleep.ops.rules import channel_decay
from lmsleep.ops.rules.rule import NOTHING_LEFT, Rule, Sizes, log_spaced_forgetting


def by_token(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Follow the definition; `g` and `beta` are `[B, T, H, M]`, the state `[B, H, M, K + V]`. Any dtype."""
    S, outputs, sizes = state, [], (k.shape[-1], v.shape[-1])
    for t in range(q.shape[1]):
        slot = torch.cat([k[:, t], v[:, t]], dim=-1)
        S = g[:, t, :, :, None].exp() * S + beta[:, t, :, :, None] * slot[:, :, None]
        keys, values = S.split(sizes, dim=-1)
        p = torch.einsum("bhmk,bhk->bhm", keys, scale * q[:, t]).softmax(-1)
        outputs.append(torch.einsum("bhmv,bhm->bhv", values, p))
    return (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v)), S


def by_chunk(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Do what `by_token` does, chunk-parallel: the states, then all scores, then what is read."""
    B, T, H, _ = q.shape
    if not q.shape[:3].numel():  # no token, row or head
        return torch.zeros_like(v), state
    q, k, v, g, beta = (channel_decay.split(x) for x in (scale * q, k, v, g.clamp(min=NOTHING_LEFT), beta))
    decays = channel_decay.Decays.of(g)
    slots = torch.cat([k, v], -1)
    # What is written does not depend on S, so the states come without any system to solve.
    starts, _ = channel_decay.states(state.flatten(0, 1), decays, beta, lambda c, S: slots[c])
    keys, values = starts[:-1].split((k.shape[-1], v.shape[-1]), -1)
    scores = decays.start * (q @ keys.mT) + channel_decay.sums(q @ k.mT, beta, decays)
    p = scores.softmax(-1)
    o = (p * decays.start) @ values + channel_decay.products(p, beta, decays) @ v
    return channel_decay.join(o, B, T), starts[-1].unflatten(0, (B, H))


def by_kernel(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Do what `by_token` does, by `fla.ops.gsa.chunk_gsa`, keys transposed and gates in the dtype of q."""
    # Here and not above: fla needs Triton just to be imported.
    from fla.ops.gsa import chunk_gsa

    keys, values = state.split((k.shape[-1], v.shape[-1]), dim=-1)
    o, (keys, values) = chunk_gsa(
        q,
        k,
        v,
        beta.to(q.dtype),
        g.to(q.dtype),
        scale=scale,
        initial_state=(keys.mT.contiguous(), values.contiguous()),
        output_final_state=True,
    )
    return o, torch.cat([keys.mT, values], dim=-1)


def num_slots(K: int, V: int) -> int:
    """Count the slots of a head: as many as make `S` no larger than the `K x V` of other rules."""
    return max(1, K * V // (K + V))


class RouterGates:
    """Those of Raven: a token spreads one decay over the half of the slots that its router scores highest.

    With `f = -exp(A_log) softplus(W_a x + dt_bias)` per head, scores `sigmoid(W_r x)` and the shares r of the
    chosen slots (their scores, divided by their sum): `g = r f`, `beta = 1 - e^g`. Heads begin with an f
    from `forget[0]` to `forget[1]` (log-spaced): nothing is written but where something is forgotten, so
    small ones write little. Of Raven's variants this is the default one but for the noise on the scores in
    training, by which the passes of a sleep, and their recomputation, would differ for no other reason.
    """

    def build(self, layer: Any, d_model: int) -> None:
        """Add `a_proj`, `r_proj`, `A_log` and `dt_bias`."""
        H = layer.num_heads
        layer.a_proj = nn.Linear(d_model, H, bias=False)  # forgetting, and so writing
        layer.r_proj = nn.Linear(d_model, H * num_slots(layer.key_dim, layer.value_dim), bias=False)  # where
        layer.A_log = nn.Parameter(torch.empty(H))
        layer.dt_bias = nn.Parameter(torch.empty(H))

    def reset(self, layer: Any) -> None:
        """Set a router that depends on the input from the beginning; how much is written does not yet."""
        layer.a_proj.weight.zero_()
        nn.init.normal_(layer.r_proj.weight, std=layer.r_proj.in_features**-0.5)
        log_spaced_forgetting(layer.A_log, layer.dt_bias, layer.forget)

    def __call__(self, layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute `g` and `beta` `[B, T, H, M]`, zero in slots that are not chosen."""
        f = -layer.A_log.exp() * F.softplus(layer.a_proj(x).to(layer.dt_bias.dtype) + layer.dt_bias)
        scores = layer.r_proj(x).to(f.dtype).sigmoid().unflatten(-1, (layer.num_heads, -1))
        # Half of the slots, rounded up, so that a table of one slot is written to.
        chosen = scores.topk(-(-scores.shape[-1] // 2), dim=-1)
        shares = chosen.values / chosen.values.sum(-1, keepdim=True)
        g = torch.zeros_like(scores).scatter(-1, chosen.indices, f[..., None] * shares)
        return g, -torch.expm1(g)  # 1 - e^g, without losing the digits of a small g


def _sizes(K: int, V: int) -> Sizes:
    M = num_slots(K, V)
    return Sizes((M,), (M,), (M, K + V))


def _scale(K: int) -> float:
    """Raven norms queries and keys to a length of sqrt(K) and does not scale their product."""
    return float(K)


RULE = Rule(by_token, by_chunk, by_kernel, RouterGates(), _sizes, _scale)
