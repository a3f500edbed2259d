"""Offer the update rules of the fast weights, a file each, behind one signature.

`backend="auto"` takes fla's Triton kernels for CUDA tensors where `flash-linear-attention` is installed, and
elsewhere the chunk-parallel PyTorch form of a rule that has one.
"""

import importlib.util
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from lmsleep.ops.precision import exact
from lmsleep.ops.rules import gated_delta, gated_linear, kda, raven
from lmsleep.ops.rules.rule import NOTHING_LEFT, Recurrence, Rule
from lmsleep.plugins import Plugin

Backend = Literal["auto", "reference", "chunked", "fla"]

RULES: dict[str, Rule] = {
    "gated_delta_rule": gated_delta.RULE,
    "gated_linear_rule": gated_linear.RULE,
    "kda": kda.RULE,
    "raven": raven.RULE,
}


RULE = Plugin(
    what="rule",
    noun="object",
    group="lmsleep.rules",
    is_one=lambda x: isinstance(x, Rule),
    must_be="a lmsleep.ops.Rule",
)


def find_rule(name: str) -> Rule:
    """Find the update rule of that name in `RULES`, in a file (`FILE.py:NAME`) or of an entry point.

    Raises:
        ValueError: if there is none.
    """
    # The table is not cached: `register_rule` adds to it.
    return RULES[name] if name in RULES else _own_rule(name)


@cache  # a layer asks for its rule in every pass
def _own_rule(name: str) -> Rule:
    return RULE.find(name, RULES)


def register_rule(name: str, rule: Rule) -> None:
    """Make `rule` known by `name` in this process, as the kind of a block for `HybridConfig.blocks`.

    Other processes (workers, `--resume`, the command line) do not know the name; all of them find a rule by
    `FILE.py:NAME`.

    Raises:
        ValueError: if the name is taken.
    """
    if name in RULES:
        raise ValueError(f"there is already an update rule named {name!r}; choose another name")
    RULES[name] = rule


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Gated delta rule: `S = e^g (I - beta k k^T) S + beta k v^T`, `o = scale S^T q`.

    The conventions are those of flash-linear-attention's `chunk_gated_delta_rule`: keys are used as
    given (normalise them first) and `scale` multiplies the queries. Differentiable with respect to
    every tensor, `initial_state` included.

    Args:
        q: queries `[B, T, H, K]`, any floating dtype; any `T`, 0 included.
        k: keys `[B, T, H, K]`, of unit L2 norm for a contraction.
        v: values `[B, T, H, V]`.
        g: log decay `[B, T, H]`, at most 0; -inf forgets everything. A token with `g = beta = 0` leaves the
            state as it is.
        beta: write strength `[B, T, H]`, in (0, 1), or (0, 2) for negative eigenvalues.
        scale: factor on the queries; default `K ** -0.5`.
        initial_state: `S` before the first token, `[B, H, K, V]`; default zeros.
        backend: "reference" (token by token, the definition), "chunked" (PyTorch), "fla" (Triton)
            or "auto".

    Returns:
        Outputs `[B, T, H, V]` in the dtype of `v`, and the final state `[B, H, K, V]` in float32,
        or in float64 where an input is float64.

    Raises:
        ValueError: for shapes that do not fit, an unknown backend, or one that cannot run here.

    Source: Yang et al., "Gated Delta Networks", arXiv 2412.06464, eq. 10; the update of the paper's
    experiments.
    """
    return update(
        "gated_delta_rule", q, k, v, g, beta, scale=scale, initial_state=initial_state, backend=backend
    )


def gated_linear_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Gated Hebbian rule (Mamba-2 form): `S = e^g S + beta k v^T`, `o = scale S^T q`.

    Arguments, result and errors as for `gated_delta_rule`. Source: the paper's eq. 3.
    """
    return update(
        "gated_linear_rule", q, k, v, g, beta, scale=scale, initial_state=initial_state, backend=backend
    )


def update(
    rule: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Apply the update rule that `find_rule` finds.

    Arguments, result and errors as for `gated_delta_rule`, but for the shapes of `g`, `beta` and the state
    and for the default of `scale`, which are the rule's own (`Rule.sizes`, `Rule.scale`).
    """
    chosen = find_rule(rule)
    _check_shapes(chosen, q, k, v, g, beta, initial_state)
    B, _, H, K = q.shape
    inputs = (q, k, v, g, beta) if initial_state is None else (q, k, v, g, beta, initial_state)
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
    if initial_state is None:
        state = torch.zeros(B, H, *chosen.sizes(K, v.shape[-1]).state, dtype=dtype, device=q.device)
    else:
        state = initial_state.to(dtype)
    if scale is None:
        scale = chosen.scale(K)
    form, casts = _choose(rule, chosen, backend, q)
    if casts:  # fla's kernels take low precision as it is and accumulate in float32
        q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    else:  # in one dtype: CUDA's autocast norms q and k in float32
        q, k, g = q.to(v.dtype), k.to(v.dtype), g.clamp(min=NOTHING_LEFT)
    with exact(q.device):  # S is summed over a whole stream
        o, state = form(q, k, v, g, beta, scale, state)
    # `inputs` has v as it was given; `v` itself may have been cast.
    return o.to(inputs[2].dtype), state


def _choose(name: str, rule: Rule, backend: Backend, q: Tensor) -> tuple[Recurrence, bool]:
    """Choose the form of the rule, and say whether its inputs must be cast to the dtype of the state."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(get_args(Backend))}")
    # Looked for, not imported: fla needs Triton to be imported, and only its kernels are wanted.
    usable = q.is_cuda and importlib.util.find_spec("fla") is not None
    if backend == "fla" and not usable:
        raise ValueError(
            "backend='fla' needs CUDA tensors and flash-linear-attention (pip install 'lmsleep[cuda]'); "
            f"got tensors on {q.device.type!r}. Use backend='chunked'"
        )
    if backend == "auto":
        # float64 is asked for to check something, and the kernels would sum it in float32; where there is no
        # token at all, the PyTorch forms return the state as it is.
        kernels = rule.fla if usable and q.dtype != torch.float64 and q.shape[1] > 0 else None
        # Of one token a chunk is all preparation: the definition takes a third of the time.
        chunked = None if q.shape[1] == 1 else rule.chunked
        return kernels or chunked or rule.reference, kernels is None
    form: Recurrence | None = getattr(rule, backend)
    if form is None:
        raise ValueError(f"backend={backend!r}: {name} has no such form; use backend='auto' or 'reference'")
    return form, backend != "fla"


def _check_shapes(
    rule: Rule, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None
) -> None:
    if q.ndim != 4:
        raise ValueError(f"q must be [B, T, H, K], got shape {tuple(q.shape)}")
    B, T, H, K = q.shape
    V = v.shape[-1]
    sizes = rule.sizes(K, V)
    expected = {
        "k": (k, (B, T, H, K)),
        "v": (v, (B, T, H, V)),
        "g": (g, (B, T, H, *sizes.g)),
        "beta": (beta, (B, T, H, *sizes.beta)),
    }
    if initial_state is not None:
        expected["initial_state"] = (initial_state, (B, H, *sizes.state))
    for name, (x, shape) in expected.items():
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} must have shape {shape} to fit q, got {tuple(x.shape)}")
