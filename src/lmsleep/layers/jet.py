"""JetBlock, the layer with fast weights of Jet-Nemotron."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmsleep import ops
from lmsleep.ops import Backend
from lmsleep.ops.rules.rule import log_spaced_forgetting


class JetBlock(nn.Module):
    """A gated delta rule whose values pass a convolution that each token makes for itself.

    Queries and keys are `silu(W x)` of unit norm, with no convolution. Values are convolved by a kernel per
    token and channel, `W_2 silu(W_1 x) + b_2`. Decay is `exp(-exp(A_log) softplus(W_a x + dt_bias))`, write
    strength `sigmoid(W_b x)`, and the output, normed per head, is gated by `silu(W_g x)`. Modules and
    parameters have the names of the published checkpoints.

    Args:
        d_model: width of the model.
        num_heads: heads H.
        key_dim: K of a head.
        value_dim: V of a head.
        conv_size: taps of the convolution.
        reduction: the generator of kernels has a hidden layer of `H V // reduction`.
        norm_eps: of the norm of the output.
        forget: log decay a token at the start, slowest and fastest head.
        backend: of the recurrence.

    Source: Gu et al., "Jet-Nemotron", arXiv 2508.15884, section 2.3.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        *,
        conv_size: int = 4,
        reduction: int = 8,
        norm_eps: float = 1e-5,
        forget: tuple[float, float] = (0.001, 0.1),
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.backend = backend
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim
        qk, vs = num_heads * key_dim, num_heads * value_dim
        self.q_proj = nn.Linear(d_model, qk, bias=False)
        self.k_proj = nn.Linear(d_model, qk, bias=False)
        self.v_proj = nn.Linear(d_model, vs, bias=False)
        self.g_proj = nn.Linear(d_model, vs, bias=False)  # gate of the output
        self.o_proj = nn.Linear(vs, d_model, bias=False)
        self.a_proj = nn.Linear(d_model, num_heads, bias=False)  # forgetting
        self.b_proj = nn.Linear(d_model, num_heads, bias=False)  # writing
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.dynamic_conv1d = _DynamicConv(d_model, vs, conv_size, reduction)
        self.o_norm = GatedRMSNorm(value_dim, norm_eps)
        log_spaced_forgetting(self.A_log, self.dt_bias, forget)

    @property
    def memory_shape(self) -> tuple[int, int, int]:
        """The shape `(H, K, V)` of `S` for one sequence."""
        return self.num_heads, self.key_dim, self.value_dim

    @property
    def conv_size(self) -> int:
        """The number of taps of the convolution."""
        return self.dynamic_conv1d.taps

    def empty_cache(self, batch_size: int) -> tuple[Tensor, ...]:
        """Return the tail of the convolution before any token: `[B, 0, H V]`."""
        weight = self.v_proj.weight
        # Of sharded weights `new_empty` is sharded too.
        sizes = (batch_size, 0, weight.shape[0])
        return (torch.empty(sizes, dtype=weight.dtype, device=weight.device),)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None,
        cache: tuple[Tensor, ...],
        valid: Tensor | None = None,
        span: int | None = None,
        filled: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Map `x` `[B, T, d]`, `S` `[B, H, K, V]` (None: zeros) and tail `[B, t, H V]` to the next ones.

        Tokens not `valid` (`[B, T]` bool, at the end of a row) write nothing.
        """
        del span, filled  # the state has no window, and convolutions read padding as the zeros it is
        q, k = (_unit(F.silu(y).unflatten(-1, (-1, self.key_dim))) for y in (self.q_proj(x), self.k_proj(x)))
        v, tail = self.dynamic_conv1d(self.v_proj(x), x, cache[0].to(x.dtype), valid)
        v = F.silu(v).unflatten(-1, (-1, self.value_dim))
        # Log decays add up over a whole stream, so they are made in float32; half precision would drift.
        g = -_exact(self.A_log).exp() * F.softplus(_exact(self.a_proj(x)) + _exact(self.dt_bias))
        beta = _exact(self.b_proj(x)).sigmoid()
        if valid is not None:
            # No decay and no write leave `S` as it is, bit for bit.
            g, beta = (y * valid[..., None] for y in (g, beta))
        o, memory = ops.gated_delta_rule(q, k, v, g, beta, initial_state=memory, backend=self.backend)
        o = self.o_norm(o, self.g_proj(x).unflatten(-1, (-1, self.value_dim)))
        return self.o_proj(o.flatten(2)), memory, (tail,)


class GatedRMSNorm(nn.Module):
    """`silu(gate) RMSNorm(x)` over the last dimension, computed in float32 or better."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Map `x` and a `gate` of its shape to the same shape, in the dtype of the gate."""
        y = F.rms_norm(_exact(x), x.shape[-1:], _exact(self.weight), self.eps)
        return (y * F.silu(_exact(gate))).to(gate.dtype)


class _DynamicConv(nn.Module):
    """`ops.dynamic_conv` with kernels from the tokens."""

    def __init__(self, d_model: int, channels: int, taps: int, reduction: int) -> None:
        super().__init__()
        self.taps = taps
        self.kernel_generator = _Generator(d_model, max(channels // reduction, 1), channels * taps)

    def forward(self, v: Tensor, x: Tensor, tail: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        return ops.dynamic_conv(v, self.kernel_generator(x).unflatten(-1, (-1, self.taps)), tail, valid)


class _Generator(nn.Module):
    def __init__(self, d_model: int, hidden: int, out: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(d_model, hidden, bias=False)
        self.w2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.w2(F.silu(self.w1(x)))
        return y


def _exact(x: Tensor) -> Tensor:
    # float64 stays float64: tests compare gradients with finite differences there.
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _unit(x: Tensor) -> Tensor:
    """Scale to unit L2 norm over the last dimension."""
    # 1e-6 under the root is what fla's kernels add; it also keeps a zero key zero instead of NaN.
    y = _exact(x)
    return (y * (y.square().sum(dim=-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)
