"""Hugging Face models that sleep (the `hf` extra)."""
