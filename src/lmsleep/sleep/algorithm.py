"""Algorithm 1: read a window, sleep on it, keep the fast weights, forget the rest.

The paper ("Do Language Models Need Sleep?", arXiv 2605.26099) writes it for hard eviction and
training. Here it is one algorithm for training, text and inference: pass 1 over a window *is* the
ordinary wake pass, and its logits serve prediction; passes 2 ... N are the sleep, run when the window
is about to be evicted.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lmsleep.sleep.backbone import Backbone
from lmsleep.sleep.config import SleepConfig
from lmsleep.sleep.loss import next_tokens, nll
from lmsleep.sleep.test_time_training import train_on_window
from lmsleep.state import Cache, Memory, State


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
    passes: int,
    valid: Tensor | None = None,
    logits: bool = True,
) -> tuple[Tensor | None, State]:
    """Read one window `[B, L]` in `passes` passes: the body of Algorithm 1.

    Returns the logits `[B, L, V]` of pass 1, the wake pass (None unless `logits`), and the state after
    the last pass; evicting is up to the caller. `S` accumulates over the passes. Keys and values do
    not: every pass begins with the working memory that the window began with.

    A looped model (`wake_passes=W`) wakes in W passes. None of them begins with an `S` that another
    wrote, for that holds later tokens of the window, which prediction must not see.

    Raises:
        ValueError: if the loop reaches outside the model or holds none of its fast weights.
    """
    if sleep.inner_rate is not None and passes > 1:
        return train_on_window(model, tokens, state, sleep, passes=passes, valid=valid)
    first, last = looped_blocks(sleep, state.memory, passes)
    D, T, W, awake, began = model.num_blocks, tokens.shape[1], sleep.wake_passes, None, state.cache
    run: Callable[[Tensor, State, int, int], tuple[Tensor, State]]
    run = partial(model.run, valid=valid, span=sleep.span)
    if sleep.checkpoint and torch.is_grad_enabled():  # pass by pass: only h and S lie between them
        run = partial(checkpoint, run, use_reentrant=False)
    h, state = run(model.embed(tokens), state, 0, first)
    entered, before = h, state
    for n in range(1, W + passes):
        if n > 1 and sleep.backprop_passes == W + passes - n:
            h, entered, state, before = h.detach(), entered.detach(), state.detach(), before.detach()
        if n > 1:
            h = entered if n > W and sleep.reset == "h" else _between_passes(h, entered, sleep)
        memory = before.memory if n <= W or sleep.reset == "S" else state.memory
        h, state = run(h, State(memory, before.cache), first, last)
        if n == W and logits:
            seen, after = run(h, state, last, D)
            awake = model.head(seen)
            if passes == 1:
                return awake, after.counted(began, T, valid)
    _, state = run(h, state, last, D)
    return awake, state.counted(began, T, valid)


def looped_blocks(sleep: SleepConfig, memory: Memory, passes: int) -> tuple[int, int]:
    """First block of the loop and the one after its last, for a model with such a memory.

    Raises:
        ValueError: if the loop reaches outside the model or holds none of its fast weights.
    """
    first, last = sleep.loop_range(len(memory.layers))
    writes = [S is not None for S in memory.layers]
    if passes > 1 and any(writes) and not any(writes[first:last]):
        raise ValueError(
            f"loop={sleep.loop} has no block with fast weights, so its passes would write nothing"
        )
    return first, last


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

    Raises:
        ValueError: for shapes that do not fit or a loop outside the model.
    """
    _check(tokens, loss_mask, lengths, state)
    B, T = tokens.shape
    ends = torch.full((B,), T) if lengths is None else lengths.cpu()
    valid = None if lengths is None else torch.arange(T, device=tokens.device) < lengths[:, None]
    targets = next_tokens(tokens, loss_mask, valid)
    if not read_last:
        T = max(T - 1, 0)
        tokens, targets, ends = tokens[:, :T], None if targets is None else targets[:, :T], ends.clamp(max=T)
    carries_loss = torch.zeros(B, T, dtype=torch.bool) if targets is None else (targets >= 0).cpu()
    state = model.initial_state(B) if state is None else state
    total: Tensor | None = None
    kept_logits: list[Tensor] = []
    sleeps = torch.zeros(B, dtype=torch.int64)

    for a, b in _windows(T, sleep.window):
        loss_rows = carries_loss[:, a:b].any(dim=1)
        asleep = _asleep(ends, a, b, loss_rows, sleep, evict_last)
        need_logits = return_logits or bool(loss_rows.any())
        in_window = None if valid is None else valid[:, a:b]
        logits, state = _read_rows(model, tokens[:, a:b], state, sleep, asleep, in_window, need_logits)
        if logits is not None and targets is not None and loss_rows.any():
            window_loss = nll(logits, targets[:, a:b])
            total = window_loss if total is None else total + window_loss
        if return_logits and logits is not None:
            kept_logits.append(logits)
        if sleep.window is not None and (b < T or evict_last):
            going_on = None if evict_last else ends > b
            state = State(state.memory, _evicted(state.cache, going_on, sleep.kept))
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


