"""One window of context, and the wake pass over it: what a reader sees, and where a sleep begins."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lmsleep.sleep.backbone import Backbone, Learns
from lmsleep.state import State

Loop = tuple[int, int]  # the first block of a loop and the one after its last


@dataclass(frozen=True, eq=False)
class Window:
    """One window of a batch, and how the blocks of a model are run over it.

    Attributes:
        tokens: `[B, L]` int64; the last window of a text may be shorter.
        began: the state before its first token.
        valid: `[B, L]` bool, False for padding; None: every token is real.
        span: most positions that a token attends to; None: all that are there.
        heard: `[B, L]` bool, where wake logits are wanted, if they are; None: everywhere.
        backprop_passes: passes, counted from the last, through which gradients flow; None: all. It says how a
            model is trained, not how it sleeps, and never changes a value.
        checkpoint: keep of a pass only h and S for the backward pass, and recompute its other activations.
    """

    tokens: Tensor
    began: State
    valid: Tensor | None = None
    span: int | None = None
    heard: Tensor | None = None
    backprop_passes: int | None = None
    checkpoint: bool = False

    def run(self, model: Backbone, h: Tensor, state: State, start: int, stop: int) -> tuple[Tensor, State]:
        """Run blocks `start ... stop - 1` over `h` `[B, L, d]`, and return h and the state after them."""
        return self._through(model.run, h, state, start, stop)

    def learn(self, model: Learns, h: Tensor, state: State, rate: float) -> tuple[Tensor, State]:
        """Run all blocks over embedded tokens `h` `[B, L, d]`, and let them learn at `rate`."""
        return self._through(model.learn, h, state, rate)

    def _through(self, blocks: Callable[..., tuple[Tensor, State]], *args: Any) -> tuple[Tensor, State]:
        blocks = partial(blocks, valid=self.valid, span=self.span)
        if self.checkpoint and torch.is_grad_enabled():
            blocks = partial(checkpoint, blocks, use_reentrant=False)
        return blocks(*args)

    def said(self, model: Backbone, h: Tensor) -> Tensor:
        """Return the logits `[B, L, V]` of hidden states `[B, L, d]`; of those heard alone, `[1, n, V]`."""
        return model.head(h if self.heard is None else h[self.heard][None])

    def counted(self, state: State) -> State:
        """Return `state`, after this window, with the number of positions that each row holds by now."""
        return state.counted(self.began.cache, self.tokens.shape[1], self.valid)


@dataclass(frozen=True, eq=False)
class Pass:
    """Where a pass over a window stands: at the end of its loop, from where a further pass goes on.

    Attributes:
        h: `[B, L, d]`, hidden states after the loop.
        state: the state after the loop.
        entered: `[B, L, d]`, hidden states before the loop; every pass over the window has the same.
        before: the state before the loop, which has read the window in the blocks before it alone.
    """

    h: Tensor
    state: State
    entered: Tensor
    before: State

    def then(self, h: Tensor, state: State) -> "Pass":
        """Return the pass that left the loop with `h` and `state`."""
        return Pass(h, state, self.entered, self.before)

    def detach(self) -> "Pass":
        """Return the same values, cut from the autograd graph."""
        return Pass(self.h.detach(), self.state.detach(), self.entered.detach(), self.before.detach())


def wake(model: Backbone, window: Window, loop: Loop, wake_passes: int = 1) -> Pass:
    """Make the wake pass up to the end of the loop: embed, the blocks before the loop, the loop.

    A looped model loops `wake_passes` times. None of these passes begins with an `S` that another one wrote:
    that holds later tokens of the window, which a prediction must not see.
    """
    h, before = window.run(model, model.embed(window.tokens), window.began, 0, loop[0])
    awake = Pass(h, before, entered=h, before=before)
    for _ in range(wake_passes):
        awake = awake.then(*window.run(model, awake.h, before, *loop))
    return awake


def speak(
    model: Backbone, window: Window, awake: Pass, loop: Loop, *, logits: bool = True
) -> tuple[Tensor | None, State]:
    """Finish the wake pass: its logits and the state after all blocks.

    Logits are `[B, L, V]`, those alone that are heard `[1, n, V]`, or None unless `logits`.
    """
    h, state = window.run(model, awake.h, awake.state, loop[1], model.num_blocks)
    return window.said(model, h) if logits else None, window.counted(state)
