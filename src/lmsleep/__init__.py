"""lmsleep: language models that sleep."""

from lmsleep import ops
from lmsleep.models import HybridConfig, HybridLM
from lmsleep.sleep import Backbone, SleepConfig, SleepOutput, read_window, sleep_forward
from lmsleep.state import Cache, Memory, State

__version__ = "0.1.0"

__all__ = [
    "Backbone",
    "Cache",
    "HybridConfig",
    "HybridLM",
    "Memory",
    "SleepConfig",
    "SleepOutput",
    "State",
    "__version__",
    "ops",
    "read_window",
    "sleep_forward",
]
