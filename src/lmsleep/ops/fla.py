"""The recurrences on flash-linear-attention's Triton kernels (CUDA; the `cuda` extra).

fla is imported inside the functions: it needs Triton just to be imported, and CPU users have none.
"""

from torch import Tensor


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """`reference.gated_delta_rule` by `fla.ops.gated_delta_rule.chunk_gated_delta_rule`."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    o, final = chunk_gated_delta_rule(
        q, k, v, g, beta, scale=scale, initial_state=state, output_final_state=True
    )
    return o, final


def gated_linear_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """`reference.gated_linear_rule` by `fla.ops.simple_gla.chunk_simple_gla`, beta on the values."""
    from fla.ops.simple_gla import chunk_simple_gla

    o, final = chunk_simple_gla(
        q,
        k,
        v * beta[..., None].to(v.dtype),
        g=g,
        scale=scale,
        initial_state=state,
        output_final_state=True,
    )
    return o, final
