"""Algorithm 1: read a window, sleep on it, keep the fast weights, forget the rest.

The paper ("Do Language Models Need Sleep?", arXiv 2605.26099) writes it for hard eviction and training.
Here it is one algorithm for training, text and inference. What a sleep does with a window is up to the
consolidator (`lmsleep.sleep.consolidators`); with the paper's, pass 1 over a window *is* the ordinary wake
pass, whose logits serve prediction, and passes 2 ... N are run when the window is about to be evicted.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lmsleep.sleep.backbone import Backbone
from lmsleep.sleep.config import SleepConfig
from lmsleep.sleep.eviction import evict
from lmsleep.sleep.loss import next_tokens, nll
from lmsleep.sleep.window import Window
from lmsleep.state import Memory, State


@dataclass(frozen=True, eq=False)
class SleepOutput:
    """What `sleep_forward` returns.

    Attributes:
        loss: mean cross entropy over the tokens of the loss mask, in nats; None if it marks none.
        logits: `[B, T, V]` of the wake passes; None unless asked for.
        state: fast weights and working memory after the last window.
        sleeps: `[B]` int64, how often each row slept.
    """

    loss: Tensor | None
    logits: Tensor | None
    state: State
    sleeps: Tensor

    @property
    def memory(self) -> Memory:
        """The fast weights after the last window."""
        return self.state.memory


def read_window(
    model: Backbone,
    tokens: Tensor,
    state: State,
    sleep: SleepConfig,
    *,
    passes: int | None = None,
    valid: Tensor | None = None,
    logits: bool = True,
    heard: Tensor | None = None,
    backprop_passes: int | None = None,
    checkpoint: bool = False,
) -> tuple[Tensor | None, State]:
    """Read one window and, if `passes` is not 1, sleep on it: the body of Algorithm 1.

    Evicting it afterwards is up to the caller (`evict`).

    Args:
        model: any `Backbone`.
        tokens: `[B, L]` int64.
        state: the state that the window begins with.
        sleep: the `SleepConfig`.
        passes: N; default that of `sleep`. 1 only reads the window.
        valid: `[B, L]` bool, False for padding; None: every token is real.
        logits: the wake logits are wanted.
        heard: `[B, L]` bool, where they are; None: everywhere.
        backprop_passes: passes, counted from the last, through which gradients flow; None: all.
        checkpoint: recompute the activations of a pass in the backward pass.

    Returns:
        The logits `[B, L, V]` of the wake pass (None unless `logits`), or those that are heard, `[1, n, V]`,
        row by row; and the state after the last pass.

    Raises:
        ValueError: if the sleep does not fit the model.
    """
    consolidator = sleep.consolidator if passes is None else replace(sleep.consolidator, passes=passes)
    span = None if sleep.window is None else sleep.eviction.span(sleep.window)
    window = Window(tokens, state, valid, span, heard, backprop_passes, checkpoint)
    consolidator.check_model(model)
    consolidator.check(state.memory.writes)
    consolidator.check_backward(backprop_passes, checkpoint)
    read = consolidator.read if consolidator.passes == 1 else consolidator.sleep_on
    said, state = read(model, window, logits=logits)
    if said is not None and heard is not None and said.shape[:2] == tokens.shape:
        said = said[heard][None]  # of a consolidator that does not ask what is heard
    return said, state


def sleep_forward(
    model: Backbone,
    tokens: Tensor,
    loss_mask: Tensor | None,
    sleep: SleepConfig,
    *,
    state: State | None = None,
    lengths: Tensor | None = None,
    evict_last: bool = False,
    read_last: bool = True,
    return_logits: bool = True,
    backprop_passes: int | None = None,
    checkpoint: bool = False,
) -> SleepOutput:
    """Algorithm 1 over whole sequences: windows of L tokens, a sleep at the end of each.

    Every window that is followed by another is slept on and evicted. The last one is not: its
    tokens are still in attention (`evict_last=True` sleeps on it too, as before a question).

    Args:
        model: any `Backbone`.
        tokens: `[B, T]` int64.
        loss_mask: `[B, T]` bool: the tokens to be predicted, each from the position before it (the
            first token of a sequence never is). None: no loss.
        sleep: the `SleepConfig`.
        state: what came before; default nothing (`S = 0`). Its working memory is seen by the first window
            and leaves with it.
        lengths: `[B]` int64, tokens per row; what follows is padding, which writes nothing and carries
            no loss. A row sleeps only on windows of its own, and its state is that after its last token.
        evict_last: sleep on the last window as well.
        read_last: False: token T is only predicted, not read, as in training, where nothing follows it. The
            loss is the same; logits are `[B, T - 1, V]` and the state is that before token T.
        return_logits: keep the wake logits of every position (memory `[B, T, V]`).
        backprop_passes: passes of a window, counted from the last, through which gradients flow (truncated
            backpropagation); None: all.
        checkpoint: of the activations keep only h and S between passes for the backward pass; recompute the
            others.

    Raises:
        ValueError: for shapes that do not fit or a loop outside the model.
    """
    _check(tokens, loss_mask, lengths, state)
    if backprop_passes is not None and backprop_passes < 1:
        raise ValueError(f"backprop_passes must be at least 1, got {backprop_passes}")
    B, T = tokens.shape
    ends = torch.full((B,), T) if lengths is None else lengths.cpu()
    valid = None if lengths is None else torch.arange(T, device=tokens.device) < lengths[:, None]
    targets = next_tokens(tokens, loss_mask, valid)
    if not read_last:
        T = max(T - 1, 0)
        tokens, targets, ends = tokens[:, :T], None if targets is None else targets[:, :T], ends.clamp(max=T)
    carries_loss = torch.zeros(B, T, dtype=torch.bool) if targets is None else (targets >= 0).cpu()
    sleep.eviction.check(model)
    state = model.initial_state(B) if state is None else state
    total: Tensor | None = None
    kept_logits: list[Tensor] = []
    sleeps = torch.zeros(B, dtype=torch.int64)
    read = partial(_read_rows, model, sleep, backprop_passes=backprop_passes, checkpoint=checkpoint)

    for a, b in _windows(T, sleep.window):
        loss_rows = carries_loss[:, a:b].any(dim=1)
        asleep = _asleep(ends, a, b, loss_rows, sleep, evict_last)
        need_logits = return_logits or bool(loss_rows.any())
        in_window = None if valid is None else valid[:, a:b]
        wanted = None if targets is None else targets[:, a:b]
        # Vocabularies are wide: where only the loss is asked for, no other logits are computed.
        heard = None if return_logits or wanted is None else wanted >= 0
        logits, state = read(tokens[:, a:b], state, asleep, in_window, need_logits, heard)
        if logits is not None and wanted is not None and loss_rows.any():
            window_loss = nll(logits, wanted if heard is None else wanted[heard][None])
            total = window_loss if total is None else total + window_loss
        if return_logits and logits is not None:
            kept_logits.append(logits)
        if sleep.window is not None and (b < T or evict_last):
            on = None if evict_last else ends > b
            state = evict(
                sleep.eviction, model, tokens[:, a:b], state, sleep.window, valid=in_window, going_on=on
            )
        sleeps += asleep

    return SleepOutput(
        loss=None if total is None else total / int(carries_loss.sum()),
        logits=torch.cat(kept_logits, dim=1) if kept_logits else None,
        state=state,
        sleeps=sleeps,
    )


def _windows(T: int, window: int | None) -> Iterator[tuple[int, int]]:
    L = window or max(T, 1)
    return ((a, min(a + L, T)) for a in range(0, T, L))


def _asleep(ends: Tensor, a: int, b: int, loss_rows: Tensor, sleep: SleepConfig, evict_last: bool) -> Tensor:
    """`[B]` bool: which rows sleep on the window of tokens a ... b - 1."""
    if sleep.window is None:
        return torch.zeros_like(loss_rows)
    asleep = ends > (a if evict_last else b)
    return asleep if sleep.sleep_on_loss else asleep & ~loss_rows


def _read_rows(
    model: Backbone,
    sleep: SleepConfig,
    tokens: Tensor,
    state: State,
    asleep: Tensor,
    valid: Tensor | None,
    logits: bool,
    heard: Tensor | None,
    **training: Any,
) -> tuple[Tensor | None, State]:
    """Read a window in all rows: those that are due sleep together, and the others make one pass."""

    def read(rows: Tensor | None, passes: int) -> tuple[Tensor | None, State]:
        x, s, ok, loud = tokens, state, valid, heard
        if rows is not None:
            x, s = x[rows], s.rows(rows)
            ok, loud = (None if y is None else y[rows] for y in (ok, loud))
        return read_window(model, x, s, sleep, passes=passes, valid=ok, logits=logits, heard=loud, **training)

    if bool(asleep.all()) or not asleep.any() or sleep.passes == 1:
        return read(None, sleep.passes if asleep.any() else 1)
    groups = [asleep.nonzero()[:, 0], (~asleep).nonzero()[:, 0]]
    parts = [read(rows, passes) for rows, passes in zip(groups, (sleep.passes, 1), strict=True)]
    order = torch.cat(groups).argsort()
    # A consolidator may give logits that nobody asked for, and those of some rows alone.
    both = [x for x, _ in parts if x is not None] if logits else []
    joined = State.join([s for _, s in parts], order)
    if both and heard is not None:
        # Row by row again: `places` numbers what is heard so; the groups have it in another order.
        places = heard.flatten().cumsum(0).view_as(heard)
        rows = torch.cat(groups).to(heard.device)
        return torch.cat(both, dim=1)[:, places[rows][heard[rows]].argsort()], joined
    return torch.cat(both)[order] if both else None, joined


def _check(tokens: Tensor, loss_mask: Tensor | None, lengths: Tensor | None, state: State | None) -> None:
    if tokens.ndim != 2 or not len(tokens):
        raise ValueError(f"tokens must be [B, T] with a row at least, got shape {tuple(tokens.shape)}")
    if loss_mask is not None and loss_mask.shape != tokens.shape:
        raise ValueError(
            f"loss_mask must have the shape of tokens {tuple(tokens.shape)}, got {tuple(loss_mask.shape)}"
        )
    if lengths is not None and lengths.shape != tokens.shape[:1]:
        raise ValueError(f"lengths must be [B] = [{len(tokens)}], got {tuple(lengths.shape)}")
    if lengths is not None and not bool(((lengths >= 0) & (lengths <= tokens.shape[1])).all()):
        raise ValueError(f"lengths must lie in 0 ... T={tokens.shape[1]}, got {lengths.tolist()}")
    if state is not None and any(len(t) != len(tokens) for t in state.tensors()):
        raise ValueError(f"state must have the rows of tokens, {len(tokens)}")
