"""Fast weights in the shape of an attention, which speak of what was slept on."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmsleep import ops
from lmsleep.layers.fast_weights import gates_of


class Recall(nn.Module):
    """Writes what it reads into fast weights, and recalls from those that earlier windows and passes left.

    Inside a window attention sees all, so the layer speaks only of what is no longer there: it reads `S` as
    it was when the window (or the pass over it) began, and what it writes is heard in the next. Where nothing
    was slept on it says nothing, and a frozen model around it computes what it did: the first pass over a
    first window needs no gradient.

    Heads are those of an attention, H of keys and values with G queries each, so they can begin as its
    projections. A token is written under a key that a short convolution mixes from it and the tokens before
    it: in `Anna has a red hat`, the token `red` is to be found by `Anna`. Without an open convolution that is
    a plateau (docs/pretrained.md).

    Args:
        d_model: width of the model.
        num_heads: H, heads of keys and values.
        groups: G, queries that read the same head.
        head_dim: K = V of a head.
        rule: update rule of `S`.
        bias: of q, k and v, as the attention has them.
        out_bias: of the output.

    Source of the delayed reading and of the initialisation: this project. The convolution on queries and keys
    as what makes recall learnable: Su, kexue.fm 11320; arXiv 2407.05591.
    """

    conv_size = 4

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        groups: int,
        head_dim: int,
        *,
        rule: str = "gated_delta_rule",
        bias: bool = False,
        out_bias: bool = False,
    ) -> None:
        super().__init__()
        self.rule, self.groups = rule, groups
        # What the gates of a rule ask of a layer.
        self.num_heads, self.key_dim, self.value_dim = num_heads, head_dim, head_dim
        self.beta_scale, self.forget = 1.0, (1e-4, 1e-2)
        kv = num_heads * head_dim
        self.q_proj = nn.Linear(d_model, groups * kv, bias=bias)
        self.k_proj = nn.Linear(d_model, kv, bias=bias)
        self.v_proj = nn.Linear(d_model, kv, bias=bias)
        self.o_proj = nn.Linear(groups * kv, d_model, bias=out_bias)
        self.conv = nn.Parameter(torch.empty((groups + 1) * kv, self.conv_size))  # of queries, then of keys
        self.gate = nn.Parameter(torch.zeros(num_heads * groups, 1))  # how loud each query speaks
        ops.find_rule(rule).gates.build(self, d_model)
        self.reset_gates()

    @torch.no_grad()
    def reset_gates(self) -> None:
        """Let nothing be said, and let keys and queries hold half of each of the three tokens before."""
        ops.find_rule(self.rule).gates.reset(self)
        self.gate.zero_()
        self.conv.fill_(0.5)
        self.conv[:, -1] = 1.0

    @property
    def memory_shape(self) -> tuple[int, int, int]:
        """The shape `(H, K, V)` of `S` for one sequence."""
        return self.num_heads, self.key_dim, self.value_dim

    def empty_cache(self, batch_size: int) -> tuple[Tensor, ...]:
        """Return the tail of the convolution before any token: `[B, 0, (G + 1) H K]`."""
        weight = self.q_proj.weight
        # Of sharded weights `new_empty` is sharded too.
        sizes = (batch_size, 0, self.conv.shape[0])
        return (torch.empty(sizes, dtype=weight.dtype, device=weight.device),)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None,
        cache: tuple[Tensor, ...],
        recalled: Tensor | None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor, tuple[Tensor, ...]]:
        """Read and write.

        Args:
            x: `[B, T, d]`.
            memory: `S` `[B, H, K, V]`, to be written to; None: zeros.
            cache: the tail of the convolution, `[B, t, (G + 1) H K]`.
            recalled: `S` as it was when the window began, which is read; None: `S` is read as it is written,
                as where a window slides and has no beginning.
            valid: `[B, T]` bool, False for padding at the end of a row, which writes nothing.

        Returns:
            What to add to the hidden states, `[B, T, d]`, None for nothing; the next `S` and tail.
        """
        T, W = x.shape[1], self.conv_size - 1
        # Nothing was slept on yet: nothing is said, whatever the weights are, and no query is needed but
        # those that later tokens convolve. On the device "meta", for costs, there may have been something.
        silent = recalled is not None and not recalled.is_meta and not bool(recalled.any())
        few = silent and valid is None
        q, k, v = self.q_proj(x[:, max(T - W, 0) :] if few else x), self.k_proj(x), self.v_proj(x)
        Q = q.shape[-1]
        tail = cache[0].to(k.dtype)
        conv = self.conv.to(k.dtype)
        k, k_tail = ops.short_conv(k, conv[Q:], tail[..., Q:], valid)
        if few:
            q_tail = torch.cat([tail[..., :Q], q], dim=1)
            q_tail = q_tail[:, max(q_tail.shape[1] - W, 0) :]
        else:
            q, q_tail = ops.short_conv(q, conv[:Q], tail[..., :Q], valid)
        # Unit keys make the delta rule a contraction; the usual eps, 1e-12, is zero in float16.
        k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in (k, v))
        k = F.normalize(k, dim=-1, eps=1e-6)
        g, beta = gates_of(self, x, valid)
        cache = (torch.cat([q_tail, k_tail], dim=-1),)
        if silent:
            return None, self._write(k, v, g, beta, memory), cache
        q = F.normalize(q.unflatten(-1, (self.num_heads, self.groups, -1)), dim=-1, eps=1e-6)
        if recalled is None:
            o, memory = self._inline(q, k, v, g, beta, memory)
        else:
            memory = self._write(k, v, g, beta, memory)
            o = torch.einsum("bthgk,bhkv->bthgv", q.to(recalled.dtype), recalled).flatten(2, 3)
        return self.o_proj((o * self.gate).flatten(2).to(x.dtype)), memory, cache

    def _write(self, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, memory: Tensor | None) -> Tensor:
        return ops.update(self.rule, torch.zeros_like(k), k, v, g, beta, initial_state=memory)[1]

    def _inline(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Read `S` as it is written; rules know one query a head, so each query gets a head of its own."""
        k, v, g, beta = (y.repeat_interleave(self.groups, dim=2) for y in (k, v, g, beta))
        S = None if memory is None else memory.repeat_interleave(self.groups, dim=1)
        o, S = ops.update(self.rule, q.flatten(2, 3), k, v, g, beta, scale=1.0, initial_state=S)
        return o, S[:, :: self.groups]
