"""Models that benchmarks read with: SmolLM2, asleep too, and tiny ones that show that a benchmark runs."""

from typing import Any

import torch

import lmsleep
from lmsleep import SleepConfig, adapt, shipped
from lmsleep.hf import insert_memory_layers, load_pretrained
from lmsleep.opening import Opened
from lmsleep.text.tokenizers import Bytes, Tokenizer, load_tokenizer

NAME, SLEEPS = "smollm2", "smollm2-sleeps"


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


def sleeping_model(*, tiny: bool) -> Opened:
    """Open the shipped adapter, or make a random model of bytes with memory layers that speak."""
    if not tiny:
        return lmsleep.open(SLEEPS, device="cpu")
    model = tiny_llama()
    insert_memory_layers(model, 2)
    for name, weight in model.named_parameters():
        if name.endswith("mixer.gate"):
            torch.nn.init.ones_(weight)
    return Opened(adapt(model), SleepConfig(window=200), Bytes())
