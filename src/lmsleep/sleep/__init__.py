"""Sleep: Algorithm 1 of the paper, over any model that offers a few methods."""

from lmsleep.sleep.backbone import Backbone, Compactable
from lmsleep.sleep.compact import Compact
from lmsleep.sleep.config import SleepConfig
from lmsleep.sleep.consolidators import (
    CONSOLIDATOR,
    CONSOLIDATORS,
    Consolidator,
    GradientSteps,
    GradMem,
    InPlace,
    MemoryTokens,
    Passes,
)
from lmsleep.sleep.eviction import Eviction, Hard, Sliding, evict
from lmsleep.sleep.evictions import EVICTION, EVICTIONS
from lmsleep.sleep.forward import SleepOutput, read_window, sleep_forward
from lmsleep.sleep.window import Pass, Window, speak, wake

__all__ = [
    "CONSOLIDATOR",
    "CONSOLIDATORS",
    "EVICTION",
    "EVICTIONS",
    "Backbone",
    "Compact",
    "Compactable",
    "Consolidator",
    "Eviction",
    "GradMem",
    "GradientSteps",
    "Hard",
    "InPlace",
    "MemoryTokens",
    "Pass",
    "Passes",
    "SleepConfig",
    "SleepOutput",
    "Sliding",
    "Window",
    "evict",
    "read_window",
    "sleep_forward",
    "speak",
    "wake",
]
