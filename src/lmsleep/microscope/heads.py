"""What passes do to the fast weights: figures per window, pass, block and head; the hypnogram."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lmsleep import ops
from lmsleep.layers import FastWeights
from lmsleep.microscope.seen import Row
from lmsleep.microscope.trace import Pass, Window
from lmsleep.state import Memory, State

POINTS = 16  # of the hypnogram, in a window that is read awake


def head_rows(number: int, window: Window) -> Iterator[Row]:
    """Yield figures of every pass, block and head of window `number`, means over the rows of the batch.

    `norm`: Frobenius norm of `S` after the pass. `change`: that of `S` after less `S` before it.
    `effective_rank`: as `Memory.effective_rank`. `cosine_S`: between `S` after and before the pass;
    `cosine_change`: between the change of this pass and of the one before it, over the same window.
    `forgotten`: mean over tokens of `1 - exp(g)`, the share of `S` that a token lets go; `written`: mean
    write strength beta. None where undefined (a cosine with zero, the gates of a layer of another kind).
    """
    before, changes = window.before.memory, dict[int, Tensor]()
    for n, each in enumerate(window.passes, start=1):
        for block, S in enumerate(each.memory.S):
            old = before.S[block]
            if S is None or old is None:
                continue
            change = S - old
            columns = {
                "norm": torch.linalg.matrix_norm(S),
                "change": torch.linalg.matrix_norm(change),
                "effective_rank": Memory((S,)).effective_rank()[:, 0],
                "cosine_S": cosine(S, old),
                "cosine_change": cosine(change, changes.get(block, torch.zeros_like(S))),
                **_gates(each, block),
            }
            changes[block] = change
            for head in range(S.shape[1]):
                figures = {name: mean(column[:, head]) for name, column in columns.items()}
                yield {"window": number, "pass": n, "block": block, "head": head,
                       "forgotten": None, "written": None, **figures}  # fmt: skip
        before = each.memory


def _gates(each: Pass, block: int) -> dict[str, Tensor]:
    if block not in each.writes:
        return {}
    writes = each.writes[block]
    # 1 - exp(g) without losing the digits of a small g.
    return {"forgotten": -torch.expm1(writes.g).mean(dim=1), "written": writes.beta.mean(dim=1)}


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine `[...]` between matrices `[..., K, V]`; nan where one of them is zero."""
    return (a * b).sum((-2, -1)) / (torch.linalg.matrix_norm(a) * torch.linalg.matrix_norm(b))


def mean(values: Tensor) -> float | None:
    """Return the mean of the values that are defined; None if none is."""
    average = float(values.nanmean())
    return average if math.isfinite(average) else None


def hypnogram_rows(read: int, window: Window, layers: dict[int, FastWeights]) -> Iterator[Row]:
    """Yield window fill, pass, and norm of all fast weights together, along the stream from `read` tokens on.

    First as the window begins (pass 0); awake (pass 1) at up to `POINTS` places of it, where its layers are
    known; then at its end after every further pass, asleep. The eviction is the beginning of the next.
    """
    L, fill = window.tokens.shape[1], window.before.cache.length
    yield moment(read, window.before)
    for count, memory in _awake(window, layers):
        yield {"token": read + count, "fill": fill + count, "pass": 1, "norm": norm(memory)}
    for n, each in enumerate(window.passes[1:], start=2):
        yield {"token": read + L, "fill": fill + L, "pass": n, "norm": norm(each.memory)}


def moment(read: int, state: State) -> Row:
    """Return the row of the hypnogram between two windows."""
    return {"token": read, "fill": state.cache.length, "pass": 0, "norm": norm(state.memory)}


def norm(memory: Memory) -> float:
    """Return the norm of all fast weights of a row together, mean over the rows of the batch."""
    # As one vector: the squares of all blocks and heads add up before the root.
    squares = sum(t.square().flatten(1).sum(1) for t in memory.tensors())
    assert isinstance(squares, Tensor)
    return float(squares.sqrt().mean())


def _awake(window: Window, layers: dict[int, FastWeights]) -> Iterator[tuple[int, Memory]]:
    """Yield the fast weights at places of the wake pass, recomputed from what its tokens wrote."""
    L, first = window.tokens.shape[1], window.passes[0]
    # Without gates nothing is known of the places in between: the end of the wake pass is all there is.
    if not layers or any(block not in first.writes for block in layers):
        yield L, first.memory
        return
    # The window is read again in pieces from what its tokens wrote; the model need not run.
    now, step = list(window.before.memory.S), -(-L // POINTS)
    for start in range(0, L, step):
        for block, layer in layers.items():
            part = (x[:, start : start + step] for x in first.writes[block])
            _, now[block] = ops.update(layer.rule, *part, initial_state=now[block], backend=layer.backend)
        yield min(start + step, L), Memory(tuple(now))
