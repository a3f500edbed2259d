"""lmsleep: language models that sleep."""

from lmsleep import ops, pretrained
from lmsleep.hf import adapt
from lmsleep.memory_file import Origin, fingerprint
from lmsleep.microscope import Inspection, inspect
from lmsleep.models import HybridConfig, HybridLM
from lmsleep.opening import open_model as open
from lmsleep.session import BrokenSleep, Session, SessionBatch
from lmsleep.sleep import Backbone, SleepConfig, SleepOutput, read_window, sleep_forward
from lmsleep.state import Cache, Memory, State
from lmsleep.version import __version__

__all__ = [
    "Backbone",
    "BrokenSleep",
    "Cache",
    "HybridConfig",
    "HybridLM",
    "Inspection",
    "Memory",
    "Origin",
    "Session",
    "SessionBatch",
    "SleepConfig",
    "SleepOutput",
    "State",
    "__version__",
    "adapt",
    "fingerprint",
    "inspect",
    "open",
    "ops",
    "pretrained",
    "read_window",
    "sleep_forward",
]
