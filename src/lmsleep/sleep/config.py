"""When and how a model sleeps, as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

Eviction = Literal["hard", "sliding"]


@dataclass(frozen=True, kw_only=True)
class SleepConfig:
    """When and how a model sleeps."""

    window: int | None = None
    """L: tokens of attention context; a sleep happens every L tokens. None: nothing is ever evicted."""
    passes: int = 1
    """N: passes over a window before it is evicted. 1 is the plain hybrid."""
    eviction: Eviction = "hard"
    """After a sleep attention keeps nothing of the window (hard) or its last L - 1 tokens (sliding)."""
    loop: tuple[int, int] | Literal["middle"] | None = None
    """Blocks first ... last - 1 that are looped; those before and after run once. "middle": the middle half
    of the blocks, as the paper loops Jet-Nemotron. None: all blocks."""
    backprop_passes: int | None = None
    """Passes of a window, counted from the last, through which gradients flow. None: all."""
    reset: Literal["S", "h"] | None = None
    """What each further pass begins anew: S as before the window, or h as before the loop (ablations)."""
    wake_passes: int = 1
    """Passes of the wake pass itself; more make a looped model. Each begins with S as before the window."""
    normalize: bool = False
    """Scale h to unit RMS before each further pass."""
    reinject: bool = False
    """Add what entered the loop to h before each further pass."""
    sleep_on_loss: bool = True
    """Sleep on windows that carry loss too. False: Algorithm 1's rule, they get one ordinary pass."""
    checkpoint: bool = False
    """Of the activations keep only h and S between passes for the backward pass; recompute the others."""
    inner_rate: float | None = None
    """Test-time training: each further pass is a step of gradient descent at this rate on the window's own
    next-token loss, and S the trained weights (model option trained_mlp). None: the blocks write S."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 token, got {self.window}")
        if self.passes < 1:
            raise ValueError(f"passes must be at least 1 (1 = the plain model, no sleep), got {self.passes}")
        if self.wake_passes < 1:
            raise ValueError(f"wake_passes must be at least 1, got {self.wake_passes}")
        if self.reset not in (None, "S", "h"):
            raise ValueError(f"reset must be None, 'S' or 'h', got {self.reset!r}")
        if self.reset == "h" and (self.normalize or self.reinject):
            raise ValueError("reset='h' leaves no h to normalize or reinject into; drop one of them")
        if self.inner_rate is not None:
            self._check_inner_rate(self.inner_rate)
        if self.eviction not in get_args(Eviction):
            raise ValueError(f"eviction must be 'hard' or 'sliding', got {self.eviction!r}")
        if isinstance(self.loop, str):
            if self.loop != "middle":
                raise ValueError(f"loop must be (first, last), 'middle' or None, got {self.loop!r}")
        elif self.loop is not None and not 0 <= self.loop[0] < self.loop[1]:
            raise ValueError(f"loop must be (first, last) with 0 <= first < last, got {self.loop}")
        if self.backprop_passes is not None and not 1 <= self.backprop_passes <= self.passes:
            raise ValueError(
                f"backprop_passes must lie in 1 ... passes={self.passes}, got {self.backprop_passes}"
            )

    def _check_inner_rate(self, rate: float) -> None:
        if not rate >= 0:
            raise ValueError(f"inner_rate must not be negative, got {rate}")
        defaults = {"loop": None, "backprop_passes": None, "reset": None, "wake_passes": 1,
                    "normalize": False, "reinject": False, "checkpoint": False}  # fmt: skip
        if changed := [name for name, value in defaults.items() if getattr(self, name) != value]:
            raise ValueError(f"inner_rate trains S instead of looping blocks: leave out {', '.join(changed)}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `dataclasses.asdict`, also after a trip through JSON.

        Raises:
            ValueError: for an unknown field, or a value of another type.
        """
        hints = get_type_hints(cls)
        options: Any = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
        for name, value in options.items():
            if name not in hints:
                raise ValueError(f"{name} is no field of a sleep")
            if not _fits(value, hints[name]):
                raise ValueError(f"{name}={value!r} of its sleep is of another type")
        return cls(**options)

    def with_passes(self, passes: int) -> "SleepConfig":
        """The same sleep in N = `passes` passes; gradients flow through no more of them than there are."""
        limit = self.backprop_passes
        return replace(self, passes=passes, backprop_passes=None if limit is None else min(limit, passes))

    def loop_range(self, num_blocks: int) -> tuple[int, int]:
        """First block of the loop and the one after its last, for a model of `num_blocks`."""
        if self.loop == "middle":
            first = num_blocks // 4
            return first, first + max(num_blocks // 2, 1)
        first, last = self.loop or (0, num_blocks)
        if last > num_blocks:
            raise ValueError(
                f"loop={self.loop} reaches outside the model: it has blocks 0 ... {num_blocks - 1}"
            )
        return first, last

    @property
    def span(self) -> int | None:
        """Most positions a token attends to: L under sliding eviction."""
        return self.window if self.eviction == "sliding" else None

    @property
    def kept(self) -> int:
        """Positions of working memory that survive a sleep."""
        return self.window - 1 if self.eviction == "sliding" and self.window is not None else 0


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value out of JSON is one that the annotation `hint` allows."""
    allowed = get_args(hint)
    if get_origin(hint) is Literal:
        return value in allowed
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and len(value) == len(allowed) and all(map(_fits, value, allowed))
    if allowed:
        return any(_fits(value, one) for one in allowed)
    return type(value) is hint or (hint is float and type(value) is int)
