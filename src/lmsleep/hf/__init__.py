"""Hugging Face models that sleep (the `hf` extra)."""

from lmsleep.hf.backbone import HFBackbone, adapt

__all__ = ["HFBackbone", "adapt"]
