"""How windows are slept on, in words of the command line: METHOD, or METHOD,OPTION=VALUE,..."""

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Literal

from lmsleep.cli.values import pairs
from lmsleep.plain import from_plain
from lmsleep.plugins import Plugin
from lmsleep.sleep import CONSOLIDATOR, CONSOLIDATORS, EVICTION, EVICTIONS, Hard, SleepConfig


@dataclass(frozen=True)
class Choice:
    """A choice among classes whose fields are options.

    Attributes:
        flag: names a class, and options of it behind commas.
        plugin: finds those that users bring along.
        listed: all others, by name.
        apart: options that have flags of their own.
    """

    flag: str
    plugin: Plugin
    listed: Mapping[str, type[Any]]
    apart: tuple[str, ...] = ()

    def over(self, text: str | None, has: Any) -> Any:
        """Return what `text` names: `has` with other options, or one of another class with those it names.

        Raises:
            ValueError: naming the flag, for an unknown class, an option that it does not have, or a value
                that cannot be.
            PermissionError: for code that may not run.
        """
        if text is None:
            return has
        name, _, rest = re.sub(r",(?=\w+=)", "\n", text, count=1).partition("\n")
        try:
            listed, comma, word = name.partition(",")
            if comma and listed in self.listed:
                raise ValueError(f"{word!r} is no OPTION=VALUE")
            kind = self.plugin.find(name, self.listed)
            said = pairs(self.flag, [rest] if rest else [])
            for option in self.apart:
                if option in said:
                    raise ValueError(f"{option} has a flag of its own, --{option}")
            if unknown := said.keys() - (known := self.options(kind)).keys():
                has_some = f"it has {_spelled(known)}" if known else "it has none"
                raise ValueError(f"{min(unknown)} is no option of {name}; {has_some}")
            # The model's own method keeps what is not said; another begins with its defaults.
            kept = {f.name: getattr(has, f.name) for f in fields(kind)} if type(has) is kind else {}
            return from_plain(kind, {**kept, **said})
        except (TypeError, ValueError) as error:  # TypeError: an option without a default is missing
            raise ValueError(f"--{self.flag} {text}: {error}") from None

    def spelled(self, choice: Any) -> str:
        """Return what `over` reads as this one, but for options with flags of their own."""
        defaults = self.options(type(choice))
        said = {o: v for o in defaults if (v := getattr(choice, o)) != defaults[o]}
        name = self.plugin.name_of(type(choice), self.listed)
        return ",".join([name, *([_spelled(said)] if said else [])])

    def page(self) -> str:
        """List the classes with their options and the first lines of their docstrings."""
        return "\n".join(
            f"  {','.join([name, *([_spelled(options)] if (options := self.options(kind)) else [])])}\n"
            f"      {(kind.__doc__ or '').splitlines()[0]}"
            for name, kind in self.listed.items()
        )

    def options(self, kind: type[Any]) -> dict[str, Any]:
        """Return the options of a class that have no flags, with their defaults."""
        return {
            f.name: "..." if f.default is MISSING else f.default
            for f in fields(kind)
            if f.name not in self.apart
        }


def _spelled(options: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in options.items())


BY = Choice("sleep", CONSOLIDATOR, CONSOLIDATORS, apart=("passes", "loop"))
KEPT = Choice("eviction", EVICTION, EVICTIONS)


def remedy(error: str) -> str:
    """Say which flag does what those that an error names did once, or what --sleep wants; empty: nothing."""
    if error.startswith("Missing value for argument '--sleep'"):
        return f"; name one of {', '.join(CONSOLIDATORS)} (read: the open window sleeps by --sleep-at-end)"
    for flag in re.findall(r"--([a-z][a-z-]*)", error):
        if flag == "consolidator":
            return "; --consolidator NAME is --sleep NAME,OPTION=VALUE now"
        option = flag.replace("-", "_")
        for choice in (BY, KEPT):
            for name, kind in choice.listed.items():
                if option in choice.options(kind):
                    return f"; {option} stands behind a comma now: --{choice.flag} {name},{option}=VALUE"
    return ""


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """How windows are slept on, where not as the run or folder says."""

    sleep: str | None = None
    """What a sleep does with a window: passes (the paper), gradient-steps (test-time training), memory-tokens
    (RMT), gradmem (GradMem), in-place (In-Place TTT), or FILE.py:CLASS; its options behind commas
    (in-place,rate=0.1,chunk=16; lmsleep train --help lists them). Default that of the run or folder."""
    eviction: str | None = None
    """What then stays in attention: nothing of the window (hard), its last L - 1 tokens (sliding), few keys a
    head of all windows (compact,keys=64,method=attention), or what FILE.py:CLASS keeps. Default that of the
    run or folder."""
    window: int | None = None
    """L: tokens of a window; default that of the run or folder."""
    loop: tuple[int, int] | Literal["middle"] | None = None
    """Blocks first ... last - 1 that the passes loop, or the middle half; default that of the run or folder,
    or all."""

    def __post_init__(self) -> None:
        self.over(SleepConfig())  # at once, and not when a model of minutes is loaded

    def over(self, sleep: SleepConfig, passes: int | None = None) -> SleepConfig:
        """Return `sleep` with what is said otherwise, and N = `passes` unless None.

        Raises:
            ValueError: for what cannot be, naming the flag.
        """
        by = BY.over(self.sleep, sleep.consolidator)
        flags = {
            "passes": sleep.passes if passes is None else passes,
            "loop": self.loop,
            "window": self.window,
        }
        given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
        return replace(sleep, consolidator=by, eviction=KEPT.over(self.eviction, sleep.eviction), **given)

    @property
    def leaves_some(self) -> bool:
        """Say whether an eviction is named that keeps something, so that fast weights may be missing."""
        return not isinstance(KEPT.over(self.eviction, Hard()), Hard)
