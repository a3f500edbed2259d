"""Hugging Face models that sleep (the `hf` extra)."""

from typing import TYPE_CHECKING, Any

from lmsleep.hf.backbone import HFBackbone, adapt
from lmsleep.hf.loading import load_pretrained

if TYPE_CHECKING:
    from lmsleep.hf.sleep_cache import SleepCache
    from lmsleep.hf.sleeping import from_pretrained, sleepify

__all__ = ["HFBackbone", "SleepCache", "adapt", "from_pretrained", "load_pretrained", "sleepify"]


def __getattr__(name: str) -> Any:
    """What needs `transformers` is imported when it is asked for."""
    if name in ("from_pretrained", "sleepify"):
        from lmsleep.hf import sleeping

        return getattr(sleeping, name)
    if name == "SleepCache":
        from lmsleep.hf.sleep_cache import SleepCache

        return SleepCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
