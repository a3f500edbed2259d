"""Documents into batches: one a row, so that none reads another; alike in length, to pad little."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

POOL = 8  # batches' worth of documents among which similar ones are found


def alike(
    rng: np.random.Generator, lengths: np.ndarray, size: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """Draw the numbers `[size]` of documents that are about equally long.

    A pool is drawn by `weights`, sorted by length and cut into groups; one of the groups is taken. So each
    document is as likely as its weight says, but long ones come together.
    """
    pool = rng.choice(len(lengths), POOL * size, p=None if weights is None else weights / weights.sum())
    # Stable: documents of one length stay in the order of the draw, on every platform.
    pool = pool[np.argsort(lengths[pool], kind="stable")]
    group = int(rng.integers(POOL))
    return pool[group * size : (group + 1) * size]


def pad(rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor | None]:
    """Stack rows into `[R, T]` int64, padded on the right with 0, and return their lengths `[R]` too.

    Rows of one length need no padding (None). Otherwise T is rounded up by at most an eighth: few shapes
    occur, and each costs a pass that counts its FLOPs.
    """
    lengths = np.array([len(row) for row in rows])
    T = int(lengths.max())
    if (lengths == T).all():
        return torch.from_numpy(np.stack(rows).astype(np.int64)), None
    # A sixteenth to an eighth of T, as T lies between two powers of two.
    step = 1 << max(T.bit_length() - 4, 0)
    tokens = np.zeros((len(rows), -(-T // step) * step), dtype=np.int64)
    for row, source in zip(tokens, rows, strict=True):
        row[: len(source)] = source
    return torch.from_numpy(tokens), torch.from_numpy(lengths)


def is_real(tokens: Tensor, lengths: Tensor | None) -> Tensor:
    """Return a mask `[R, T]`, bool: True where `tokens` are no padding."""
    if lengths is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    return torch.arange(tokens.shape[1]) < lengths[:, None]
