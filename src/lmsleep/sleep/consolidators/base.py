"""What a sleep does with a window."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lmsleep.plain import check_types
from lmsleep.sleep.backbone import Backbone
from lmsleep.sleep.window import Window, speak, wake
from lmsleep.state import State

MAX_PASSES = 10_000  # far beyond what helps; a file that says a billion must not stop the program for days


@dataclass(frozen=True)
class Consolidator(ABC):
    """Reads a window and writes it into the fast weights, before it is evicted.

    One of your own is a frozen dataclass that derives from this one and has `sleep_on`; its fields are its
    options. `SleepConfig(consolidator=...)` takes an instance or the name `FILE.py:CLASS`, and so does
    `--sleep` of every command; the name goes wherever the configuration goes.
    """

    takes_rest: ClassVar[bool] = True
    """A window may begin with what an eviction left of the one before it; False: hard eviction alone."""

    passes: int = 1
    """N: how long a sleep is. 1 is the plain model, whose windows are only read."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 1 <= self.passes <= MAX_PASSES:
            raise ValueError(
                f"passes must be at least 1 (1 = the plain model, no sleep) and at most {MAX_PASSES:,}, "
                f"got {self.passes}"
            )

    @abstractmethod
    def sleep_on(
        self, model: Backbone, window: Window, *, logits: bool = True
    ) -> tuple[Tensor | None, State]:
        """Read a window and sleep on it; it is called for N = `passes` > 1 alone.

        Rows of a batch must not meet, and padding (`window.valid`) must leave no trace.

        Args:
            model: any `Backbone`.
            window: the tokens and the state before them; `window.run` runs blocks of the model over them.
            logits: the wake logits are wanted.

        Returns:
            The logits `[B, L, V]` of the wake pass, from which the window's tokens are predicted (None unless
            `logits`; `[1, n, V]` where some are `heard` alone, as `speak` gives them), and the state that
            the sleep leaves, before eviction.
        """

    def read(self, model: Backbone, window: Window, *, logits: bool = True) -> tuple[Tensor | None, State]:
        """Read a window without sleeping on it; the result is that of `sleep_on`."""
        whole = 0, model.num_blocks
        return speak(model, window, wake(model, window, whole), whole, logits=logits)

    def check_model(self, model: object) -> None:
        """Refuse a model that lacks what this sleep needs beyond `Backbone`, or has what it would never use.

        Args:
            model: the model, or options that say `memory_tokens`, `learns` and `trains` as it will.

        Raises:
            ValueError: if it does not fit.
        """
        if tokens := getattr(model, "memory_tokens", 0):
            raise ValueError(
                f"memory_tokens={tokens} are read and written by the consolidators memory-tokens and gradmem "
                "alone: choose one of them, or a model without"
            )

    def check_backward(self, backprop_passes: int | None, checkpoint: bool) -> None:  # noqa: B027
        """Refuse ways of going backward that this sleep does not have; see `Window` for what they say.

        Raises:
            ValueError: naming them.
        """

    def check(self, writes: Sequence[bool]) -> None:  # noqa: B027 (most fit every model)
        """Refuse a model that this sleep could do nothing with.

        Args:
            writes: for each block of the model, whether it has fast weights.

        Raises:
            ValueError: if the options do not fit such a model.
        """
