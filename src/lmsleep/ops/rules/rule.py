"""Define what an update rule is: its recurrence in up to three forms, the shapes it works on, and its gates.

Shapes: q, k `[B, T, H, K]`, v `[B, T, H, V]`, g (log decay, <= 0) and beta (write strength) `[B, T, H]` or as
the rule says, state `[B, H, K, V]` or as the rule says. The state is the transpose of the paper's `S` (fla's
layout): the paper's `S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T` reads
`S = exp(g) (I - beta k k^T) S + beta k v^T` here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Chunks sum log decays, and multiply them by masks: -inf would make NaN of both. e to this is 0 in float64
# too, so neither values nor gradients (of what is forgotten: 0) change.
NOTHING_LEFT = -750.0

Recurrence = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, Tensor], tuple[Tensor, Tensor]]


class Sizes(NamedTuple):
    """Shapes of a rule's tensors for one head of key size K and value size V.

    Attributes:
        g: shape of the log decay of a token: `()` where the whole head decays as one.
        beta: shape of the write strength of a token.
        state: `(rows, columns)` of `S`.
    """

    g: tuple[int, ...]
    beta: tuple[int, ...]
    state: tuple[int, int]


def head_sizes(K: int, V: int) -> Sizes:
    """Return the sizes for one decay and one write strength a head and token; `S` is `K x V`."""
    return Sizes((), (), (K, V))


class Gates(Protocol):
    """How a layer computes g and beta from its input `x` `[B, T, d]`.

    A layer (`layers.FastWeights`) has `num_heads`, `key_dim`, `value_dim`, `forget` and `beta_scale`; the
    gates add their parameters to it by names of their own, so they are saved and trained as the layer's.
    """

    def build(self, layer: Any, d_model: int) -> None:
        """Add the parameters to `layer`."""
        ...

    def reset(self, layer: Any) -> None:
        """Set them to their initial values."""
        ...

    def __call__(self, layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute `g` and `beta`, each `[B, T, H, ...]` as `Rule.sizes` says, in float32 or better."""
        ...


class HeadGates:
    """The gates of Gated DeltaNet, a number a head and token.

    `g = -exp(A_log) softplus(W_a x + dt_bias)`, `beta = beta_scale sigmoid(W_b x)`. Heads forget between
    `forget[0]` and `forget[1]` a token at first (log-spaced); beta starts at 0.73.
    """

    def build(self, layer: Any, d_model: int) -> None:
        """Add `a_proj`, `b_proj`, `A_log` and `dt_bias`."""
        layer.a_proj = nn.Linear(d_model, layer.num_heads, bias=False)  # forgetting
        layer.b_proj = nn.Linear(d_model, layer.num_heads, bias=True)  # writing
        layer.A_log = nn.Parameter(torch.empty(layer.num_heads))
        layer.dt_bias = nn.Parameter(torch.empty(layer.num_heads))

    def reset(self, layer: Any) -> None:
        """Set gates that do not depend on the input yet."""
        # The sigmoid of a bias of 1 is 0.73.
        layer.a_proj.weight.zero_()
        layer.b_proj.weight.zero_()
        layer.b_proj.bias.fill_(1.0)
        log_spaced_forgetting(layer.A_log, layer.dt_bias, layer.forget)

    def __call__(self, layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute `g` and `beta` `[B, T, H]`."""
        # From the projection on in the dtype of the parameters: a low one would round decays near 0, which
        # add up over a stream.
        dt = F.softplus(layer.a_proj(x).to(layer.dt_bias.dtype) + layer.dt_bias)
        g = -layer.A_log.exp() * dt
        return g, write_strength(layer, x)


def write_strength(layer: Any, x: Tensor) -> Tensor:
    """Compute `beta` `[B, T, H]`, up to the layer's `beta_scale`."""
    beta: Tensor = layer.beta_scale * layer.b_proj(x).to(layer.dt_bias.dtype).sigmoid()
    return beta


@torch.no_grad()
def log_spaced_forgetting(A_log: Tensor, dt_bias: Tensor, forget: tuple[float, float] = (0.001, 0.1)) -> None:
    """Set `A_log` to 0 and `dt_bias` `[..., n]` to forget from `forget[0]` to `forget[1]` a token along n."""
    low, high = map(math.log, forget)
    rate = torch.linspace(low, high, dt_bias.shape[-1]).exp()
    A_log.zero_()
    dt_bias.copy_(rate.expm1().log())  # softplus(dt_bias) = rate


def key_scale(K: int) -> float:
    """Return the factor on queries of unit norm that attention has too."""
    return K**-0.5


PER_HEAD = HeadGates()


@dataclass(frozen=True)
class Rule:
    """An update rule. Each form takes `(q, k, v, g, beta, scale, state)` and returns `(o, state)`.

    Shapes are those of `gated_delta_rule` unless `sizes` says otherwise. `g = beta = 0` must leave the state
    as it is: padding has both.

    Attributes:
        reference: token by token, any dtype; the definition.
        chunked: the same, chunk-parallel, for any device.
        fla: the same, on the Triton kernels of flash-linear-attention. It imports them when it is called:
            fla needs Triton just to be imported, and CPU users have none.
        gates: what a layer computes g and beta with.
        sizes: shapes of g, beta and the state for heads of size K and V.
        scale: the factor on queries for keys of size K, where the caller gives none.
    """

    reference: Recurrence
    chunked: Recurrence | None = None
    fla: Recurrence | None = None
    gates: Gates = PER_HEAD
    sizes: Callable[[int, int], Sizes] = head_sizes
    scale: Callable[[int], float] = key_scale
