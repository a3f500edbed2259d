"""Sums over earlier tokens where every channel of a head decays by itself, chunk by chunk, in plain PyTorch.

Token s is seen by token t with the factor `e^{g_{s+1} + ... + g_t}`, another one for every channel, so no single
`C x C` matrix holds the decays of a chunk of C tokens, and the textbook's `e^{G_t} e^{-G_s}` overflows for a
channel that forgets. Here a chunk is halved again and again: a token of a second half and one of the first
half meet on the middle between them, to which both decay (`e^{sum to the middle}`, at most 1), and their
product is one of matrices. Every pair meets once; log2(C) levels are all there is. Exponents are sums of what
lies between, never differences, so nothing cancels either.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LONGEST = 32  # tokens of a chunk; longer ones have more levels, shorter ones more states


def split(x: Tensor) -> Tensor:
    """`[B, T, H, D]` -> `[n, B H, C, D]`: n chunks of C tokens, a power of two; zeros are added at the end."""
    B, T, H, D = x.shape
    C = min(LONGEST, 1 << (T - 1).bit_length())
    n = -(-T // C)
    padded = F.pad(x, (0, 0, 0, 0, 0, n * C - T))
    return padded.view(B, n, C, H, D).permute(1, 0, 3, 2, 4).reshape(n, B * H, C, D)


def join(x: Tensor, B: int, T: int) -> Tensor:
    """`[n, B H, C, D]` -> `[B, T, H, D]`, the inverse of `split`."""
    return x.unflatten(1, (B, -1)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T]


@dataclass(frozen=True, eq=False)
class Decays:
    """Decays within chunks, from the log decays `g` `[..., C, K]`, C a power of two.

    Attributes:
        start: `[..., C, K]`, from before the chunk to each token.
        end: from each token to the end of the chunk.
        halves: of each level, from pairs of one token up: `(first, second)` `[..., m, h, K]`, from tokens of a
            first half to the middle, and from there to tokens of the second half.
    """

    start: Tensor
    end: Tensor
    halves: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, g: Tensor) -> "Decays":
        """The decays of log decays."""
        C = g.shape[-2]
        halves, h = [], 1
        while h < C:
            first, second = _halves(g, h)
            halves.append((_after(first), _up_to(second)))
            h *= 2
        return cls(_up_to(g), _after(g), halves)


def _up_to(g: Tensor) -> Tensor:
    """`e^{g_1 + ... + g_t}`."""
    return (_lower(g) @ g).exp()


def _after(g: Tensor) -> Tensor:
    """`e^{g_{t+1} + ... + g_C}`."""
    return (_lower(g, -1).mT @ g).exp()


def _lower(g: Tensor, diagonal: int = 0) -> Tensor:
    C = g.shape[-2]
    return g.new_ones(C, C).tril(diagonal)


def _halves(x: Tensor, h: int) -> tuple[Tensor, Tensor]:
    """First and second halves of all stretches of 2 h tokens: `[..., C, K]` -> twice `[..., m, h, K]`."""
    first, second = x.unflatten(-2, (-1, 2, h)).unbind(-3)
    return first, second


def products(a: Tensor, b: Tensor, decays: Decays) -> Tensor:
    """`P[t, s] = sum_c a_t[c] b_s[c] e^{g_{s+1}[c] + ... + g_t[c]}` for `s <= t`, else 0.

    `a` and `b` are `[..., C, K]`, the result `[..., C, C]`.
    """
    P = (a * b).sum(-1)[..., None, None]  # [..., m, h, h], blocks on the diagonal
    for first, second in decays.halves:
        h = P.shape[-1]
        across = (_halves(a, h)[1] * second) @ (_halves(b, h)[0] * first).mT
        upper, lower = P.unflatten(-3, (-1, 2)).unbind(-3)
        P = torch.cat([F.pad(upper, (0, h)), torch.cat([across, lower], -1)], -2)
    return P.squeeze(-3)


def sums(A: Tensor, b: Tensor, decays: Decays) -> Tensor:
    """`y_t[c] = sum_{s <= t} A[t, s] b_s[c] e^{g_{s+1}[c] + ... + g_t[c]}`.

    `A` is `[..., C, C]`, `b` and the result `[..., C, K]`.
    """
    y = A.diagonal(dim1=-2, dim2=-1)[..., None] * b
    for level, (first, second) in enumerate(decays.halves):
        h = 1 << level
        rows = A.unflatten(-2, (-1, 2, h)).unflatten(-1, (-1, 2, h))[..., :, 1, :, :, 0, :]
        across = rows.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)  # [..., m, h, h]
        into = second * (across @ (_halves(b, h)[0] * first))
        y = y + F.pad(into[..., None, :, :], (0, 0, 0, 0, 1, 0)).flatten(-4, -2)
    return y


def states(
    state: Tensor, decays: Decays, writes: Tensor, written: Callable[[int, Tensor], Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The states `[B H, K, V]` that precede the chunks, and the last one, one chunk after the other.

    Args:
        state: the first.
        decays: with a leading dimension of chunks.
        writes: `[n, B H, C, K]`, with what a token writes: `S` gains `writes^T u`.
        written: gives `u` `[B H, C, V]` of a chunk by its number and the state that precedes it.

    Returns:
        The states `[n + 1, B H, K, V]`, and the list of `u`.
    """
    S, starts, us = state, [state], []
    fading, ends = decays.start[..., -1, :, None], (writes * decays.end).mT
    for c in range(len(writes)):
        us.append(written(c, S))
        S = torch.baddbmm(fading[c] * S, ends[c], us[-1])
        starts.append(S)
    return torch.stack(starts), us
