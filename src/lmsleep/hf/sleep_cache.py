"""The cache of `generate`: instead of keys and values that only grow, streams that sleep."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from lmsleep.session import Session, SessionBatch
from lmsleep.sleep import Backbone, SleepConfig


class SleepCache(Cache):
    """The cache of a sleeping model while it generates: one `Session` a row.

    Each row stands at its own place of its own window, so padding before a prompt moves nothing. A full
    window is slept on as soon as its row goes on, exactly as in a session.

    Args:
        model: what reads.
        sleep: how it sleeps.
        sessions: what the rows have read before, if anything. They are read on: fork what should stay.

    Attributes:
        model: what reads.
        sessions: the rows; none before the first call, unless they were given.
        positions: positions of text that went through this cache, padding included.
    """

    is_compileable = False
    is_croppable = False
    # Of the one layer that it stands for: from 5.24 on `generate` skips what a cache has read only where some
    # layer is not linear, and a cache without layers would count as linear.
    is_linear = (False,)

    def __init__(self, model: Backbone, sleep: SleepConfig, sessions: Sequence[Session] = ()) -> None:
        super().__init__(layers=[])
        self.model, self.sleep, self.sessions, self.positions = model, sleep, list(sessions), 0

    def __repr__(self) -> str:
        return f"SleepCache(rows={len(self.sessions)}, positions={self.positions})"

    def read(self, tokens: Tensor, valid: Tensor | None, keep: int) -> Tensor:
        """Read on from what the rows have read, without gradients.

        Args:
            tokens: `[B, T]` int64.
            valid: `[B, T]` bool, False for padding, which must come before the tokens of a row; None: none.
            keep: at how many positions, counted from the end, logits are wanted.

        Returns:
            Logits `[B, keep, V]`, zeros for padding, NaN for a row of padding alone.

        Raises:
            ValueError: for other rows than before, padding after or among tokens, or padding alone.
            BrokenSleep: if a sleep left NaN or infinity.
        """
        B, T = tokens.shape
        if not self.sessions:
            self.sessions = [Session(self.model, self.sleep, history=0) for _ in range(B)]
        if len(self.sessions) != B:
            raise ValueError(f"past_key_values holds {len(self.sessions)} rows, input_ids has {B}")
        if valid is not None and bool((valid[:, :-1] & ~valid[:, 1:]).any()):
            raise ValueError(
                "attention_mask pads after or among tokens; what goes on must be padded on the left "
                "(tokenizer.padding_side = 'left')"
            )
        if valid is not None and not bool(valid.any()):
            raise ValueError("attention_mask hides every token, so there is nothing to go on from")
        rows = list(tokens) if valid is None else [x[ok] for x, ok in zip(tokens, valid, strict=True)]
        # Logits are made where they are wanted alone: of a long prompt that is its last position.
        edges = [max(len(row) - keep, 0) for row in rows]
        batch = SessionBatch(self.sessions)
        batch.read([row[:edge] for row, edge in zip(rows, edges, strict=True)])
        logits = batch.read_with_logits([row[edge:] for row, edge in zip(rows, edges, strict=True)])
        self.positions += T
        # Rows of different fill stand with their newest token at the right, as generate expects.
        out = next(x for x in logits if len(x)).new_zeros(B, keep, logits[0].shape[-1])
        for row, x in zip(out, logits, strict=True):
            row[keep - len(x) :] = x
            if not len(x):  # zeros would say that all tokens are as likely
                row.fill_(torch.nan)
        return out

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of positions so far, also of those that were slept on and evicted."""
        return self.positions

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: there is no limit."""
        return -1

    @property
    def batch_size(self) -> int:
        """The number of rows; -1 before the first call."""
        return len(self.sessions) or -1

    @property
    def is_initialized(self) -> bool:
        """True if there are rows."""
        return bool(self.sessions)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i go on from what row `beam_idx[i]` has read (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, forked where one is wanted twice."""
        # The first to ask for a row takes it over; a fork shares nothing that either of them changes.
        kept = [self.sessions[i] for i in indices.tolist()]
        self.sessions = [s if s not in kept[:i] else s.fork() for i, s in enumerate(kept)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, side by side."""
        rows = torch.arange(len(self.sessions)).repeat_interleave(repeats)
        self.batch_select_indices(rows)

    def reset(self) -> None:
        """Forget everything."""
        self.sessions, self.positions = [], 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse.

        Raises:
            ValueError: unless nothing is to be taken back.
        """
        if tokens_to_remove:
            raise ValueError("what fast weights have read cannot be taken back; generate without speculation")

    def activate_past_recording(self) -> None:
        """Refuse.

        Raises:
            ValueError: always.
        """
        raise ValueError("what fast weights have read cannot be taken back; generate without speculation")

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse.

        Raises:
            ValueError: always; the cache belongs to a model that `sleepify` made.
        """
        raise ValueError(
            "past_key_values=SleepCache is for a model that sleeps; call lmsleep.hf.sleepify first"
        )

    has_previous_state = get_conv_state = get_recurrent_state = get_mask_sizes = update
