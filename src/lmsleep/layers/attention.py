"""Causal softmax attention over the window, with a cache of unrotated keys."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmsleep.layers.rope import rotate, rotate_on, turned_back
from lmsleep.ops import append, right_align


class Attention(nn.Module):
    """Grouped-query attention with rotary positions.

    Keys are cached before rotation: positions count from the oldest visible key, so they restart
    when a window is evicted and stay small on an endless stream; only offsets matter to RoPE.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        head_dim: int,
        *,
        num_kv_heads: int,
        rope_theta: float | None,
        qk_norm: bool,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = head_dim, rope_theta
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.q_proj = nn.Linear(d_model, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, d_model, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps=norm_eps) if qk_norm else nn.Identity()

    @property
    def memory_shape(self) -> None:
        """Attention has no fast weights."""
        return None

    def empty_cache(self, batch_size: int) -> tuple[Tensor, ...]:
        """Return a cache of no keys and no values: two tensors `[B, 0, kv heads, head_dim]`."""
        weight = self.k_proj.weight
        # No element, so nothing is left uninitialised. Of sharded weights `new_empty` is sharded too.
        sizes = (batch_size, 0, self.num_kv_heads, self.head_dim)
        return tuple(torch.empty(sizes, dtype=weight.dtype, device=weight.device) for _ in "kv")

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None,
        cache: tuple[Tensor, ...],
        valid: Tensor | None,
        span: int | None,
        filled: Tensor | None = None,
        kept: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """Map `x` `[B, T, d]` to the same shape; each token sees at most `span` positions, itself included.

        Of the cache it sees the newest `filled` `[B]` positions of its row. Padding in `x` follows the
        tokens of its row, so causality hides it; in the cache that is returned it precedes them. What is
        `kept` of earlier windows (`Cache.kept`) is seen by all tokens.
        """
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        # Under autocast k and v are halves while an empty cache has the dtype of the weights.
        before, past = cache[0], cache[0].shape[1]
        k, v = append(before, k), append(cache[1], v)
        cache = (k, v) if valid is None else (right_align(k, valid), right_align(v, valid))
        # Keys are rotated after they were cached, all of them anew: key 0 is the oldest that is visible.
        if self.rope_theta is not None:
            q, k = rotate(q, past, self.rope_theta), rotate_on(k, before, self.rope_theta)
        # With nothing before the window a causal flag says it all, and fused kernels need no mask in memory.
        T, whole = q.shape[1], past == 0 and (span is None or q.shape[1] <= span) and not kept
        mask = None if whole else visible(T, past, span, filled, x.device)
        if kept and mask is not None:
            mask = beside(kept[2], mask, self.num_heads, q.dtype)
            old = self._where_rows_begin(kept[0], past, filled), kept[1]
            k, v = (torch.cat([x.to(new.dtype), new], dim=1) for x, new in zip(old, (k, v), strict=True))
        o = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=whole,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return self.o_proj(o.transpose(1, 2).flatten(2)), memory, cache

    def _where_rows_begin(self, kept: Tensor, past: int, filled: Tensor | None) -> Tensor:
        """Turn kept keys from before position 0 to before the first of the row's own in the cache."""
        if filled is None or self.rope_theta is None:
            return kept
        padding = (past - filled)[:, None, None].expand(kept.shape[:3])
        return turned_back(kept, -padding, self.rope_theta)


def visible(T: int, past: int, span: int | None, filled: Tensor | None, device: torch.device) -> Tensor:
    """Return a mask, bool: query i sees key j if `i - span < j <= i` and j is filled."""
    query = torch.arange(past, past + T, device=device)[:, None]
    key = torch.arange(past + T, device=device)
    # Time runs to the right over past and new keys alike, so position is order.
    seen = key <= query
    if span is not None:
        seen = seen & (key > query - span)
    # The newest `filled` of the past keys are the row's own; what precedes them is padding.
    return seen if filled is None else seen & (key >= past - filled[:, None, None, None])


def beside(bias: Tensor, seen: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Return what is added to scores where kept keys stand before those of the window.

    Args:
        bias: `[B, k, H]`, of the kept keys of each of H heads.
        seen: `[..., T, t]` bool, which keys of the window each query sees; four dimensions or two.
        heads: of queries, a multiple of H.
        dtype: of the result.

    Returns:
        `[B, heads, T, k + t]`.
    """
    B, _, H = bias.shape
    T, t = seen.shape[-2:]
    old = bias.to(dtype).transpose(1, 2).repeat_interleave(heads // H, dim=1)[:, :, None]
    # The lowest number, not -inf: a row of padding that sees nothing would become NaN.
    new = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return torch.cat([old.expand(B, heads, T, -1), new.expand(B, heads, T, t)], dim=-1)
