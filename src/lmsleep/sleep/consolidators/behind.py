"""Read a window behind memory tokens: what `MemoryTokens` and `GradMem` have in common."""

from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lmsleep.sleep.backbone import Backbone, Recalls
from lmsleep.sleep.consolidators.base import Consolidator
from lmsleep.sleep.window import Window
from lmsleep.state import Memory, State


@dataclass(frozen=True)
class Behind(Consolidator):
    """A sleep whose windows are read as [memory tokens; tokens].

    Tokens see the memory tokens by attention; in the working memory they stand before the window and leave
    with it. Who begins a window with an empty working memory reads them, so nothing else may be left in it.
    """

    takes_rest: ClassVar[bool] = False

    def read(self, model: Backbone, window: Window, *, logits: bool = True) -> tuple[Tensor | None, State]:
        """Read a window, or more of one, without sleeping on it."""
        h, state = behind(model, window)
        return window.said(model, h) if logits else None, state

    def check_model(self, model: object) -> None:
        """Refuse a model without memory tokens."""
        if not getattr(model, "memory_tokens", 0):
            raise ValueError(
                f"{type(self).__name__} is for models with memory tokens, HybridConfig(memory_tokens=m) or "
                "--memory-tokens m; models of transformers have none"
            )


def recall(model: Backbone, memory: Memory) -> Tensor:
    """Return the memory tokens of a model that has some, as hidden states `[B, m, d]`."""
    return cast(Recalls, model).recall(memory)


def opened(model: Backbone, window: Window) -> tuple[Tensor, State]:
    """Read a whole window: h `[B, m + L, d]` of memory tokens and tokens, and the state after them."""
    recalled = recall(model, window.began.memory)
    h = torch.cat([recalled, model.embed(window.tokens)], dim=1)
    valid = None if window.valid is None else F.pad(window.valid, (recalled.shape[1], 0), value=True)
    h, state = replace(window, valid=valid).run(model, h, window.began, 0, model.num_blocks)
    return h, state.counted(window.began.cache, h.shape[1], valid)


def behind(model: Backbone, window: Window) -> tuple[Tensor, State]:
    """Read tokens of a window: h `[B, L, d]` and the state after them.

    Rows whose working memory is empty begin the window, with the memory tokens; the others have read theirs
    and go on.
    """
    new = begins(window)
    if bool(new.all()):
        h, state = opened(model, window)
        return h[:, h.shape[1] - window.tokens.shape[1] :], state
    if not bool(new.any()):
        h, state = window.run(model, model.embed(window.tokens), window.began, 0, model.num_blocks)
        return h, window.counted(state)
    groups = [rows.nonzero()[:, 0].to(window.tokens.device) for rows in (new, ~new)]
    hs, states = zip(*(behind(model, _some(window, rows)) for rows in groups), strict=True)
    order = torch.cat(groups).argsort()
    return torch.cat(hs)[order], State.join(states, order)


def begins(window: Window) -> Tensor:
    """Tell, `[B]` bool on the CPU, which rows have nothing in their working memory."""
    cache, rows = window.began.cache, len(window.tokens)
    # Without a count all rows are alike, and no device need be waited for.
    return torch.full((rows,), cache.length == 0) if cache.filled is None else (cache.filled == 0).cpu()


def _some(window: Window, rows: Tensor) -> Window:
    valid = None if window.valid is None else window.valid[rows]
    return replace(window, tokens=window.tokens[rows], began=window.began.rows(rows), valid=valid)
