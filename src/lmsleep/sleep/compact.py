"""Fewer keys and values instead of none: what attention read of a window, compacted."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lmsleep.ops.matching import Method, few
from lmsleep.sleep.backbone import Backbone, Compactable
from lmsleep.sleep.eviction import Eviction
from lmsleep.state import Cache, State

MOST_QUERIES = 2048  # that a head is matched for: of more, so many at equal distances
KEYS = 64  # of a head, where nothing is said


@dataclass(frozen=True)
class Compact(Eviction):
    """So many keys and values of all windows stay, in every head of every attention block (64 by default).

    At its end a window is read once more, with itself in view, as if the text went on with it: what its
    tokens ask then is what is matched (attention matching, arXiv 2602.16284, by `lmsleep.ops.matching`). What
    was kept of windows before is compacted anew along with it, so the memory stays as large as it is; a key
    that once had much attention stays, though later windows ask for others. Nothing is trained, and no
    gradient goes through. Any consolidator may write fast weights beside it.
    """

    keys: int | None = None
    """How many keys a head keeps, of all that it ever read; fewer before it has read as many. Without `keys`
    and `bytes`: 64."""
    method: Method = "attention"
    """Which keys: those with the most attention, biases and values fitted (attention), or as they are
    (attended); those of smallest norm (norm); any (random)."""
    bytes: int | None = None
    """Instead of `keys`: how many bytes those of a row may take in all blocks together."""
    reach: int = 4096
    """How many tokens before the window a key may stand, at least a window; what is older stands there too.
    Not more than the model was trained to look back."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reach < 1:
            raise ValueError(
                f"reach={self.reach} of Compact must be at least 1: so many tokens before the window a key "
                "may stand"
            )
        for name in ("keys", "bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} of Compact keeps nothing: give at least 1, or evict hard")
        if self.keys is not None and self.bytes is not None:
            raise ValueError(
                f"keys={self.keys} and bytes={self.bytes} of Compact say the same in two ways: give one of "
                "them, and None for the other if it was given before"
            )
        if self.keys is None and self.bytes is None:
            object.__setattr__(self, "keys", KEYS)

    def check(self, model: Backbone) -> None:
        """Refuse a model without attention, or whose attention cannot read what is kept.

        Raises:
            ValueError: with the reason; also if `bytes` are too few for a key.
        """
        self._budget(model)

    def keep(self, cache: Cache, L: int) -> Cache:
        """Refuse: the queries of a model are needed (`keep_by`).

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "Compact keeps what a model attends to: evict by lmsleep.sleep.evict, with the model"
        )

    @torch.no_grad()
    def keep_by(self, model: Backbone, tokens: Tensor, state: State, L: int) -> Cache:
        """Return the working memory without a window, and the keys that are kept of all windows."""
        budget, reach = self._budget(model), max(self.reach, L)
        if not tokens.shape[1]:  # a row that ended before
            return state.cache
        state, model = state.detach(), _served(model)
        before, n = state.cache.kept or no_keys(model, state.cache), state.cache.length
        # How far back keys will stand by the next window. Those that reach no further are read where they
        # will stand then, so that this is what is matched.
        stand = [(x[3] + n).clamp(max=reach) if x else None for x in before]
        near = tuple(
            (model.turned_back(i, x[0], age - n - x[3]), *x[1:]) if age is not None else ()
            for i, (x, age) in enumerate(zip(before, stand, strict=True))
        )
        begin = State(state.memory, replace(state.cache, kept=near))
        h, after = model.embed(tokens), list[tuple[Tensor, ...]]()
        for i, (x, age) in enumerate(zip(before, stand, strict=True)):
            with Listening() as heard:
                h, _ = model.run(h, begin, i, i + 1)
            if age is None:
                after.append(())
                continue
            seen = _Seen.of(heard.calls, i, near[i], tokens.shape[1])
            worth = F.pad(x[4].mT, (0, n)).to(seen.bias.dtype)
            found = few(seen.queries, seen.keys, seen.values, seen.bias, budget, self.method, worth)
            # Taken from where keys were, not from where they were read: turned back and forth, half precision
            # would wear them out.
            keys = torch.cat([x[0].transpose(1, 2), seen.keys[:, :, x[0].shape[1] :].to(x[0].dtype)], dim=2)
            newest = torch.arange(n, 0, -1, dtype=age.dtype, device=age.device)
            ages = torch.cat([age.mT, newest.expand(*keys.shape[:2], n)], dim=2)
            by = torch.cat([(age - x[3]).mT, torch.full_like(ages[:, :, -n:], n)], dim=2)
            keys, ages, by = (_taken(t, found.chosen) for t in (keys, ages, by))
            values = found.values.to(x[1].dtype).transpose(1, 2).contiguous()
            bias, worth = (t.mT.float().contiguous() for t in (found.bias, found.worth))
            after.append((model.turned_back(i, keys, by), values, bias, ages, worth))
        return replace(state.cache.last(0), kept=tuple(after))

    def kept_bytes(self, model: Backbone, cache: Cache, L: int) -> int:
        """Return how many bytes the keys of a row take in all blocks."""
        return self._budget(model) * _bytes_of_a_key(_served(model))

    def _budget(self, model: Backbone) -> int:
        """Return how many keys a head keeps; raise ValueError as `check`."""
        model = _served(model)
        if self.bytes is None:
            assert self.keys is not None
            return self.keys
        each = _bytes_of_a_key(model)
        if self.bytes < each:
            raise ValueError(
                f"bytes={self.bytes:,} keeps no key: one key a head takes {each:,} bytes in all blocks"
            )
        return self.bytes // each


class Listening(TorchFunctionMode):
    """Hears what is asked of attention: arguments of its calls, in the thread that enters it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[Tensor, ...], float]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value")
            q, k, v = (*args[:3], *(kwargs[name] for name in names[len(args) :]))
            scale = kwargs.get("scale")
            self.calls.append(((q, k, v), q.shape[-1] ** -0.5 if scale is None else scale))
        return func(*args, **kwargs)


