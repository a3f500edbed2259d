"""Positions and masks of one call of blocks of `transformers`."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from lmsleep.layers.attention import beside, visible
from lmsleep.state import State

if TYPE_CHECKING:
    from lmsleep.hf.backbone import Layout

Turns = Literal["halves", "pairs"]
"""Which two numbers of a key are turned together: one of each half of those that turn, or neighbours."""
REBASE_AFTER = 1 << 15  # ordinals count from the oldest visible key again when they have grown so large


class Positions:
    """Where the tokens of one call stand, and what each of them sees.

    A row counts its tokens from 1, in the order in which they came; ordinal 0 is padding. Keys are cached
    after rotation, so a key keeps its ordinal, whatever was evicted before it, until it is turned back.

    Args:
        model: the causal language model of `transformers`.
        h: hidden states of the new tokens, `[B, T, d]`.
        state: what came before.
        layouts: what each block carries; all of `start ... stop - 1` that have attention share one count.
        start: the first block of the call.
        stop: the block after the last.

    Attributes:
        ordinals: `[B, t + T]` int64, of the t visible keys and the T new tokens.
        position_ids: `[B, T]` int64, of the new tokens, from 0 as `transformers` counts.
        embeddings: cosines and sines for the new tokens; None for a model without rotary positions.
    """

    def __init__(
        self, model: Any, h: Tensor, state: State, layouts: Sequence["Layout"], start: int, stop: int
    ) -> None:
        self.h, self.state, self.layouts = h, state, layouts
        self.rotary = getattr(model.get_decoder(), "rotary_emb", None)
        # Eager attention adds its mask to the scores, so it takes numbers; sdpa takes booleans.
        self.eager = model.config._attn_implementation == "eager"
        old = self._visible_ordinals(start, stop)
        self.past = old.shape[1]
        self.shift = self._shift(old)
        if self.shift is not None:
            old = old - self.shift
        # Rows stand with their newest token at the right, so the last column holds the count of each row.
        last = old[:, -1:] if self.past else old.new_zeros(len(h), 1)
        new = last + torch.arange(1, h.shape[1] + 1, device=h.device)
        self.ordinals, self.position_ids = torch.cat([old, new], dim=1), new - 1
        self.embeddings = self._embeddings()
        self._masks: dict[int | None, Tensor | None] = {}

    def _visible_ordinals(self, start: int, stop: int) -> Tensor:
        """Return the ordinals `[B, t]` of the visible keys, t = 0 without attention."""
        # Blocks of one call have read the same tokens and evicted the same, so any of them tells.
        first = next((i for i in range(start, stop) if self.layouts[i].kv), None)
        if first is None:
            return self.h.new_zeros(len(self.h), 0, dtype=torch.int64)
        return self.state.cache.layers[first][2]

    def _embeddings(self) -> Any:
        return None if self.rotary is None else self.rotary(self.h, self.position_ids)

    def later(self, by: int) -> Self:
        """Return where the same tokens stand if so many others, which they do not see, came before them."""
        moved = copy.copy(self)
        moved.position_ids = self.position_ids + by
        moved.embeddings = moved._embeddings()
        return moved

    def _shift(self, old: Tensor) -> Tensor | None:
        """Return how far each key must be turned back, `[B, t]` int64, None while it may stand where it is.

        Keys that stay in view stand behind each other, as if nothing had been evicted between them and before
        them: else the angles of a stream without end would outgrow what a model was trained on, and what
        float32 tells apart. Scores of rotary attention depend on differences of positions alone, so as long
        as there is no gap and the count is small, nothing needs to be turned.
        """
        if not self.past or self.rotary is None or old.is_meta:  # on "meta", for costs, nothing has a value
            return None
        if any(x.turns == "otherwise" for x in self.layouts):
            return None
        by = old - (old > 0).cumsum(dim=1)  # of padding, 0, nothing
        # Ordinals only grow, so a row without a gap is behind its places by as much at both ends.
        oldest = by.gather(1, (old == 0).sum(dim=1, keepdim=True).clamp(max=self.past - 1))
        newest = by[:, -1:]
        return by if bool(((newest > REBASE_AFTER) | (newest > oldest)).any()) else None

    def rebased(self, i: int) -> tuple[Tensor, ...]:
        """Return the working memory of block i, its keys turned back by `shift` positions."""
        cache, turns = self.state.cache.layers[i], self.layouts[i].turns
        if self.shift is None or turns is None or turns == "otherwise":
            return cache
        return turned_back(self.rotary, turns, cache[0], self.shift[..., None]), *cache[1:]

    def mask(self, span: int | None) -> Tensor | None:
        """Return what each token sees, `[B, 1, T, t + T]`, or None: all before it.

        None is how `transformers` says it, and lets attention take a fast kernel. sdpa takes booleans; eager
        attention takes what is added to the scores. Masks are made once a call and shared by its blocks.
        """
        if span not in self._masks:
            self._masks[span] = self._mask(span)
        return self._masks[span]

    def mask_beside(self, bias: Tensor, heads: int) -> Tensor:
        """Return what is added to the scores of `heads` heads of queries, beside kept keys with `bias`."""
        return beside(bias, self._seen(None), heads, self.h.dtype)

    def _seen(self, span: int | None) -> Tensor:
        """Return which keys each token sees, bool."""
        filled = self.state.cache.filled if self.past else None
        return visible(self.h.shape[1], self.past, span, filled, self.h.device)

    def _mask(self, span: int | None) -> Tensor | None:
        T, past, filled = self.h.shape[1], self.past, self.state.cache.filled
        # Without a mask `transformers` reads causally if there is no past. One token sees all that is there,
        # unless a row has padding (`filled`).
        all_before = past == 0 or (T == 1 and filled is None)
        if all_before and (span is None or past + T <= span) and (not self.eager or T == 1):
            return None
        seen = self._seen(span).expand(len(self.h), 1, T, past + T)
        if not self.eager:
            return seen
        # The lowest number, not -inf: a row that sees nothing would become NaN.
        return torch.zeros_like(seen, dtype=self.h.dtype).masked_fill(~seen, torch.finfo(self.h.dtype).min)


def turned_back(rotary: Any, turns: Turns, keys: Tensor, by: Tensor) -> Tensor:
    """Turn rotated keys back, as if they stood so many positions earlier.

    Args:
        rotary: the rotary positions of the model.
        turns: which numbers are turned together.
        keys: `[B, t, H, K]`.
        by: int64, `[B, t, H]` or of one position or head for all.
    """
    exact = torch.promote_types(keys.dtype, torch.float32)
    # Cosines and sines by which the model turned may be scaled (YaRN); the angle alone is wanted here.
    angle = by[..., None].to(exact) * rotary.inv_freq.to(keys.device, exact)
    cos, sin = angle.cos(), angle.sin()
    # Partial rotary positions: only the first so many numbers of a key are turned.
    size = 2 * cos.shape[-1]
    turned, plain = keys.split([size, keys.shape[-1] - size], dim=-1)
    shape, two = ((2, -1), -2) if turns == "halves" else ((-1, 2), -1)
    a, b = turned.unflatten(-1, shape).unbind(two)
    turned = torch.stack([a * cos + b * sin, b * cos - a * sin], dim=two).flatten(-2)
    return torch.cat([turned.to(keys.dtype), plain], dim=-1)
