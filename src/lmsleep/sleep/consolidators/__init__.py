"""The ways to sleep on a window, by name; one's own comes as `FILE.py:CLASS` or as an entry point."""

from lmsleep.plugins import Plugin, derives_from
from lmsleep.sleep.consolidators.base import Consolidator
from lmsleep.sleep.consolidators.gradient import GradientSteps
from lmsleep.sleep.consolidators.gradmem import GradMem
from lmsleep.sleep.consolidators.in_place import InPlace
from lmsleep.sleep.consolidators.memory_tokens import MemoryTokens
from lmsleep.sleep.consolidators.passes import Passes

CONSOLIDATORS: dict[str, type[Consolidator]] = {
    "passes": Passes,
    "gradient-steps": GradientSteps,
    "memory-tokens": MemoryTokens,
    "gradmem": GradMem,
    "in-place": InPlace,
}

CONSOLIDATOR = Plugin(
    what="consolidator",
    noun="class",
    group="lmsleep.consolidators",
    is_one=derives_from(Consolidator),
    must_be="a dataclass (of options) with all methods of lmsleep.Consolidator",
)

__all__ = [
    "CONSOLIDATOR",
    "CONSOLIDATORS",
    "Consolidator",
    "GradMem",
    "GradientSteps",
    "InPlace",
    "MemoryTokens",
    "Passes",
]
