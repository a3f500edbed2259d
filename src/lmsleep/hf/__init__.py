"""Hugging Face models that sleep (the `hf` extra)."""

from lmsleep.hf.backbone import HFBackbone, adapt
from lmsleep.hf.loading import load_pretrained

__all__ = ["HFBackbone", "adapt", "load_pretrained"]
