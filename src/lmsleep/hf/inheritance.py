"""What a memory layer takes over from an attention: its heads, its norm, its projections."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lmsleep.layers import Heads, MemoryLayer, Recall

# What families call the parts of an attention, by the parts of a `Recall`.
NAMES = {"q_proj": ("q_proj",), "k_proj": ("k_proj",), "v_proj": ("v_proj",),
         "o_proj": ("o_proj", "out_proj", "dense")}  # fmt: skip


def heads_of(config: Any, blocks: Iterable[Any]) -> Heads:
    """Return the heads of a model's attention, with biases where its projections have them."""
    queries: int = config.num_attention_heads
    kv: int = getattr(config, "num_key_value_heads", None) or queries
    size: int = getattr(config, "head_dim", None) or config.hidden_size // queries
    found = _projections(next(iter(blocks)))
    biased = {name: found is not None and found[name].bias is not None for name in ("q_proj", "o_proj")}
    return Heads(kv, queries // kv, size, biased["q_proj"], biased["o_proj"])


@torch.no_grad()
def inherit(layer: MemoryLayer, block: Any) -> None:
    """Let a `Recall` begin as the attention of `block`; its gates and convolution stay what they are.

    Where an attention has no maps of their own to queries, keys, values and output (fused ones), or other
    sizes, the layer keeps its random projections. A norm of queries and keys of each head is a scale per
    channel to what has unit norm, and becomes a part of the projections.
    """
    mixer, own = layer.mixer, _projections(block)
    if not isinstance(mixer, Recall) or own is None:
        return
    if any(getattr(mixer, name).weight.shape != own[name].weight.shape for name in NAMES):
        return
    for name in NAMES:
        projection = getattr(mixer, name)
        projection.weight.copy_(own[name].weight)
        if projection.bias is not None and own[name].bias is not None:
            projection.bias.copy_(own[name].bias)
    attention = _attention(block)
    for name in ("q", "k"):
        projection = getattr(mixer, f"{name}_proj")
        scale = _scale(getattr(attention, f"{name}_norm", None), mixer.key_dim, projection.weight)
        if scale is not None:
            scale = scale.repeat(projection.out_features // mixer.key_dim)
            projection.weight.mul_(scale[:, None])
            if projection.bias is not None:
                projection.bias.mul_(scale)
    weight = layer.norm.weight
    if (scale := _scale(getattr(block, "input_layernorm", None), weight.numel(), weight)) is not None:
        weight.copy_(scale)


def _attention(block: Any) -> Any:
    return getattr(block, "self_attn", None) or getattr(block, "attn", None)


def _projections(block: Any) -> dict[str, Any] | None:
    """Return the four maps of a block's attention; None where it has not all of them."""
    attention = _attention(block)
    found = {
        name: next((m for n in names if isinstance(m := getattr(attention, n, None), nn.Linear)), None)
        for name, names in NAMES.items()
    }
    return None if any(m is None for m in found.values()) else found


def _scale(norm: Any, size: int, like: Tensor) -> Tensor | None:
    """Return the factor per channel `[size]` of an RMS norm, as whatever form a family writes it (w, 1 + w).

    None for a norm of another kind or size, or what is none.
    """
    if not isinstance(norm, nn.Module):
        return None
    # Equal numbers have themselves as RMS, so what comes out is the factor (a power of two this large leaves
    # no trace of eps); a norm that subtracts the mean gives zeros.
    try:
        scale: Tensor = norm(torch.full((1, 1, size), 1024.0, dtype=like.dtype, device=like.device))[0, 0]
    except RuntimeError:
        return None
    return scale if bool(scale.is_meta) or bool(scale.any()) else None
