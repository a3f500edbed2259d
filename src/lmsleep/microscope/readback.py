"""Key readback: which tokens of an evicted window can still be retrieved from the fast weights."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lmsleep.microscope.heads import mean
from lmsleep.microscope.seen import Row
from lmsleep.microscope.trace import Window
from lmsleep.state import Memory


def readback(S: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Query `S` with the key that each token wrote, and compare what is read with the value it wrote.

    What is read is `r_t = S^T k_t`; `S` is `[B, H, K, V]`, keys `[B, L, H, K]`, values `[B, L, H, V]`.

    Returns:
        The cosine of `r_t` and `v_t`, `[B, L, H]`, and its rank among the values of the window: 1 + the
        number of values whose cosine with `r_t` is larger. Rank 1 is a retrieval; a token that wrote what
        another one wrote shares its rank. Where nothing is read (`r_t = 0`) the cosine is 0, the rank L.
    """
    # Ranks compare cosines that may differ in their last digits.
    S, k, v = (x.to(torch.float64) for x in (S, k, v))
    read = torch.einsum("bhkv,blhk->blhv", S, k)
    # 1e-300 turns 0 / 0 into 0 and changes no other float64.
    unit = [x / x.norm(dim=-1, keepdim=True).clamp(min=1e-300) for x in (read, v)]
    # What token i reads against what token j wrote; the diagonal is a token with itself.
    cosines = torch.einsum("bihv,bjhv->bhij", *unit)
    own = cosines.diagonal(dim1=-2, dim2=-1)
    rank = 1 + (cosines > own[..., None] + 1e-9).sum(-1)  # equal values differ by rounding
    rank = rank.masked_fill(read.norm(dim=-1).transpose(1, 2) == 0, v.shape[1])
    return own.transpose(1, 2), rank.transpose(1, 2)


def readback_rows(
    windows: Sequence[tuple[int, Window]], end: Memory, spell: Callable[[list[int]], str]
) -> Iterator[Row]:
    """Yield a row for every token of `windows` (with their numbers), block and head, means over the batch.

    Keys and values are those of the window's last pass. `cosine`, `rank` and `retrieved` (the share of rank
    1) query `S` after that pass; `cosine_end` and `retrieved_end` query `end`, what later windows left.
    `token` and `text` are None where the rows of the batch differ in the token. Blocks whose `S` is no matrix
    of `K x V` (but of slots) are left out.
    """
    for number, window in windows:
        last = window.passes[-1]
        for block, writes in last.writes.items():
            S, S_end = last.memory.S[block], end.S[block]
            assert S is not None and S_end is not None
            if S.shape[2:] != (writes.k.shape[-1], writes.v.shape[-1]):
                continue
            cosine, rank = readback(S, writes.k, writes.v)
            cosine_end, rank_end = readback(S_end, writes.k, writes.v)
            columns = {
                "cosine": cosine,
                "rank": rank.double(),
                "retrieved": (rank == 1).double(),
                "cosine_end": cosine_end,
                "retrieved_end": (rank_end == 1).double(),
            }
            for place, token in enumerate(window.tokens.T):
                same = bool((token == token[0]).all())
                named = {
                    "token": int(token[0]) if same else None,
                    "text": spell([int(token[0])]) if same else None,
                }
                for head in range(S.shape[1]):
                    figures = {name: mean(x[:, place, head]) for name, x in columns.items()}
                    yield {"window": number, "place": place, **named, "block": block, "head": head, **figures}
