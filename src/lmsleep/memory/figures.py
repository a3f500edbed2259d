"""Put memories into figures: norm and effective rank of every head, and how two memories differ in it."""

from typing import Any

import torch
from torch import Tensor

from lmsleep.state import Memory

Row = dict[str, Any]


def head_rows(memory: Memory) -> list[Row]:
    """List Frobenius norm and effective rank of `S` by block that has one, row of the batch, and head."""
    rows: list[Row] = []
    for block, S in enumerate(memory.S):
        if S is not None:
            alone = Memory((S,))  # blocks may differ in their number of heads
            figures = {"norm": alone.norms()[:, 0], "effective_rank": alone.effective_rank()[:, 0]}
            rows += _per_head(block, figures)
    return rows


def diff_rows(first: Memory, second: Memory) -> list[Row]:
    """List the norm of the difference of two `S` and their cosine, by block, row of the batch, and head.

    Raises:
        ValueError: if the two have not the same layout.
    """
    rows: list[Row] = []
    for block, difference in enumerate(first.diff(second).S):
        a, b = first.S[block], second.S[block]
        # `diff` refused other layouts: all three have an `S`, or none of them has.
        if difference is not None and a is not None and b is not None:
            # The matrix of a head as one vector, for the cosine that goes with the Frobenius norm.
            cosine = torch.cosine_similarity(a.flatten(2), b.flatten(2), dim=-1)
            rows += _per_head(block, {"difference": torch.linalg.matrix_norm(difference), "cosine": cosine})
    return rows


def other_rows(memory: Memory) -> list[Row]:
    """List shape and norm, over all rows of the batch, of the tensors that are not the `S` of their block."""
    return [
        {"block": block, "tensor": place, "shape": list(t.shape), "norm": float(t.norm())}
        for block, (tensors, S) in enumerate(zip(memory.parts, memory.S, strict=True))
        for place, t in enumerate(tensors)
        if t is not S  # the same object; == would compare number by number
    ]


def _per_head(block: int, figures: dict[str, Tensor]) -> list[Row]:
    """Make a row for each place of the `[B, H]` figures."""
    B, H = next(iter(figures.values())).shape
    return [
        {
            "row": row,
            "block": block,
            "head": head,
            **{name: float(x[row, head]) for name, x in figures.items()},
        }
        for row in range(B)
        for head in range(H)
    ]
