"""Compute chunk-parallel recurrences whose heads decay as one, in plain PyTorch (CPU and any GPU).

Within a chunk of C tokens with cumulative log decay `G_t = g_1 + ... + g_t` and the state `S` that
precedes it, both rules leave `S_t = e^{G_t} S + sum_{s<=t} e^{G_t - G_s} k_s u_s^T`, where `u` are
the values that are really written: `u = beta v` for the linear rule, and for the delta rule the
solution of the unit lower triangular system

    u_t + beta_t sum_{s<t} e^{G_t - G_s} (k_t . k_s) u_s = beta_t (v_t - e^{G_t} S^T k_t)

(the WY form of arXiv 2406.06484, gated as in arXiv 2412.06464). Whatever does not need `S` is computed for
all chunks at once; then `u = U - W S` and the next `S` are three products a chunk, one chunk after the
other; then the outputs, again for all chunks. The backward pass is written out in the same three stages:
autograd would spend more on its many small steps than on the products.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmsleep.ops.precision import exact
from lmsleep.ops.rules.rule import NOTHING_LEFT


def in_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    state: Tensor,
    *,
    delta: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the gated delta rule, or without `delta` the gated linear one; arguments as of a `Rule`."""
    if not q.shape[:3].numel():  # no token, row or head
        return torch.zeros_like(v), state
    result: tuple[Tensor, Tensor] = _Chunked.apply(q, k, v, g, beta, state, scale, delta)  # type: ignore[no-untyped-call]
    return result


