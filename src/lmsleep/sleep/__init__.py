"""Sleep: Algorithm 1 of the paper, over any model that offers a few methods."""

from lmsleep.sleep.algorithm import SleepOutput, looped_blocks, read_window, sleep_forward
from lmsleep.sleep.backbone import Backbone
from lmsleep.sleep.config import Eviction, SleepConfig

__all__ = [
    "Backbone",
    "Eviction",
    "SleepConfig",
    "SleepOutput",
    "looped_blocks",
    "read_window",
    "sleep_forward",
]
