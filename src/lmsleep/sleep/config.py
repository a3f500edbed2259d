"""When and how a model sleeps, as plain data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from lmsleep.plain import check_types
from lmsleep.plugins import Plugin
from lmsleep.sleep.consolidators import CONSOLIDATOR, CONSOLIDATORS, Consolidator, Passes
from lmsleep.sleep.eviction import Eviction, Hard
from lmsleep.sleep.evictions import EVICTION, EVICTIONS
from lmsleep.state import Memory, Origin

MAX_WINDOW = 10**9  # tokens: more than anybody holds, less than an int64 does
TRAINING = ("backprop_passes", "checkpoint")  # once options of a sleep, now of the training


@dataclass(frozen=True, init=False)
class SleepConfig:
    """A sleep is three choices: when it comes, what it writes, and what stays in attention.

    `SleepConfig(window=L, passes=N)` is the paper's sleep, short for
    `SleepConfig(window=L, consolidator=Passes(N), eviction=Hard())`. Any option of the consolidator may be
    given directly, here and in `dataclasses.replace`: `SleepConfig(window=64, passes=4, loop="middle")`.
    """

    window: int | None
    """L: tokens of attention context; a sleep happens every L tokens. None: nothing is ever evicted."""
    consolidator: Consolidator
    """What a sleep does with a window: `Passes` (the paper), one of its rivals, or one of your own."""
    eviction: Eviction
    """What stays in attention after a sleep: `Hard` (nothing), `Sliding` (the last L - 1 tokens), `Compact`
    (few keys and values of all windows)."""
    sleep_on_loss: bool
    """Sleep on windows that carry loss too. False: Algorithm 1's rule, they get one ordinary pass."""

    def __init__(
        self,
        *,
        window: int | None = None,
        consolidator: Consolidator | str = "passes",
        eviction: Eviction | str = "hard",
        sleep_on_loss: bool = True,
        **options: Any,
    ) -> None:
        """Choose a sleep.

        Args:
            window: L, at least 1, or None.
            consolidator: one, or its name: a key of `CONSOLIDATORS`, `FILE.py:CLASS` or an entry point.
            eviction: one, or its name: "hard", "sliding", "compact", `FILE.py:CLASS` or an entry point.
            sleep_on_loss: see above.
            options: options of the consolidator, such as `passes`; they take the place of those it has.

        Raises:
            ValueError: for a value that cannot be, or an option that the consolidator does not have.
        """
        begin: Any = consolidator
        if isinstance(consolidator, str):
            begin = CONSOLIDATOR.find(consolidator, CONSOLIDATORS)()
        keeps: Any = EVICTION.find(eviction, EVICTIONS)() if isinstance(eviction, str) else eviction
        for name, value, kind in (("consolidator", begin, Consolidator), ("eviction", keeps, Eviction)):
            if not isinstance(value, kind):
                raise ValueError(f"{name} must be a lmsleep.{kind.__name__} or its name, got {value!r}")
        if not begin.takes_rest and not isinstance(keeps, Hard):
            raise ValueError(
                f"eviction={EVICTION.name_of(type(keeps), EVICTIONS)!r} leaves something in attention, and "
                f"with {type(begin).__name__} every window begins with its memory alone: choose hard"
            )
        if moved := options.keys() & {*TRAINING}:
            raise ValueError(
                f"{', '.join(sorted(moved))}: an option of the training, not of a sleep; give it to "
                "sleep_forward or TrainConfig"
            )
        if unknown := options.keys() - {f.name for f in fields(begin)}:
            raise ValueError(
                f"{', '.join(sorted(unknown))}: no option of a sleep with {type(begin).__name__}; it has "
                f"window, eviction, sleep_on_loss, {', '.join(f.name for f in fields(begin))}"
            )
        values = {"window": window, "consolidator": replace(begin, **options), "eviction": keeps}
        for name, value in {**values, "sleep_on_loss": sleep_on_loss}.items():
            object.__setattr__(self, name, value)
        # Of the two choices again: one of the user's own may have a `__post_init__` that asks nothing.
        for options_of in (self, self.consolidator, self.eviction):
            check_types(options_of)
        if window is not None and not 1 <= window <= MAX_WINDOW:
            raise ValueError(f"window must be at least 1 token and at most {MAX_WINDOW:,}, got {window}")

    @property
    def passes(self) -> int:
        """N: passes over a window before it is evicted. 1 is the plain model."""
        return self.consolidator.passes

    @property
    def wake_passes(self) -> int:
        """W: passes of the wake pass; more than one in looped models alone."""
        return self.consolidator.wake_passes if isinstance(self.consolidator, Passes) else 1

    def with_passes(self, passes: int) -> "SleepConfig":
        """Return the same sleep with N = `passes`."""
        return replace(self, consolidator=replace(self.consolidator, passes=passes))

    @property
    def method(self) -> str:
        """Name of the consolidator, by which memories tell what wrote them; of one's own its class."""
        kind = type(self.consolidator)
        return next((name for name, one in CONSOLIDATORS.items() if one is kind), kind.__name__)

    def check_origin(self, origin: Origin | None, name: object = "memory") -> None:
        """Refuse a memory that another method slept on, whatever its N and its options; None: unknown.

        Raises:
            ValueError: naming both methods.
        """
        wrote = origin.method if origin is not None and origin.sleeps else None
        if wrote not in (None, self.method):
            raise ValueError(
                f"{name} was written by {wrote}, and would be slept on by {self.method}: choose {wrote} "
                "(consolidator=..., --sleep)"
            )

    def check(self, memory: Memory) -> None:
        """Refuse a model whose memory, `memory`, this sleep could write nothing into.

        Raises:
            ValueError: if the consolidator does not fit it.
        """
        self.consolidator.check(memory.writes)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form, read back by `from_dict`."""
        return {
            "window": self.window,
            "consolidator": _named(self.consolidator, CONSOLIDATOR, CONSOLIDATORS),
            "eviction": _named(self.eviction, EVICTION, EVICTIONS),
            "sleep_on_loss": self.sleep_on_loss,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`, also after a trip through JSON.

        It reads the flat form too, in which all options once stood beside each other.

        Raises:
            ValueError: for an unknown field, or a value of another type.
        """
        return cls(**_checked(cls, _unflat(data)))

    @staticmethod
    def names(data: Mapping[str, Any]) -> dict[str, str]:
        """Return the names of consolidator and eviction in what `to_dict` made; no code runs for it."""
        choices = {name: said for name, said in _unflat(data).items() if isinstance(said, Mapping)}
        return {name: str(said.get("name")) for name, said in choices.items()}


