"""Chunk-parallel forms of the recurrences in plain PyTorch (CPU and any GPU).

Within a chunk of C tokens with cumulative log decay `G_t = g_1 + ... + g_t` and the state `S` that
precedes it, both rules leave `S_t = e^{G_t} S + sum_{s<=t} e^{G_t - G_s} k_s u_s^T`, where `u` are
the values that are really written: `u = beta v` for the linear rule, and for the delta rule the
solution of the unit lower triangular system

    u_t + beta_t sum_{s<t} e^{G_t - G_s} (k_t . k_s) u_s = beta_t (v_t - e^{G_t} S^T k_t)

(the WY form of arXiv 2406.06484, gated as in arXiv 2412.06464). Outputs and the next state are
then matrix products. The backward pass is written out: for the short windows of a sleep autograd
would spend more on its many small steps than on the products.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 64  # tokens; longer chunks pay more for the C x C systems than they save in steps


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Chunk-parallel `reference.gated_delta_rule`; same arguments, same result."""
    return _chunked(q, k, v, g, beta, scale, state, delta=True)


def gated_linear_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Chunk-parallel `reference.gated_linear_rule`; same arguments, same result."""
    return _chunked(q, k, v, g, beta, scale, state, delta=False)


def _chunked(
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
    if q.shape[1] == 0:
        return torch.zeros_like(v), state
    B, _, H, _ = q.shape
    # [B, T, H, ...] -> [B H, T, ...], once: every product below would otherwise copy its operands
    q, k, v, g, beta = (x.transpose(1, 2).flatten(0, 1) for x in (scale * q, k, v, g, beta))
    state, outputs = state.flatten(0, 1), []
    for qc, kc, vc, gc, bc in zip(*(x.split(CHUNK, dim=1) for x in (q, k, v, g, beta)), strict=True):
        o, state = _Chunk.apply(qc, kc, vc, gc, bc[..., None], state, delta)  # type: ignore[no-untyped-call]
        outputs.append(o)
    o = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return o.unflatten(0, (B, H)).transpose(1, 2), state.unflatten(0, (B, H))


class _Chunk(torch.autograd.Function):
    """One chunk: `q, k` `[B H, C, K]`, `v` `[B H, C, V]`, `g` `[B H, C]`, `beta` `[B H, C, 1]`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, S: Tensor, delta: bool
    ) -> tuple[Tensor, Tensor]:
        C = g.shape[-1]
        # Differences of a long cumulative sum cancel badly in float32 when the gates forget hard.
        G = g.double().cumsum(-1)[..., None]
        later = torch.ones(C, C, dtype=torch.bool, device=g.device).triu(1)
        decay = (G - G.mT).to(S.dtype).masked_fill_(later, -torch.inf).exp_()  # e^{G_t - G_s}, s <= t
        start, end = G.to(S.dtype).exp(), (G[:, -1:] - G).to(S.dtype).exp()
        qk, qS = q @ k.mT, q @ S
        kk = kS = inverse = None
        if delta:
            kk, kS = k @ k.mT, k @ S
            eye = torch.eye(C, dtype=S.dtype, device=S.device)
            A = (beta * kk).mul_(decay).tril_(-1)
            inverse = torch.linalg.solve_triangular(A.add_(eye), eye, upper=False, unitriangular=True)
            u = inverse @ torch.addcmul(v, start, kS, value=-1).mul_(beta)
        else:
            u = beta * v
        reads, writes = qk * decay, k * end
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            q, k, v, beta, S, u, decay, start, end, reads, writes, qk, qS, kk, kS, inverse
        )  # fmt: skip
        return torch.baddbmm(start * qS, reads, u), torch.baddbmm(start[:, -1:] * S, writes.mT, u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dS_next: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, beta, S, u, decay, start, end, reads, writes, qk, qS, kk, kS, inverse = ctx.saved_tensors
        dq: Any = None
        dk: Any = None
        dS: Any = None
        du = dlog = None  # dlog: gradient of every G_t - G_s
        dG = k.new_zeros(k.shape[:-1])
        if do is not None:  # None for the last pass of a sleep: nobody reads what it outputs
            start_do = start * do
            dqk = (do @ u.mT).mul_(decay)
            du, dk, dS = reads.mT @ do, dqk.mT @ q, q.mT @ start_do
            dq = torch.baddbmm(start_do @ S.mT, dqk, k)
            dlog = dqk.mul_(qk)
            dG += start_do.mul_(qS).sum(-1)
        if dS_next is not None:  # None where the state is dropped, as after an answer
            last = start[:, -1:]
            dwrites = (u @ dS_next.mT).mul_(end)
            dend = (dwrites * k).sum(-1)
            dG -= dend
            dG[:, -1] += dend.sum(-1) + (last * S).mul_(dS_next).sum((-1, -2))
            du = writes @ dS_next if du is None else torch.baddbmm(du, writes, dS_next)
            dk = dwrites if dk is None else dk.add_(dwrites)
            dS = last * dS_next if dS is None else dS.addcmul_(last, dS_next)
        if inverse is None:
            dv, dbeta = beta * du, (du * v).sum(-1, keepdim=True)
        else:
            dr = inverse.mT @ du
            dA = (dr @ u.mT).neg_().tril_(-1).mul_(decay)
            dbeta = (dr * torch.addcmul(v, start, kS, value=-1)).sum(-1, keepdim=True)
            dbeta += (dA * kk).sum(-1, keepdim=True)
            dv, dkk = beta * dr, dA.mul_(beta)
            dkS = (start * dv).neg_()
            dk = torch.baddbmm(torch.baddbmm(dk, dkS, S.mT), dkk + dkk.mT, k)
            dS = torch.baddbmm(dS, k.mT, dkS)
            dG += dkS.mul_(kS).sum(-1)
            dkk.mul_(kk)
            dlog = dkk if dlog is None else dlog.add_(dkk)
        if dlog is not None:
            dG += dlog.sum(-1) - dlog.sum(-2)
        return dq, dk, dv, dG.flip(-1).cumsum(-1).flip(-1), dbeta, dS, None
