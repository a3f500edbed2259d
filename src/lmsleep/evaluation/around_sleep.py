"""What is predicted of a shifting stream before and after each sleep."""

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lmsleep.evaluation.score import EVAL_SEED
from lmsleep.sleep import Backbone, SleepConfig, evict, read_window
from lmsleep.state import State
from lmsleep.tasks import batch_rng
from lmsleep.text import Split

MOMENTS = ("before", "awake", "after")


@runtime_checkable
class Shifting(Protocol):
    """A task that can say where its stream shifts, and how each of its segments would go on."""

    @property
    def segment(self) -> int:
        """The number of tokens between two shifts."""
        ...

    def segments_of(self, rng: np.random.Generator, size: int, more: int = 0) -> np.ndarray:
        """Draw tokens `[size, segments, segment + more]`: segments, each with `more` that would follow it."""
        ...

    def is_predicted(self, tokens: np.ndarray) -> np.ndarray:
        """Mark the `tokens` that count in the loss."""
        ...


@dataclass(frozen=True)
class AroundSleep:
    """Bits per predicted token of the next window of the same segment, around each sleep.

    Attributes:
        bits: `[W, 3]` for the W windows of a segment: row s is about the window that s sleeps of its segment
            precede; the columns are `MOMENTS`: before the window is read, with all of it in attention, and
            after it was slept on and evicted.
        tokens: `[W]`, predicted tokens behind the numbers of a row.
    """

    bits: np.ndarray
    tokens: np.ndarray

    def to_list(self) -> list[dict[str, Any]]:
        """Return JSON-ready rows."""
        rows = zip(self.bits.tolist(), self.tokens.tolist(), strict=True)
        return [
            {"sleeps": s, **dict(zip(MOMENTS, bits, strict=True)), "tokens": tokens}
            for s, (bits, tokens) in enumerate(rows)
        ]


@torch.no_grad()
def around_sleep(
    model: Backbone,
    task: Shifting,
    sleep: SleepConfig,
    *,
    batches: int = 8,
    batch_size: int = 64,
    seed: int = EVAL_SEED,
    split: Split = "test",
    device: torch.device | str = "cpu",
) -> AroundSleep:
    """Read held-out streams window by window; before and after each sleep predict what lies ahead.

    What lies ahead is the next window of the same segment (after its last window: what would have followed).
    It is read on a fork of the state, so the stream is not disturbed. The first segment, which follows on
    nothing, counts if it is the only one.

    Raises:
        ValueError: if nothing is evicted, or a segment is no whole number of windows.
    """
    L = sleep.window
    if L is None or task.segment % L:
        raise ValueError(f"segment={task.segment} must be a multiple of the window, got window={L}")
    nats, tokens = np.zeros((task.segment // L, len(MOMENTS))), np.zeros(task.segment // L, dtype=np.int64)
    for index in range(batches):
        segments = torch.from_numpy(task.segments_of(batch_rng(seed, split, index), batch_size, more=L))
        state = model.initial_state(batch_size)
        for number, segment in enumerate(segments.to(device).unbind(1)):
            *windows, _ = pieces = segment.split(L, dim=1)
            for s, (window, ahead) in enumerate(zip(windows, pieces[1:], strict=True)):
                before, awake = state, _read(model, window, state, sleep, passes=1)
                # Read twice from the same state, which both leave as it is: once awake, once with the sleep.
                asleep = _read(model, window, state, sleep, passes=sleep.passes)
                state = evict(sleep.eviction, model, window, asleep, L)
                if number > 0 or segments.shape[1] == 1:
                    wanted = torch.from_numpy(task.is_predicted(ahead.cpu().numpy())).to(device)
                    # -100 is what cross_entropy leaves out.
                    targets = ahead.masked_fill(~wanted, -100)[:, 1:]
                    tokens[s] += int((targets >= 0).sum())
                    nats[s] += [_nats(model, ahead, targets, x, sleep) for x in (before, awake, state)]
    return AroundSleep(nats / tokens[:, None] / math.log(2), tokens)


def _read(model: Backbone, window: Tensor, state: State, sleep: SleepConfig, passes: int) -> State:
    return read_window(model, window, state, sleep, passes=passes, logits=False)[1]


def _nats(model: Backbone, ahead: Tensor, targets: Tensor, state: State, sleep: SleepConfig) -> float:
    logits, _ = read_window(model, ahead[:, :-1], state, sleep, passes=1)
    assert logits is not None
    return float(F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"))
