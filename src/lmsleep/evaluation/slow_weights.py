"""How well a model predicts a text that it has read: by attention, by its memory, or by its slow weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lmsleep.sleep import Backbone
from lmsleep.sleep.loss import nll
from lmsleep.state import State


@torch.no_grad()
def nats(
    model: Backbone, windows: Sequence[Tensor], state: State | None = None, *, in_view: bool = False
) -> float:
    """Return the mean negative log-likelihood of a token of windows, each read for itself.

    The first token of each is left out: where nothing is in view, nothing predicts it.

    Args:
        model: any `Backbone`.
        windows: `[n]` int64 each.
        state: what was read before each of them, one row; default nothing.
        in_view: whether the window is in view already: it is read once before.

    Raises:
        ValueError: if no window has two tokens.
    """
    total, count = 0.0, 0
    begin = model.initial_state(1) if state is None else state
    for window in windows:
        tokens = window[None].to(model.device)
        h, began = model.embed(tokens), begin
        if in_view:
            _, read = model.run(h, begin, 0, model.num_blocks)
            began = read.counted(begin.cache, len(window), None)
        logits = model.head(model.run(h, began, 0, model.num_blocks)[0])[:, :-1]
        total, count = total + float(nll(logits, tokens[:, 1:])), count + len(window) - 1
    if not count:
        raise ValueError("text must have at least two tokens to predict one of them")
    return total / count
