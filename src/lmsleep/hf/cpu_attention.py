"""Attention in float32 for training in bfloat16 on a CPU, whose backward pass is slow in bfloat16."""

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "sdpa_float32_on_cpu"


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend as "sdpa" of `transformers` does; in float32 what a CPU would attend to in bfloat16.

    At 14 tokens a row the backward pass takes 9 times as long in bfloat16 as in float32, at 256 tokens a
    quarter longer (PyTorch 2.13; docs/pretrained.md, "Attention-only models").
    """
    # Rotary positions are float32, and so are queries and keys then: autocast would round them again.
    if query.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    whole = (t.float() for t in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        out, _ = sdpa_attention_forward(module, *whole, attention_mask, **options)
    return out.to(value.dtype), None


def attend_in_float32(model: Any) -> None:
    """Let a model whose attention is "sdpa" attend so."""
    if model.config._attn_implementation == "sdpa":
        ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
        model.set_attn_implementation(NAME)