def _evicted(cache: Cache, going_on: Tensor | None, kept: int) -> Cache:
    """What is left of a window (only S crosses it); rows that do not go on (None: all do) keep theirs."""
    if going_on is None or bool(going_on.all()):
        return cache.last(kept)
    counts = cache.counts(len(going_on))
    return cache.keep(torch.where(going_on.to(counts.device), counts.clamp(max=kept), counts))


def _read_rows(
    model: Backbone,
    tokens: Tensor,
    state: State,
    sleep: SleepConfig,
    asleep: Tensor,
    valid: Tensor | None,
    logits: bool,
) -> tuple[Tensor | None, State]:
    """`read_window` where rows that are due sleep together and the others make one pass."""

    def read(rows: Tensor | None, passes: int) -> tuple[Tensor | None, State]:
        x, s, ok = tokens, state, valid
        if rows is not None:
            x, s, ok = x[rows], s.rows(rows), None if ok is None else ok[rows]
        return read_window(model, x, s, sleep, passes=passes, valid=ok, logits=logits)

    if bool(asleep.all()) or not asleep.any() or sleep.passes == 1:
        return read(None, sleep.passes if asleep.any() else 1)
    groups = [asleep.nonzero()[:, 0], (~asleep).nonzero()[:, 0]]
    parts = [read(rows, passes) for rows, passes in zip(groups, (sleep.passes, 1), strict=True)]
    order = torch.cat(groups).argsort()
    both = [x for x, _ in parts if x is not None]
    return torch.cat(both)[order] if both else None, State.join([s for _, s in parts], order)


def _between_passes(h: Tensor, entered: Tensor, sleep: SleepConfig) -> Tensor:
    if sleep.normalize:
        h = F.rms_norm(h, h.shape[-1:])
    return h + entered if sleep.reinject else h


def _check(tokens: Tensor, loss_mask: Tensor | None, lengths: Tensor | None, state: State | None) -> None:
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be [B, T], got shape {tuple(tokens.shape)}")
    if loss_mask is not None and loss_mask.shape != tokens.shape:
        raise ValueError(
            f"loss_mask must have the shape of tokens {tuple(tokens.shape)}, got {tuple(loss_mask.shape)}"
        )
    if lengths is not None and lengths.shape != tokens.shape[:1]:
        raise ValueError(f"lengths must be [B] = [{len(tokens)}], got {tuple(lengths.shape)}")
    if lengths is not None and not bool(((lengths >= 0) & (lengths <= tokens.shape[1])).all()):
        raise ValueError(f"lengths must lie in 0 ... T={tokens.shape[1]}, got {lengths.tolist()}")
    if state is not None and any(
        len(t) != len(tokens)
        for layer in (state.memory.layers, *state.cache.layers)
        for t in layer
        if t is not None
    ):
        raise ValueError(f"state must have the rows of tokens, {len(tokens)}")
