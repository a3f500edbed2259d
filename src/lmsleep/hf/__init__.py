"""Hugging Face models that sleep (the `hf` extra)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lmsleep.hf.backbone import HFBackbone
from lmsleep.hf.insertion import Insertion, insert_memory_layers
from lmsleep.hf.loading import load_adapter, load_pretrained
from lmsleep.hf.saving import SavedAdapter, save_adapter
from lmsleep.hf.trial import adapt

if TYPE_CHECKING:
    from lmsleep.hf.sleep_cache import SleepCache
    from lmsleep.hf.sleeping import from_pretrained, sleepify

__all__ = [
    "HFBackbone",
    "Insertion",
    "SavedAdapter",
    "SleepCache",
    "adapt",
    "from_pretrained",
    "insert_memory_layers",
    "load_adapter",
    "load_pretrained",
    "save_adapter",
    "sleepify",
]

# What subclasses something of transformers is imported when it is asked for.
LATER = {"SleepCache": "sleep_cache", "from_pretrained": "sleeping", "sleepify": "sleeping"}


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{LATER[name]}"), name)
