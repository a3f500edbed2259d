"""The layer with fast weights: projections and gates around an update rule."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmsleep import ops
from lmsleep.ops import Backend


class Writes(NamedTuple):
    """Holds the tensors that each token reads and writes `S` with.

    Attributes:
        q: queries `[B, T, H, K]`, of unit norm.
        k: keys `[B, T, H, K]`, of unit norm.
        v: values `[B, T, H, V]`.
        g: log decay `[B, T, H]`: a token forgets a share `1 - exp(g)` of `S`; `[B, T, H, rows]` by a rule
            that forgets each row of `S` by itself.
        beta: write strength `[B, T, H]`, or likewise one a row.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor


class FastWeights(nn.Module):
    """Writes what it reads into a matrix state `S` per head by a learned local rule.

    With `rule="gated_delta_rule"` this is the Gated DeltaNet layer (arXiv 2412.06464): keys and
    queries of unit norm, a short convolution with SiLU on q, k and v, decay
    `alpha = exp(-A softplus(W_a x + dt))`, write strength `beta = sigmoid(W_b x)`, and a gated RMS norm
    on the output. Any other rule of `ops.find_rule` takes its place, with its own gates and shape of `S`; the
    rest of the layer stays.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        *,
        rule: str,
        conv_size: int,
        conv_init: float,
        forget: tuple[float, float],
        negative_eigenvalues: bool,
        norm_eps: float,
        backend: Backend,
    ) -> None:
        super().__init__()
        self.rule, self.backend = rule, backend
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim
        self.beta_scale = 2.0 if negative_eigenvalues else 1.0
        self.forget, self.conv_init = forget, conv_init
        qk, vs = num_heads * key_dim, num_heads * value_dim
        self.q_proj = nn.Linear(d_model, qk, bias=False)
        self.k_proj = nn.Linear(d_model, qk, bias=False)
        self.v_proj = nn.Linear(d_model, vs, bias=False)
        self.g_proj = nn.Linear(d_model, vs, bias=False)  # gate of the output
        self.o_proj = nn.Linear(vs, d_model, bias=False)
        # The gates bring parameters of their own, which are saved and trained as the layer's.
        gates = ops.find_rule(rule).gates
        gates.build(self, d_model)
        # Queries, keys and values lie side by side: one convolution for all, one kernel a channel.
        self.conv = nn.Parameter(torch.empty(2 * qk + vs, conv_size)) if conv_size > 0 else None
        self.norm = nn.RMSNorm(value_dim, eps=norm_eps)  # every head by itself, with the same weights
        self.reset_gates()

    @torch.no_grad()
    def reset_gates(self) -> None:
        """Set the gates to what the rule begins with, older taps of the convolution to `conv_init`."""
        ops.find_rule(self.rule).gates.reset(self)
        if self.conv is not None:
            # The last tap is that of the current token. From the identity (0), a loop starts as a refinement.
            self.conv.fill_(self.conv_init)
            self.conv[:, -1] = 1.0

    @property
    def memory_shape(self) -> tuple[int, int, int]:
        """Return the shape of `S` for one sequence: `(H, K, V)`, or `H` and what the rule says."""
        return self.num_heads, *ops.find_rule(self.rule).sizes(self.key_dim, self.value_dim).state

    def empty_cache(self, batch_size: int) -> tuple[Tensor, ...]:
        """Return the tail of the short convolution before any token: `[B, 0, channels]`, no time steps."""
        if self.conv is None:
            return ()
        # Of sharded weights `new_empty` is sharded too.
        sizes = (batch_size, 0, self.conv.shape[0])
        return (torch.empty(sizes, dtype=self.conv.dtype, device=self.conv.device),)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None,
        cache: tuple[Tensor, ...],
        valid: Tensor | None,
        span: int | None,
        filled: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """Map `x` `[B, T, d]` and `S` `[B, H, K, V]` to the next; tokens not `valid` write nothing."""
        del span, filled  # the state has no window, and convolutions read padding as the zeros it is
        writes, cache = self.writes(x, cache, valid)
        o, memory = ops.update(self.rule, *writes, initial_state=memory, backend=self.backend)
        # Normed while heads are still apart (`[B, T, H, V]`), then gated and joined.
        o = self.norm(o).flatten(2) * F.silu(self.g_proj(x))
        return self.o_proj(o), memory, cache

    def writes(
        self, x: Tensor, cache: tuple[Tensor, ...], valid: Tensor | None
    ) -> tuple[Writes, tuple[Tensor, ...]]:
        """Return what the tokens `x` `[B, T, d]` read and write with, and the next cache; see `forward`."""
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        if self.conv is not None:
            # In the dtype of the projections: under autocast it is not that of the parameters, and a tail may
            # have been left by a pass without autocast.
            qkv, tail = ops.short_conv(qkv, self.conv.to(qkv.dtype), cache[0].to(qkv.dtype), valid)
            cache = (tail,)
        qk, vs = self.num_heads * self.key_dim, self.num_heads * self.value_dim
        q, k, v = F.silu(qkv).split((qk, qk, vs), dim=-1)
        # Keys of unit norm make the delta rule a contraction. The usual eps, 1e-12, is zero in float16,
        # where a key of zeros would become NaN.
        q, k = (F.normalize(y.unflatten(-1, (-1, self.key_dim)), dim=-1, eps=1e-6) for y in (q, k))
        v = v.unflatten(-1, (-1, self.value_dim))
        return Writes(q, k, v, *gates_of(self, x, valid)), cache


def gates_of(layer: Any, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return log decay and write strength of the tokens `x` `[B, T, d]` by the gates of a layer's rule.

    Tokens that are not `valid` (`[B, T]` bool; None: all are) neither forget nor write.
    """
    g, beta = ops.find_rule(layer.rule).gates(layer, x)
    if valid is not None:
        # No decay and no write leave `S` as it is, bit for bit.
        g, beta = (y * valid.view(*valid.shape, *[1] * (y.ndim - 2)) for y in (g, beta))
    return g, beta
