"""Models that benchmarks read with: SmolLM2, and a tiny one that shows that a benchmark runs."""

from typing import Any

import torch

from lmsleep import shipped
from lmsleep.hf import load_pretrained
from lmsleep.text.tokenizers import Bytes, Tokenizer, load_tokenizer

NAME = "smollm2"


def language_model(*, tiny: bool) -> tuple[Any, Tokenizer, str]:
    """Return a model of transformers, its tokenizer, and what to call it in a note."""
    if tiny:
        return tiny_llama(), Bytes(), "A tiny model"
    return load_pretrained(NAME), load_tokenizer(str(shipped.find(NAME))), "SmolLM2-135M-Instruct"


def tiny_llama() -> Any:
    """Make a random model of bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=2, **sizes)).eval()
