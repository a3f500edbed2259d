"""FLOPs of matrix products, counted on real passes."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Shape = torch.Size


def flop_counter() -> FlopCounterMode:
    """Return PyTorch's counter, with attention counted alike whatever computes it.

    A product of `[m, k]` and `[k, n]` is 2 m k n FLOPs. Attention is two products, whatever its mask, and
    four backward, as if it were written in products. PyTorch alone counts a CPU's as nothing, and of a GPU
    backward a fifth product, of what is recomputed. The sum is the counter's `get_total_flops()`.
    """
    aten = torch.ops.aten
    kernels = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        aten._scaled_dot_product_flash_attention_backward: _attention_backward,
        aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
        aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=kernels)


def flops_of(call: Callable[[], object]) -> int:
    """Count the FLOPs of a call."""
    with flop_counter() as counter:
        call()
    return counter.get_total_flops()


def _attention(query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    # Keys and values may be of fewer heads than the queries, which share them.
    B, H, T, K = query
    return 2 * B * H * T * key[2] * (K + value[3])


def _attention_backward(_: Shape, query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * _attention(query, key, value)
