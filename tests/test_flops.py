"""FLOPs of attention are those of its products, whatever computes it."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmsleep.flops import flop_counter


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"attn_mask": torch.zeros(2, 1, 6, 9)}], ids=str
)
def test_attention_counts_as_its_products(heads, options):
    sizes = ((4, 6, 16), (heads, 9, 16), (heads, 9, 8))
    query, key, value = (torch.randn(2, *size, requires_grad=True) for size in sizes)
    attend = lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)  # noqa: E731
    with flop_counter() as forward:
        out = attend()
    with flop_counter() as backward:
        out.sum().backward()
    with flop_counter() as products, sdpa_kernel(SDPBackend.MATH):
        attend().sum().backward()
    assert forward.get_total_flops() == 2 * 2 * 4 * 6 * 9 * (16 + 8)
    assert backward.get_total_flops() == 2 * forward.get_total_flops()
    assert products.get_total_flops() == 3 * forward.get_total_flops()