def chunks(T: int, K: int, V: int) -> tuple[int, int]:
    """Return the number of chunks and their length, equal for all so that little is padded.

    Longer chunks pay more for their C x C systems, shorter ones for their K x V states.
    """
    longest = max(32, 5 * (K + V) // 16)
    n = math.ceil(T / longest)
    return n, math.ceil(T / n)


class _Chunked(torch.autograd.Function):
    """Arguments as for the rules. Inside, tensors are `[n B H, C, ...]`, chunk by chunk.

    Products are arranged so that the right factor lies in memory untransposed (BLAS is up to three times
    slower where it does not), and masks are multiplied (`exp(-inf)` takes a slow path).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        S: Tensor,
        scale: float,
        delta: bool,
    ) -> tuple[Tensor, Tensor]:
        B, T, H, K = q.shape
        n, C = chunks(T, K, v.shape[-1])
        q, k, v, g, beta = (_split(x, n, C) for x in (q, k, v, g, beta[..., None]))
        g.clamp_(min=NOTHING_LEFT)  # a copy
        lower = torch.ones(C, C, dtype=S.dtype, device=S.device).tril()
        # e^{G_t - G_s}, s <= t; summing the terms between s and t does not cancel as G_t - G_s would
        decay = ((g[:, None] * lower) @ lower.tril(-1)).exp_().mul_(lower)
        start = g.cumsum(-1).exp_()[..., None]
        kT = k.mT.contiguous()
        # With beta=0 the first argument only lends its shape: this is scale q k^T, and then its decays.
        reads = torch.baddbmm(decay, q, kT, beta=0, alpha=scale).mul_(decay)
        # The last row of the decays leads to the end of the chunk, where the next state is made.
        writes, last = kT * decay[:, -1:], start[:, -1:]
        inverse = W = None
        if delta:
            A = (k @ kT).mul_(decay).mul_(beta)
            eye = lower.new_ones(C).diag()
            # Of I plus A below its diagonal: the solver reads neither the diagonal nor what is above.
            inverse = torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True)
            X = inverse * beta.mT
            u, W = X @ v, X.mul_(start.mT) @ k
        else:
            u = beta * v
        S, starts = S.flatten(0, 1), S.new_empty(n, B * H, *S.shape[2:])
        for c in range(n):
            us, writing, fading = (_chunk(x, c, n) for x in (u, writes, last))
            if W is not None:
                # A view of `u`: once its chunk is reached, `u` holds what is really written, U - W S.
                us.baddbmm_(_chunk(W, c, n), S, alpha=-1)
            starts[c] = S  # for the outputs of the chunk, and for the backward pass
            S = (fading * S).baddbmm_(writing, us)
        o = (q @ starts.flatten(0, 1)).mul_(scale * start).baddbmm_(reads, u)
        ctx.set_materialize_grads(False)  # an output that nobody used has None, which saves its products
        ctx.save_for_backward(q, k, v, beta, starts, S, u, decay, start, reads, writes, inverse, W)
        ctx.device, ctx.sizes = q.device, (B, T, H, n, scale)
        return _join(o, B, T, n), S.unflatten(0, (B, H))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dS: Tensor | None) -> tuple[Tensor | None, ...]:
        with exact(ctx.device):  # it may be called within autocast
            return _Chunked._gradients(ctx, do, dS)

    @staticmethod
    def _gradients(ctx: Any, do: Tensor | None, dS: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, beta, starts, S, u, decay, start, reads, writes, inverse, W = ctx.saved_tensors
        B, T, H, n, scale = ctx.sizes
        dq: Tensor | None = None
        if do is None:  # for the last pass of a sleep: nobody reads what it outputs
            du, dstarts = torch.zeros_like(u), torch.zeros_like(starts)
        else:
            do = _split(do, n, k.shape[1])
            start_do = do * (scale * start)
            du, dstarts = reads.mT @ do, (q.mT @ start_do).view_as(starts)
        dk, dG = torch.zeros_like(k), k.new_zeros(k.shape[:2])  # dG: gradient of every G_t
        dS = None if dS is None else dS.flatten(0, 1)
        # Backwards, with the gradient of the state behind chunk c in dS. All of it is written into views.
        for c in reversed(range(n)):
            us, dus, writing, fading = (_chunk(x, c, n) for x in (u, du, writes, start[:, -1:]))
            if dS is not None:  # None where the last state is dropped, as after an answer
                dus.baddbmm_(writing.mT, dS)
                torch.bmm(us, dS.mT, out=_chunk(dk, c, n))
                _chunk(dG, c, n)[:, -1] = (S * dS).sum((-1, -2))
                dstarts[c].addcmul_(fading, dS)
            if W is not None:
                dstarts[c].baddbmm_(_chunk(W, c, n).mT, dus, alpha=-1)
            S, dS = starts[c], dstarts[c]
        dk.mul_(decay[:, -1, :, None])
        ST, uT = starts.flatten(0, 1).mT, u.mT.contiguous()
        # A key is written with (dk) and, by the delta rule, read with (dread). What reads at t has the factor
        # e^{G_t}, what writes e^{-G_t}: hence the dot products. A chunk's last G fades its S too (above).
        if do is not None:
            dqk = (do @ uT).mul_(decay)
            dq = (start_do @ ST).baddbmm_(dqk, k, alpha=scale)
            dk.baddbmm_(dqk.mT, q, alpha=scale)
            dG += _dot(q, dq)
        if inverse is None:
            dv, dbeta = beta * du, _dot(du, v)
            dG -= _dot(k, dk)
        else:
            dr = inverse.mT @ du
            # Negative, as the derivative of an inverse is; only below the diagonal, where A is read.
            dA = (dr @ uT).mul_(decay).mul_(decay.new_full(decay.shape[1:], -1).tril_(-1))
            dread = (dr @ ST).mul_(-start).baddbmm_(dA, k)
            dk.baddbmm_(dA.mul_(beta).mT, k)
            dread_k = _dot(k, dread)
            dv, dbeta = beta * dr, _dot(dr, v) + dread_k
            dG += beta[..., 0] * dread_k - _dot(k, dk)
            dk.addcmul_(beta, dread)
        # g_t is part of G_t and of all later ones: a sum from the end.
        dg = dG.flip(-1).cumsum(-1).flip(-1)
        inputs = (None if x is None else _join(x, B, T, n) for x in (dq, dk, dv, dg, dbeta))
        return *inputs, dstarts[0].unflatten(0, (B, H)), None, None


def _split(x: Tensor, n: int, C: int) -> Tensor:
    """Split `[B, T, H, ...]` into `[n B H, C, ...]`, contiguous; padding (0) neither writes nor forgets."""
    B, T, H, *rest = x.shape
    whole = T // C
    # Filled with zeros only where some of it is padding.
    split = x.new_empty(n, B, H, C, *rest) if whole == n else x.new_zeros(n, B, H, C, *rest)
    tokens = split.movedim((0, 2), (1, 3))  # [B, n, C, H, ...]
    tokens[:, :whole] = x[:, : whole * C].unflatten(1, (whole, C))
    if whole < n:
        tokens[:, whole, : T - whole * C] = x[:, whole * C :]
    return split.flatten(0, 2)


def _join(x: Tensor, B: int, T: int, n: int) -> Tensor:
    """Invert `_split`, and drop the padding."""
    return x.unflatten(0, (n, B, -1)).movedim((0, 2), (1, 3)).flatten(1, 2)[:, :T]


def _chunk(x: Tensor, c: int, n: int) -> Tensor:
    """Return a view of chunk c of `[n B H, ...]`."""
    return x.unflatten(0, (n, -1))[c]


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Return the dot products along the last dimension."""
    return (x * y).sum(-1)
