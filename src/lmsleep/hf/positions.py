"""Positions and masks of one call of blocks of `transformers`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmsleep.layers.attention import beside, visible
from lmsleep.state import State

REBASE_AFTER = 1 << 15  # ordinals count from the oldest visible key again when they have grown so large


class Positions:
    """Where the tokens of one call stand, and what each of them sees.

    A row counts its tokens from 1, in the order in which they came; ordinal 0 is padding. Keys are cached
    after rotation, so a key keeps its ordinal, whatever was evicted before it, as long as it is visible.

    Args:
        model: the causal language model of `transformers`.
        h: hidden states of the new tokens, `[B, T, d]`.
        state: what came before.
        attends: which blocks have attention; all of `start ... stop - 1` that do share one count.
        start: the first block of the call.
        stop: the block after the last.

    Attributes:
        ordinals: `[B, t + T]` int64, of the t visible keys and the T new tokens.
        position_ids: `[B, T]` int64, of the new tokens, from 0 as `transformers` counts.
        embeddings: cosines and sines for the new tokens; None for a model without rotary positions.
    """

    def __init__(
        self, model: Any, h: Tensor, state: State, attends: Sequence[bool], start: int, stop: int
    ) -> None:
        self.h, self.state, self.attends = h, state, attends
        self.rotary = getattr(model.get_decoder(), "rotary_emb", None)
        # Eager attention adds its mask to the scores, so it takes numbers; sdpa takes booleans.
        self.eager = model.config._attn_implementation == "eager"
        old = self._visible_ordinals(start, stop)
        self.past = old.shape[1]
        self.shift = self._shift(old)
        if self.shift is not None:
            old = (old - self.shift).clamp(min=0)  # padding, 0, stays padding
        # Rows stand with their newest token at the right, so the last column holds the count of each row.
        last = old[:, -1:] if self.past else old.new_zeros(len(h), 1)
        new = last + torch.arange(1, h.shape[1] + 1, device=h.device)
        self.ordinals, self.position_ids = torch.cat([old, new], dim=1), new - 1
        self.embeddings = None if self.rotary is None else self.rotary(h, self.position_ids)
        self._masks: dict[int | None, Tensor | None] = {}

    def _visible_ordinals(self, start: int, stop: int) -> Tensor:
        """Return the ordinals `[B, t]` of the visible keys, t = 0 without attention."""
        # Blocks of one call have read the same tokens and evicted the same, so any of them tells.
        first = next((i for i in range(start, stop) if self.attends[i]), None)
        if first is None:
            return self.h.new_zeros(len(self.h), 0, dtype=torch.int64)
        return self.state.cache.layers[first][2]

    def _shift(self, old: Tensor) -> Tensor | None:
        """Return how far keys must be turned back, `[B, 1]` int64, None while the count is small enough.

        The angles of a stream without end would outgrow what a model was trained on, and what float32 tells
        apart. Scores of rotary attention depend on differences of positions alone, so all keys of a row may
        be turned back alike.
        """
        if not self.past or self.rotary is None or old.is_meta:  # on "meta", for costs, nothing has a value
            return None
        if not bool((old[:, 0] > REBASE_AFTER).any()):
            return None
        return (old[:, :1] - 1).clamp(min=0)  # a row that begins with padding (0) stays as it is

    def rebased(self, i: int) -> tuple[Tensor, ...]:
        """Return the working memory of block i, its keys turned back by `shift` positions."""
        cache = self.state.cache.layers[i]
        if self.shift is None or self.rotary is None or not self.attends[i]:
            return cache
        return turned_back(self.rotary, cache[0], self.shift[..., None]), *cache[1:]

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


def turned_back(rotary: Any, keys: Tensor, by: Tensor) -> Tensor:
    """Turn rotated keys back, as if they stood so many positions earlier.

    Args:
        rotary: the rotary positions of the model.
        keys: `[B, t, H, K]`.
        by: int64, `[B, t, H]` or of one position and head for all.
    """
    # Cosines and sines have the dtype of what they are asked for with.
    exact = torch.promote_types(keys.dtype, torch.float32)
    angles = rotary(keys.new_empty(0, dtype=exact), by.flatten(1).long())
    cos, sin = (t.unflatten(1, by.shape[1:]) for t in angles)  # [B, t, H, rotary size]
    # Partial rotary positions: only the first so many numbers of a key are turned.
    size = cos.shape[-1]
    turned, plain = keys.split([size, keys.shape[-1] - size], dim=-1)
    # `transformers` turns by x cos + (-b, a) sin, with x = (a, b) in halves; the minus turns back.
    a, b = turned.chunk(2, dim=-1)
    turned = turned * cos - torch.cat([-b, a], dim=-1) * sin
    # YaRN scales cosines and sines; the keys were scaled when they were made, and once is enough.
    turned = turned / getattr(rotary, "attention_scaling", 1.0)
    return torch.cat([turned.to(keys.dtype), plain], dim=-1)
