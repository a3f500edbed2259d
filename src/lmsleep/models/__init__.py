"""Models: backbones that can sleep."""

from lmsleep.models.config import BlockKind, HybridConfig
from lmsleep.models.hybrid import HybridLM

__all__ = ["BlockKind", "HybridConfig", "HybridLM"]