class _Seen(NamedTuple):
    """What the tokens of a window ask of a block, and what they see: attention is a softmax over it.

    Attributes:
        queries: `[B, H, n, K]`, scaled, of all heads that share keys.
        keys: `[B, H, k + t, K]`: those kept before, then those of the window.
        values: `[B, H, k + t, V]`.
        bias: `[B, H, k + t]`.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    bias: Tensor

    @classmethod
    def of(
        cls, calls: Sequence[tuple[tuple[Tensor, ...], float]], i: int, kept: tuple[Tensor, ...], n: int
    ) -> "_Seen":
        """Read what block i, with `kept` in view, was heard to ask for n tokens.

        Raises:
            ValueError: if its attention is not one softmax over the keys that it caches.
        """
        B, _, H, K = kept[0].shape
        V = kept[1].shape[3]
        if len(calls) != 1 or (calls[0][0][1].shape[3], calls[0][0][2].shape[3]) != (K, V):
            raise ValueError(f"eviction=Compact: block {i} attends to other keys than those that it caches")
        (q, k, v), scale = calls[0]
        exact = torch.promote_types(q.dtype, torch.float32)
        # Several heads of queries share one of keys, which some attention repeats for each of them.
        keys, values = (t.unflatten(1, (H, -1))[:, :, 0, : t.shape[2] - n].to(exact) for t in (k, v))
        queries = q.reshape(B, H, -1, K).to(exact) * scale
        queries = queries[:, :, :: -(-queries.shape[2] // MOST_QUERIES)]
        bias = F.pad(kept[2].mT.to(exact), (0, keys.shape[2] - kept[2].shape[1]))
        return cls(queries, keys, values, bias)


def _served(model: Backbone) -> Compactable:
    """Return the model.

    Raises:
        ValueError: if it is none that Compact can serve, with the reason.
    """
    reason = f"{type(model).__name__} cannot read keys that were kept; choose hard or sliding"
    if isinstance(model, Compactable):
        try:
            if any(model.kept_sizes()):
                return model
            reason = "the model has no attention, so there are no keys to keep; choose hard"
        except ValueError as error:
            reason = str(error)
    raise ValueError(f"eviction=Compact: {reason}")


def _bytes_of_a_key(model: Compactable) -> int:
    """Return what one key a head takes in all blocks of a row, with its value and what stands beside it."""
    none = no_keys(model, model.initial_state(1).cache)
    return sum(t.element_size() * math.prod(t.shape[2:]) for kept in none for t in kept)


def no_keys(model: Backbone, cache: Cache) -> tuple[tuple[Tensor, ...], ...]:
    """Return what is kept before the first window, for the rows of `cache`: no keys.

    Raises:
        ValueError: for a model that Compact cannot serve.
    """
    kept = list[tuple[Tensor, ...]]()
    for size, layer in zip(_served(model).kept_sizes(), cache.layers, strict=True):
        if size is None:
            kept.append(())
            continue
        heads, K, V = size
        empty = (layer[0].new_empty(len(layer[0]), 0, heads, size) for size in (K, V))
        beside = (
            torch.empty(len(layer[0]), 0, heads, dtype=dtype, device=layer[0].device)
            for dtype in (torch.float32, torch.int32, torch.float32)
        )
        kept.append((*empty, *beside))
    return tuple(kept)


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """Return the elements `index` `[B, H, t]` of `x` `[B, H, T, ...]`, time first: `[B, t, H, ...]`."""
    wide = index.view(*index.shape, *[1] * (x.ndim - 3)).expand(*index.shape, *x.shape[3:])
    return x.gather(2, wide).transpose(1, 2).contiguous()