def _named(choice: Any, plugin: Plugin, listed: Mapping[str, type]) -> dict[str, Any]:
    return {"name": plugin.name_of(type(choice), listed), **asdict(choice)}


def _unflat(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Bring the flat form into that of `to_dict`. What it said of the training is no part of a sleep."""
    if isinstance(data.get("consolidator"), Mapping):
        return data
    flat = {name: value for name, value in data.items() if name not in TRAINING}
    rate = flat.pop("inner_rate", None)
    when: dict[str, Any] = {name: flat.pop(name) for name in ("window", "sleep_on_loss") if name in flat}
    eviction = {"name": flat.pop("eviction", "hard")}
    if rate is None:
        return {**when, "consolidator": {"name": "passes", **flat}, "eviction": eviction}
    steps = {"name": "gradient-steps", "passes": flat.get("passes", 1), "rate": rate}
    return {**when, "consolidator": steps, "eviction": eviction}


def _checked(cls: type[SleepConfig], data: Mapping[str, Any]) -> dict[str, Any]:
    choices: dict[str, tuple[Plugin, Mapping[str, Any]]] = {
        "consolidator": (CONSOLIDATOR, CONSOLIDATORS),
        "eviction": (EVICTION, EVICTIONS),
    }
    plain = {name: value for name, value in data.items() if name not in choices}
    made: dict[str, Any] = _fields(cls, plain)
    for name, (plugin, listed) in choices.items():
        if name in data:
            options = dict(data[name]) if isinstance(data[name], Mapping) else {}
            kind = options.pop("name", None)
            if not isinstance(kind, str):
                raise ValueError(f"{name}={data[name]!r:.80} of its sleep is of another type")
            found = plugin.find(kind, listed)
            made[name] = found(**_fields(found, options))
    return made


def _fields(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return `data` as fields of the dataclass `cls`, JSON's lists as tuples."""
    if unknown := data.keys() - {f.name for f in fields(cls)}:
        raise ValueError(f"{min(unknown)!r:.80} is no field of a sleep")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
