"""Sum over earlier tokens where every channel of a head decays by itself, chunk by chunk, in plain PyTorch.

Token s is seen by token t with the factor `e^{g_{s+1} + ... + g_t}`, another one for every channel, so no
single `C x C` matrix holds the decays of a chunk of C tokens, and the textbook's `e^{G_t} e^{-G_s}` overflows
for a channel that forgets. Here a chunk is halved again and again: a token of a second half and one of the
first half meet on the middle between them, to which both decay (by a factor of at most 1), and what they give
is a product of matrices. Every pair meets once; log2(C) levels are all there is. Exponents are sums of what
lies between, never differences, so nothing cancels either.

The gradient of a log decay needs none of the factors: what reads at t has the factor `e^{G_t}`, what writes
`e^{-G_t}`, so that of `G_t = g_1 + ... + g_t` is the product of each with its own gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmsleep.ops.precision import exact

LONGEST = 32  # tokens of a chunk; longer ones have more levels, shorter ones more states


def split(x: Tensor) -> Tensor:
    """Split `[B, T, H, D]` into `[n, B H, C, D]`: n chunks of C (a power of two) tokens, zeros at the end."""
    B, T, H, D = x.shape
    # The least power of two that holds T: a short sequence is one chunk, with few levels. Zeros at the end
    # neither write nor forget, so the state behind them is that of the last token.
    C = min(LONGEST, 1 << (T - 1).bit_length())
    n = -(-T // C)
    padded = F.pad(x, (0, 0, 0, 0, 0, n * C - T))
    return padded.view(B, n, C, H, D).permute(1, 0, 3, 2, 4).reshape(n, B * H, C, D)


def join(x: Tensor, B: int, T: int) -> Tensor:
    """Join `[n, B H, C, D]` to `[B, T, H, D]`, without the padding: the inverse of `split`."""
    return x.unflatten(1, (B, -1)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T]


@dataclass(frozen=True, eq=False)
class Decays:
    """Decays within chunks.

    Attributes:
        g: log decays `[..., C, K]`, C a power of two.
        start: `[..., C, K]`, from before the chunk to each token.
        end: from each token to the end of the chunk.
        levels: `[..., log2(C), C, K]`: in stretches of 2, 4, ... C tokens, from those of the first half to
            the middle, and from there to those of the second half. Constants: they have no gradient.
    """

    g: Tensor
    start: Tensor
    end: Tensor
    levels: Tensor

    @classmethod
    def of(cls, g: Tensor) -> "Decays":
        """Compute the decays of log decays `[..., C, K]`."""
        C = g.shape[-2]
        places = torch.arange(C, device=g.device)
        t, r = places[:, None], places
        # A row for each level: half a stretch is 1, 2, 4, ... tokens; that of token t is halved at `middle`.
        half = 1 << torch.arange(C.bit_length() - 1, device=g.device)[:, None, None]
        middle = t // (2 * half) * 2 * half + half
        between = torch.where(t < middle, (t < r) & (r < middle), (middle <= r) & (r <= t))  # [levels, C, C]
        # Detached: `products` and `sums` know the gradient of g from their own inputs and outputs.
        to_levels = _sums(between.flatten(0, 1), g.detach()).exp().unflatten(-2, (-1, C))
        start, end = _sums(torch.cat([r <= t, r > t]), g).exp().split(C, -2)
        return cls(g, start, end, to_levels)


def _sums(which: Tensor, g: Tensor) -> Tensor:
    """Sum the `g` `[..., C, K]` that each row of `which` `[R, C]` marks: `[..., R, K]`."""
    return (g.mT @ which.mT.to(g.dtype)).mT  # in this order one product, not one per chunk


def products(a: Tensor, b: Tensor, decays: Decays) -> Tensor:
    """Compute `P[t, s] = sum_c a_t[c] b_s[c] e^{g_{s+1}[c] + ... + g_t[c]}` for `s <= t`, else 0.

    `a` and `b` are `[..., C, K]`, the result `[..., C, C]`.
    """
    P: Tensor = _Products.apply(a, b, decays.g, decays.levels)  # type: ignore[no-untyped-call]
    return P


def sums(A: Tensor, b: Tensor, decays: Decays) -> Tensor:
    """Compute `y_t[c] = sum_{s <= t} A[t, s] b_s[c] e^{g_{s+1}[c] + ... + g_t[c]}`.

    `A` is `[..., C, C]`, `b` and the result `[..., C, K]`.
    """
    y: Tensor = _Sums.apply(A, b, decays.g, decays.levels)  # type: ignore[no-untyped-call]
    return y


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, g: Tensor, levels: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, levels)
        P = a.new_zeros(*a.shape[:-1], a.shape[-2])
        # A token meets itself without any decay; pairs of different tokens meet at one level each.
        P.diagonal(dim1=-2, dim2=-1).copy_((a * b).sum(-1))
        for level, factors in enumerate(levels.unbind(-3)):
            (b_first, _), (_, a_second) = _halves(b, level), _halves(a, level)
            first, second = _halves(factors, level)
            _across(P, level).copy_((a_second * second) @ (b_first * first).mT)
        return P

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dP: Tensor) -> tuple[Tensor | None, ...]:
        with exact(dP.device):  # it may be called within autocast
            return _Products._gradients(ctx, dP)

    @staticmethod
    def _gradients(ctx: Any, dP: Tensor) -> tuple[Tensor | None, ...]:
        a, b, levels = ctx.saved_tensors
        diagonal = dP.diagonal(dim1=-2, dim2=-1)[..., None]
        da, db = diagonal * b, diagonal * a
        for level, factors in enumerate(levels.unbind(-3)):
            (b_first, _), (_, a_second) = _halves(b, level), _halves(a, level)
            first, second = _halves(factors, level)
            dX = _across(dP, level).contiguous()  # for two products, each of which would copy the view
            _halves(da, level)[1].addcmul_(dX @ (b_first * first), second)
            _halves(db, level)[0].addcmul_(dX.mT @ (a_second * second), first)
        # What reads has the factor e^{G_t}, what writes e^{-G_t}: hence the signs.
        return da, db, _from_ends(a * da - b * db), None


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor, b: Tensor, g: Tensor, levels: Tensor) -> Tensor:
        y = A.diagonal(dim1=-2, dim2=-1)[..., None] * b
        for level, factors in enumerate(levels.unbind(-3)):
            first, second = _halves(factors, level)
            read = _across(A, level).contiguous() @ (_halves(b, level)[0] * first)
            _halves(y, level)[1].addcmul_(read, second)
        ctx.save_for_backward(A, b, levels, y)  # y for the gradient of g
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with exact(dy.device):
            return _Sums._gradients(ctx, dy)

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        A, b, levels, y = ctx.saved_tensors
        dA = torch.zeros_like(A)
        dA.diagonal(dim1=-2, dim2=-1).copy_((dy * b).sum(-1))
        db = A.diagonal(dim1=-2, dim2=-1)[..., None] * dy
        for level, factors in enumerate(levels.unbind(-3)):
            first, second = _halves(factors, level)
            dread = _halves(dy, level)[1] * second
            _across(dA, level).copy_(dread @ (_halves(b, level)[0] * first).mT)
            _halves(db, level)[0].addcmul_(_across(A, level).contiguous().mT @ dread, first)
        return dA, db, _from_ends(dy * y - b * db), None


def _halves(x: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """Return views of both halves of all stretches of 2^(level + 1) tokens, `[..., m, h, K]` each."""
    first, second = x.unflatten(-2, (-1, 2, 1 << level)).unbind(-3)
    return first, second


def _across(P: Tensor, level: int) -> Tensor:
    """View `P` `[..., C, C]` where rows of second halves meet columns of first ones: `[..., m, h, h]`."""
    h = 1 << level
    stretches = P.unflatten(-1, (-1, 2, h)).unflatten(-4, (-1, 2, h))  # [..., m, 2, h, m, 2, h]
    return stretches[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _from_ends(dG: Tensor) -> Tensor:
    """Return the gradient of every `g_t` from those of the `G_t`, its sums up to t."""
    # g_t is part of G_t and of all later ones: a sum from the end.
    return dG.flip(-2).cumsum(-2).flip(-2)


def states(
    state: Tensor, decays: Decays, writes: Tensor, written: Callable[[int, Tensor], Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Compute the states `[B H, K, V]` that precede the chunks, and the last one, one chunk after the other.

    Args:
        state: the first.
        decays: with a leading dimension of chunks.
        writes: `[n, B H, C, K]`, with what a token writes: `S` gains `writes^T u`.
        written: gives `u` `[B H, C, V]` of a chunk by its number and the state that precedes it.

    Returns:
        The states `[n + 1, B H, K, V]`, and the list of `u`.
    """
    S, starts, us = state, [state], []
    # From before the chunk to its last token: the decay of the whole chunk.
    fading, ends = decays.start[..., -1, :, None], (writes * decays.end).mT
    for c in range(len(writes)):
        us.append(written(c, S))
        S = torch.baddbmm(fading[c] * S, ends[c], us[-1])
        starts.append(S)
    return torch.stack(starts), us
