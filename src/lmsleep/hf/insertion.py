"""`insert_memory_layers`: fast weights for models of `transformers` that have only attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lmsleep.hf.cache import RunCache, cache_layers, through_cache
from lmsleep.hf.cache_name import cache_name
from lmsleep.hf.inheritance import heads_of, inherit
from lmsleep.layers import MemoryKind, MemoryLayer

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
FIELD = "memory_layers"  # of the configuration: {"kind": ..., "after": [blocks]}


@dataclass(frozen=True)
class Insertion:
    """A record of what `insert_memory_layers` added.

    Attributes:
        kind: of the layers.
        after: the blocks that they follow.
        parameters: how many they have together.
        share: of the parameters that the model had.
    """

    kind: str
    after: tuple[int, ...]
    parameters: int
    share: float


def insert_memory_layers(
    model: Any,
    n: int = 6,
    kind: MemoryKind = "gated_delta_net",
    where: Literal["even"] | Sequence[int] = "even",
) -> Insertion:
    """Add layers with fast weights to an attention-only model, which then computes what it did before.

    Each is `h + mixer(norm(h))` after a block: a `MemoryLayer`, which says nothing before it is trained, as a
    part of the block (`model.layers.3.memory`). So `save_pretrained`, `peft` and `generate` work as before.
    The configuration describes the layers (field `memory_layers`), and `load_pretrained` makes them again.

    A `Recall` begins as the attention that reads the same hidden states, that of the next block: its norm and
    its projections (`hf.inheritance`).

    Args:
        model: llama, qwen2, qwen3, ouro or another whose blocks have attention only; changed in place.
        n: how many.
        kind: "gated_delta_net" or "kda" (a `Recall` by that rule), or "jet" (a JetBlock, whose weights begin
            random, as the paper adds it to Ouro).
        where: "even" (of JetBlocks the last follows the last block), or the blocks that they are to follow.

    Returns:
        Where they are, and how many parameters they have.

    Raises:
        ValueError: for a model with fast weights, more layers than blocks, blocks that there are not, or an
            unknown kind.
    """
    blocks = _blocks(model)
    config = model.config.get_text_config()
    if not attention_only(config):
        raise ValueError(
            f"model: {config.model_type} has more than attention already, and memory layers are for models "
            "with attention alone; a hybrid is adapted as it is"
        )
    D = len(blocks)
    if where == "even" and not 1 <= n <= D:
        raise ValueError(f"n={n} must lie in 1 ... {D}, the number of blocks")
    if where != "even":
        after = sorted(map(int, where))
    elif kind == "jet":  # the last of each n-th of the blocks
        after = [(j + 1) * D // n - 1 for j in range(n)]
    else:  # its middle: each begins as the attention behind it, and behind the last block there is none
        after = [(2 * j + 1) * D // (2 * n) for j in range(n)]
    # Counted before the layers are there: `share` is of what the model had.
    before = model.num_parameters()
    attach(model, {"kind": kind, "after": after})
    for i in after:
        # The last block has no next one to read what the layer reads; its own attention comes closest.
        inherit(blocks[i].memory, blocks[min(i + 1, D - 1)])
    added = sum(p.numel() for i in after for p in blocks[i].memory.parameters())
    return Insertion(kind, tuple(after), added, added / before)


def check_places(insert: int, after: Sequence[int]) -> None:
    """Refuse a number of layers that is none, or the blocks that they follow where these are not as many.

    Raises:
        ValueError: naming the option.
    """
    if insert < 0:
        raise ValueError(f"insert must not be negative, got {insert}")
    if after and len(after) != insert:
        raise ValueError(
            f"insert_after={tuple(after)} names {len(after)} blocks for insert={insert} layers; "
            "name one for each"
        )


def attention_only(config: Any) -> bool:
    """Say whether a text model has attention blocks alone, which memory layers can be added to."""
    return not (getattr(config, FIELD, None) or set(getattr(config, "layer_types", None) or ()) - ATTENTION)


def attach(model: Any, inserted: dict[str, Any]) -> None:
    """Make the layers that the field `memory_layers` of a configuration describes.

    Raises:
        ValueError: for a description that does not fit the model.
    """
    config, blocks = model.config.get_text_config(), _blocks(model)
    if not isinstance(inserted, dict):
        raise ValueError(f"{FIELD}={inserted!r} must be an object with kind and after")
    kind: Any = inserted.get("kind")
    after, D = inserted.get("after"), len(blocks)
    numbers = isinstance(after, list) and all(type(i) is int for i in after)
    if not after or not numbers or len(set(after)) < len(after) or not set(after) <= set(range(D)):
        raise ValueError(f"{FIELD}: after={after} must name different blocks of 0 ... {D - 1}")
    eps, heads = getattr(config, "rms_norm_eps", 1e-6), heads_of(config, blocks)
    for j, i in enumerate(after):
        # In the place and precision of the block that it follows.
        layer = MemoryLayer(config.hidden_size, kind, eps, heads)
        like = next(blocks[i].parameters())
        blocks[i].memory = layer.to(device=like.device, dtype=like.dtype)
        said = partial(_with_memory, config, config.num_hidden_layers + j)
        blocks[i].register_forward_hook(said, with_kwargs=True)
    setattr(config, FIELD, inserted)


def with_memory(model_class: Any) -> Any:
    """Make a subclass whose instances have the memory layers that their configuration asks for."""

    class WithMemory(model_class):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            attach(self, getattr(config.get_text_config(), FIELD))

    WithMemory.__name__ = model_class.__name__
    return WithMemory


def _blocks(model: Any) -> Any:
    if not hasattr(model, "get_decoder") or not hasattr(model.get_decoder(), "layers"):
        raise ValueError(f"model: {type(model).__name__} is no decoder with a list of blocks")
    return model.get_decoder().layers


def _with_memory(
    config: Any, layer_idx: int, block: Any, args: tuple[Any, ...], options: dict[str, Any], output: Any
) -> Any:
    """Add what a block's memory layer says to what the block says; `layer_idx` is its place in a cache."""
    h, *rest = output if isinstance(output, tuple) else (output,)
    cache, valid = options.get(cache_name()), None
    if not isinstance(cache, RunCache):
        if block.memory.recalls:  # nothing is ever evicted here, and so nothing is to be recalled
            return output
        if cache is not None:
            # A cache of `transformers` has a layer a block; memory layers come behind them, when needed.
            cache.layers.extend(cache_layers(config)[len(cache.layers) :])
        # Of a RunCache padding comes with the cache, where it may be shown at all.
        valid = _valid(options.get("attention_mask"), h.shape[1])
    said = through_cache(block.memory, h, cache, layer_idx, valid)
    h = h if said is None else h + said
    return (h, *rest) if isinstance(output, tuple) else h


def _valid(mask: Tensor | None, T: int) -> Tensor | None:
    """Return a mask `[B, T]`, bool, False for padding: tokens that do not see themselves; None if none is."""
    if mask is None:
        return None
    if mask.ndim == 2:  # as flash kernels take it
        valid = mask[:, -T:].bool()
    else:
        # Booleans for sdpa; numbers to be added for eager attention, where 0 means visible.
        seen = mask[:, 0].diagonal(offset=mask.shape[-1] - T, dim1=-2, dim2=-1)
        valid = seen if seen.dtype == torch.bool else seen == 0
    return None if bool(valid.all()) else valid
