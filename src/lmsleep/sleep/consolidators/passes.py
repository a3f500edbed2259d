"""The sleep of the paper: N passes over a window ("Do Language Models Need Sleep?", arXiv 2605.26099)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from lmsleep.sleep.backbone import Backbone
from lmsleep.sleep.consolidators.base import MAX_PASSES, Consolidator
from lmsleep.sleep.window import Loop, Pass, Window, speak, wake
from lmsleep.state import State


@dataclass(frozen=True)
class Passes(Consolidator):
    """N passes over the window: Algorithm 1 of the paper, and its ablations."""

    loop: tuple[int, int] | Literal["middle"] | None = None
    """Blocks first ... last - 1 that are looped; those before and after run once. "middle": the middle half
    of the blocks, as the paper loops Jet-Nemotron. None: all blocks."""
    reset: Literal["S", "h"] | None = None
    """What each further pass begins anew: S as before the window, or h as before the loop (ablations)."""
    normalize: bool = False
    """Scale h to unit RMS before each further pass."""
    reinject: bool = False
    """Add what entered the loop to h before each further pass."""
    wake_passes: int = 1
    """Passes of the wake pass itself; more make a looped model. Each begins with S as before the window."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.wake_passes <= MAX_PASSES:
            raise ValueError(f"wake_passes must lie in 1 ... {MAX_PASSES:,}, got {self.wake_passes}")
        if self.reset == "h" and (self.normalize or self.reinject):
            raise ValueError("reset='h' leaves no h to normalize or reinject into; drop one of them")
        if isinstance(self.loop, tuple) and not 0 <= self.loop[0] < self.loop[1]:
            raise ValueError(f"loop must be (first, last) with 0 <= first < last, got {self.loop}")

    def sleep_on(
        self, model: Backbone, window: Window, *, logits: bool = True
    ) -> tuple[Tensor | None, State]:
        """Make the wake pass and N - 1 further ones. Fast weights add up over the passes.

        Keys and values do not: each pass begins with the working memory that the window began with.
        """
        loop = self.loop_range(model.num_blocks)
        at = wake(model, window, loop, self.wake_passes)
        awake, _ = speak(model, window, at, loop) if logits else (None, None)
        for left in range(self.passes - 1, 0, -1):
            if left == window.backprop_passes:
                at = at.detach()
            h, S = self._between(at), at.before.memory if self.reset == "S" else at.state.memory
            at = at.then(*window.run(model, h, State(S, at.before.cache), *loop))
        _, state = speak(model, window, at, loop, logits=False)
        return awake, state

    def _between(self, at: Pass) -> Tensor:
        """Return the h that a further pass begins with."""
        if self.reset == "h":
            return at.entered
        h = F.rms_norm(at.h, at.h.shape[-1:]) if self.normalize else at.h
        return h + at.entered if self.reinject else h

    def read(self, model: Backbone, window: Window, *, logits: bool = True) -> tuple[Tensor | None, State]:
        """Read a window in the wake pass alone."""
        if self.wake_passes == 1:  # nobody goes on from the end of the loop: all blocks are one run
            return super().read(model, window, logits=logits)
        loop = self.loop_range(model.num_blocks)
        return speak(model, window, wake(model, window, loop, self.wake_passes), loop, logits=logits)

    def loop_range(self, num_blocks: int) -> Loop:
        """Return the first block of the loop and the one after its last, for a model of `num_blocks`.

        Raises:
            ValueError: if the loop reaches outside the model.
        """
        if self.loop == "middle":
            first = num_blocks // 4
            return first, first + max(num_blocks // 2, 1)
        first, last = self.loop or (0, num_blocks)
        if last > num_blocks:
            raise ValueError(
                f"loop={self.loop} reaches outside the model: it has blocks 0 ... {num_blocks - 1}"
            )
        return first, last

    def check(self, writes: Sequence[bool]) -> None:
        """Refuse a loop that reaches outside the model or holds none of its fast weights."""
        first, last = self.loop_range(len(writes))
        if self.passes > 1 and any(writes) and not any(writes[first:last]):
            raise ValueError(
                f"loop={self.loop} has no block with fast weights, so its passes would write nothing"
            )
