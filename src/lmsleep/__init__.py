"""lmsleep: language models that sleep."""

from importlib import import_module

from lmsleep.version import __version__

# As type checkers know it. Not imported: `typing` would keep Ctrl-C from being handled for as long.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from lmsleep import ops, shipped
    from lmsleep.hf import adapt
    from lmsleep.memory import fingerprint
    from lmsleep.microscope import Inspection, inspect
    from lmsleep.models import HybridConfig, HybridLM
    from lmsleep.opening import open_model as open
    from lmsleep.session import BrokenSleep, Session, SessionBatch
    from lmsleep.sleep import (
        Backbone,
        Compact,
        Consolidator,
        Eviction,
        GradientSteps,
        GradMem,
        Hard,
        InPlace,
        MemoryTokens,
        Passes,
        SleepConfig,
        SleepOutput,
        Sliding,
        read_window,
        sleep_forward,
    )
    from lmsleep.state import Cache, Memory, Origin, State

__all__ = [
    "Backbone",
    "BrokenSleep",
    "Cache",
    "Compact",
    "Consolidator",
    "Eviction",
    "GradMem",
    "GradientSteps",
    "Hard",
    "HybridConfig",
    "HybridLM",
    "InPlace",
    "Inspection",
    "Memory",
    "MemoryTokens",
    "Origin",
    "Passes",
    "Session",
    "SessionBatch",
    "SleepConfig",
    "SleepOutput",
    "Sliding",
    "State",
    "__version__",
    "adapt",
    "fingerprint",
    "inspect",
    "open",
    "ops",
    "read_window",
    "shipped",
    "sleep_forward",
]

# Where each name comes from. It is imported when it is asked for: torch alone takes longer than `--help` may.
_HOMES = {
    "adapt": "hf",
    "fingerprint": "memory",
    **dict.fromkeys(("Inspection", "inspect"), "microscope"),
    **dict.fromkeys(("HybridConfig", "HybridLM"), "models"),
    **dict.fromkeys(("BrokenSleep", "Session", "SessionBatch"), "session"),
    **dict.fromkeys(("Backbone", "Compact", "Consolidator", "Eviction", "GradientSteps", "GradMem"), "sleep"),
    **dict.fromkeys(("Hard", "InPlace", "MemoryTokens", "Passes"), "sleep"),
    **dict.fromkeys(("SleepConfig", "SleepOutput", "Sliding", "read_window", "sleep_forward"), "sleep"),
    **dict.fromkeys(("Cache", "Memory", "Origin", "State"), "state"),
}


def __getattr__(name: str) -> "Any":
    if name == "open":
        return import_module("lmsleep.opening").open_model
    if name in _HOMES:
        return getattr(import_module(f"lmsleep.{_HOMES[name]}"), name)
    try:
        return import_module(f"lmsleep.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"lmsleep.{name}":
            raise
        raise AttributeError(f"module 'lmsleep' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return [*__all__]
