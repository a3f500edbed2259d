"""The ways to sleep on a window, by name; one's own comes as `FILE.py:CLASS` or as an entry point."""

from dataclasses import is_dataclass
from inspect import isabstract
from typing import Any

from lmsleep.plugins import Plugin
from lmsleep.sleep.consolidators.base import Consolidator
from lmsleep.sleep.consolidators.gradient import GradientSteps
from lmsleep.sleep.consolidators.passes import Passes

CONSOLIDATORS: dict[str, type[Consolidator]] = {"passes": Passes, "gradient-steps": GradientSteps}


def _is_one(cls: Any) -> bool:
    return (
        isinstance(cls, type) and issubclass(cls, Consolidator) and is_dataclass(cls) and not isabstract(cls)
    )


CONSOLIDATOR = Plugin(
    what="consolidator",
    noun="class",
    group="lmsleep.consolidators",
    is_one=_is_one,
    must_be="a dataclass (of options) with all methods of lmsleep.Consolidator",
)

__all__ = ["CONSOLIDATOR", "CONSOLIDATORS", "Consolidator", "GradientSteps", "Passes"]
