"""FLOPs of matrix products, counted on real passes."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

Shape = torch.Size


def flop_counter() -> FlopCounterMode:
    """Return PyTorch's counter, which knows attention's kernels of a GPU, with those of a CPU.

    A product of `[m, k]` and `[k, n]` is 2 m k n FLOPs. Attention is two products, whatever its mask, and
    four backward, as if it were written in products; PyTorch alone counts a CPU's as nothing. The sum is the
    counter's `get_total_flops()`.
    """
    aten = torch.ops.aten
    on_cpu = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=on_cpu)


def _attention(query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(_: Shape, query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * _attention(query, key, value)
