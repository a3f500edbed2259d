"""Whole texts as models of `transformers` get them, padded on either side, read by the sleep algorithm."""

from typing import Any

import torch
from torch import Tensor

from lmsleep.sleep import Backbone, SleepConfig, SleepOutput, sleep_forward


def check_alone(options: dict[str, Any]) -> None:
    """Refuse options of a forward pass that are switched on; a model that sleeps has none of them.

    Raises:
        ValueError: names them.
    """
    if refused := [name for name, value in options.items() if value is not None and value is not False]:
        raise ValueError(f"{', '.join(refused)}: a model that sleeps reads input_ids alone; leave it out")


def check_tokens(input_ids: Tensor | None, *, read_on: str = "") -> Tensor:
    """Return `input_ids`.

    Raises:
        ValueError: if they are not `[B, T]` with a row and a token at least.
    """
    if input_ids is None or input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(f"input_ids must hold new tokens, [B, T]{read_on}")
    return input_ids


def valid_tokens(
    mask: Tensor | None, position_ids: Tensor | None, tokens: Tensor, *, read_on: bool = False
) -> Tensor | None:
    """Return a mask `[B, T]`, bool, False for padding; None if there is none.

    Args:
        mask: `[B, T]`, 0 for padding on either side of a row.
        position_ids: `[..., T]`, checked only.
        tokens: `[B, T]`.
        read_on: the mask may be longer than the tokens, of which it holds what came before them too.

    Raises:
        ValueError: for other shapes, padding among tokens, or positions that start again within a row.
    """
    B, T = tokens.shape
    if mask is not None:
        shape = [*mask.shape] if isinstance(mask, Tensor) else type(mask).__name__
        if not isinstance(mask, Tensor) or mask.ndim != 2 or len(mask) != B or mask.shape[1] < T:
            raise ValueError(f"attention_mask must be [B, T] = [{B}, {T}] or longer, got {shape}")
        if mask.shape[1] > T and not read_on:
            raise ValueError(
                f"attention_mask must be [B, T] = [{B}, {T}], got {shape}: longer ones need a cache of "
                "what was read before"
            )
        mask = mask[:, -T:].bool()
        if bool((mask[:, 1:] & ~mask[:, :-1]).sum(1).add(mask[:, 0]).gt(1).any()):
            raise ValueError("attention_mask has padding among the tokens of a row; pad before or after them")
    if position_ids is not None:
        if position_ids.shape[-1] != T:
            raise ValueError(f"position_ids must be [B, T] = [{B}, {T}], got {[*position_ids.shape]}")
        steps = position_ids.diff(dim=-1) == 1
        if mask is not None:
            steps = steps | ~(mask[:, 1:] & mask[:, :-1])
        if not bool(steps.all()):
            raise ValueError(
                "position_ids start again within a row: packed texts would share a memory; give each a row"
            )
    return None if mask is None or bool(mask.all()) else mask


def predicted_tokens(wanted: Tensor, valid: Tensor | None) -> Tensor:
    """Return which tokens are predicted, `[B, T]` bool: all that are wanted, but the first of a row.

    Args:
        wanted: `[B, T]` bool.
        valid: `[B, T]` bool, False for padding on either side of a row; None: none.
    """
    valid = torch.ones_like(wanted) if valid is None else valid
    return wanted & valid & (valid.cumsum(dim=1) > 1)


def read_whole(
    model: Backbone,
    tokens: Tensor,
    valid: Tensor | None,
    sleep: SleepConfig,
    *,
    wanted: Tensor | None = None,
    keep: bool = True,
    checkpoint: bool = False,
) -> tuple[SleepOutput, Tensor | None]:
    """Read texts from nothing, with gradients.

    Args:
        model: what reads.
        tokens: `[B, T]` int64.
        valid: `[B, T]` bool, False for padding on either side of a row; it moves no window. None: none.
        sleep: how it sleeps.
        wanted: `[B, T]` bool, the tokens to be predicted; None: no loss.
        keep: what the head says is wanted.
        checkpoint: recompute the activations of passes in the backward pass.

    Returns:
        What `sleep_forward` said of rows that begin with their first token, and what the head says at the
        places of `tokens`, `[B, T, ...]` (None unless `keep`).
    """
    lengths = turned = None
    if valid is not None:
        lengths = valid.sum(dim=1)
        # Each row is turned round until its first token stands first; what the head says is turned back.
        T, first = valid.shape[1], valid.int().argmax(dim=1)
        turned = (torch.arange(T, device=valid.device) + first[:, None]) % T
        tokens, wanted = tokens.gather(1, turned), None if wanted is None else wanted.gather(1, turned)
    read = sleep_forward(
        model, tokens, wanted, sleep, lengths=lengths, return_logits=keep, checkpoint=checkpoint
    )
    said = read.logits
    if said is not None and turned is not None:
        said = said.gather(1, turned.argsort(1)[..., None].expand_as(said))
    return read, said
