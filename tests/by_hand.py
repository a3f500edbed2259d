# A transformer written out from its equations, one row and one position after the other, to hold against.
import torch
from torch import Tensor

from lmsleep import HybridLM


def norm(x: Tensor, weight: Tensor | float = 1.0, eps: float = 1e-6) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def turned(x: Tensor, position: int, theta: float = 10_000.0) -> Tensor:
    # Halves of a head are the two coordinates of its planes.
    a, b = x.chunk(2, dim=-1)
    angle = position * theta ** (-torch.arange(0, x.shape[-1], 2, dtype=x.dtype) / x.shape[-1])
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


def attended(layer, x: Tensor) -> Tensor:
    # [T, d] -> [T, d]; every head and query by itself.
    D, out = layer.head_dim, []
    q, k, v = (x @ getattr(layer, f"{name}_proj").weight.mT for name in "qkv")
    for part in torch.arange(q.shape[1]).split(D):
        queries, keys = (torch.stack([turned(y[t, part], t) for t in range(len(x))]) for y in (q, k))
        rows = [(keys[: t + 1] @ queries[t] / D**0.5).softmax(0) @ v[: t + 1, part] for t in range(len(x))]
        out.append(torch.stack(rows))
    return torch.cat(out, dim=-1) @ layer.o_proj.weight.mT


def through(model: HybridLM, h: Tensor, S: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
    # All blocks over one row [T, d]; position t has `S[i][t]` [hidden, d] beside the last matrix of block i.
    # Also returned: what enters these matrices.
    entered = []
    for i, block in enumerate(model.blocks):
        h = h + attended(block.mixer, norm(h, block.norm.weight))
        x = norm(h, block.mlp_norm.weight)
        gate, up = x @ block.mlp.gate_proj.weight.mT, x @ block.mlp.up_proj.weight.mT
        Z = gate / (1 + (-gate).exp()) * up
        h = h + Z @ block.mlp.down_proj.weight.mT
        if S is not None:
            h = h + torch.stack([z @ own for z, own in zip(Z, S[i], strict=True)])
        entered.append(Z)
    return h, entered


def said(model: HybridLM, h: Tensor) -> Tensor:
    return norm(h, model.norm.weight) @ model.lm_head.weight.mT


def surprise(logits: Tensor, tokens: Tensor) -> Tensor:
    # Nats, of each token at its place.
    log_p = logits - logits.exp().sum(-1, keepdim=True).log()
    return -torch.stack([row[token] for row, token in zip(log_p, tokens, strict=True)])


def same_gradients(model: HybridLM, actual: Tensor, expected: Tensor) -> None:
    names, parameters = zip(*model.named_parameters(), strict=True)
    pairs = (torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (actual, expected))
    for name, mine, other in zip(names, *pairs, strict=True):
        assert (mine is None) == (other is None), name
        # Some are zero but for rounding, such as that of a query with one key.
        assert mine is None or torch.allclose(mine, other, rtol=1e-8, atol=1e-10), name
