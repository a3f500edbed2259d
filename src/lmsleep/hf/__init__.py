"""Hugging Face models that sleep (the `hf` extra)."""

from lmsleep.hf.backbone import HFBackbone, adapt
from lmsleep.hf.insertion import Insertion, insert_memory_layers
from lmsleep.hf.loading import load_pretrained

__all__ = ["HFBackbone", "Insertion", "adapt", "insert_memory_layers", "load_pretrained"]
