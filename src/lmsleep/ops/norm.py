"""Normalisations whose backward pass is written out where PyTorch has no kernel for them, on a CPU.

Autograd takes them apart into a dozen passes over memory; written out they take a third of the time,
which is a tenth of a training step (docs/performance.md). Elsewhere PyTorch's own are used.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmsleep.ops.precision import exact


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension (Zhang & Sennrich, arXiv 1910.07467).

    Args:
        x: `[..., d]`, any floating dtype.
        weight: `[d]`.
        eps: added to the mean square.
    """
    if not _written_out(x, weight):
        return F.rms_norm(x, weight.shape, weight, eps)
    y: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


def unit_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x / max(|x|, eps)`, vectors of L2 norm 1 along the last dimension; `x` `[..., d]`, any float dtype."""
    if not _written_out(x):
        return F.normalize(x, dim=-1, eps=eps)
    y: Tensor = _UnitNorm.apply(x, eps)  # type: ignore[no-untyped-call]
    return y


def _written_out(*inputs: Tensor) -> bool:
    x = inputs[0]
    exact_enough = x.dtype in {torch.float32, torch.float64}
    return x.device.type == "cpu" and exact_enough and all(y.dtype == x.dtype for y in inputs)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        ctx.eps = eps
        return (x * r).mul_(weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted, as by test-time training
            again = F.rms_norm(x, weight.shape, weight, ctx.eps)
            wanted = [y for y in (x, weight) if y.requires_grad]
            gradients = iter(torch.autograd.grad(again, wanted, dy, create_graph=True))
            return *(next(gradients) if y.requires_grad else None for y in (x, weight)), None
        with exact(x.device):  # it may be called within autocast
            along = (dy * x).reshape(-1, x.shape[-1])
            dweight = (r.reshape(1, -1) @ along)[0]
            c = (along @ weight).view_as(r).mul_(r**3).div_(-x.shape[-1])
        return (dy * weight).mul_(r).addcmul_(x, c), dweight, None


class _UnitNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        long, norm = norm > eps, norm.clamp_(min=eps)
        y = x / norm
        ctx.save_for_backward(x, y, norm, long)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        x, y, norm, long = ctx.saved_tensors
        if torch.is_grad_enabled():
            again = F.normalize(x, dim=-1, eps=ctx.eps)
            return torch.autograd.grad(again, x, dy, create_graph=True)[0], None
        c = (dy * y).sum(-1, keepdim=True).mul_(long).neg_()  # a short vector is only scaled, by 1 / eps
        return torch.addcmul(dy, y, c).div_(norm), None
