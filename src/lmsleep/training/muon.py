"""Muon: momentum whose matrices are orthogonalised (Jordan et al., kellerjordan.github.io/posts/muon)."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Odd, so that it acts on the singular values alone. Five rounds push those near 1 and not to 1: steep at
# zero was chosen over exact, since an update needs no more than a direction.
A, B, C = 3.4445, -4.7750, 2.0315  # of the quintic a x + b x^3 + c x^5, steepest at zero
ITERATIONS = 5
MOMENTUM = 0.95
TOGETHER = 2**24  # most elements of the matrices that are orthogonalised at once


class Muon(Optimizer):
    """The update of `torch.optim.Muon` (its defaults), in the precision that the device is fast at.

    PyTorch's iterates in bfloat16 everywhere, one matrix at a time. Here it is bfloat16 on a GPU and float32
    on a CPU, few of which have instructions for less, unless the CPU is said to have them (`bfloat16`); and
    matrices of one shape go together.

    Matrices may be sharded (`DTensor`), and so are their momenta. A stack of one shape is gathered at once,
    in the precision of the iteration; each process makes all of it, and moves its own slices.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, weight_decay: float, *, bfloat16: bool = False
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.bfloat16 = bfloat16

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter `[m, n]` that has a gradient.

        Args:
            closure: computes the loss and its gradients anew; as for all optimizers of PyTorch.

        Returns:
            What `closure` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[Any, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    # One batched product for many small matrices, which must have one shape.
                    where = (getattr(p, "device_mesh", None), getattr(p, "placements", None))
                    alike[p.shape, p.dtype, p.device, where].append(p)
            for params in (some for same in alike.values() for some in _parts(same)):
                self._move(params, group)
        return loss

    def _move(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            # Made with the first gradient, unless `load_state_dict` has brought one.
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        # A copy: the Nesterov step below is taken in place and must leave `p.grad` as it is.
        grads = torch.stack([_local(p.grad) for p in params if p.grad is not None])
        momenta = [_local(self.state[p]["momentum_buffer"]) for p in params]
        for momentum, grad in zip(momenta, grads, strict=True):
            # Into the buffer of the state itself, which a checkpoint holds.
            momentum.lerp_(grad, 1 - MOMENTUM)
        steps = grads.lerp_(torch.stack(momenta), MOMENTUM)  # Nesterov
        directions = _directions(steps, params[0], self.bfloat16)
        m, n = params[0].shape
        for p, direction in zip(map(_local, params), directions.to(params[0].dtype), strict=True):
            # Decoupled, as AdamW's: the decay does not go through the momentum.
            p.mul_(1 - group["lr"] * group["weight_decay"])
            # The factor for tall matrices is that of torch.optim.Muon.
            p.add_(direction, alpha=-group["lr"] * math.sqrt(max(1, m / n)))


def _local(t: Tensor) -> Tensor:
    """Return the slice of a sharded tensor that this process holds, in its memory; any other as it is."""
    # Not by its class, whose import takes half a second of every run.
    return t.to_local() if hasattr(t, "to_local") else t


def _directions(steps: Tensor, like: Any, bfloat16: bool) -> Tensor:
    """Orthogonalise matrices `[k, m, n]`: of those that are sharded as `like`, take and return slices."""
    if not hasattr(like, "to_local"):
        return orthogonalised(steps, bfloat16)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh, shape = like.device_mesh, (len(steps), *like.shape)
    # In a stack the dimensions of a matrix come one later.
    stacked = [Shard(p.dim + 1) if isinstance(p, Shard) else p for p in like.placements]
    slices = DTensor.from_local(
        steps.to(_precision(steps, bfloat16)), mesh, stacked, run_check=False,
        shape=torch.Size(shape), stride=torch.empty(shape, device="meta").stride(),
    )  # fmt: skip
    whole = orthogonalised(slices.full_tensor(), bfloat16)
    return DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim).redistribute(mesh, stacked).to_local()


def orthogonalised(X: Tensor, bfloat16: bool = False) -> Tensor:
    """Return matrices `[k, m, n]` with singular values moved near 1: all but tiny ones to 0.7 ... 1.2."""
    X, tall = X.to(_precision(X, bfloat16)), X.shape[-2] > X.shape[-1]
    # The products are of the shorter side: `gram` is [k, s, s] with s = min(m, n).
    X = X.mT.contiguous() if tall else X
    # The Frobenius norm bounds the spectral norm: no singular value exceeds 1, where the quintic may diverge.
    # The clamp is for a gradient of zeros.
    X = X / torch.linalg.matrix_norm(X, keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        # a X + (b G + c G G) X with G = X X^T: the quintic, on all singular values at once.
        gram = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), X, beta=A)
    return X.mT if tall else X


def _precision(X: Tensor, bfloat16: bool) -> torch.dtype:
    # promote_types leaves float64 as it is, by which tests compare.
    return torch.bfloat16 if X.is_cuda or bfloat16 else torch.promote_types(X.dtype, torch.float32)


def _parts(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield lists of at most `TOGETHER` elements, or of one matrix."""
    some = max(1, TOGETHER // max(params[0].numel(), 1))
    return (params[i : i + some] for i in range(0, len(params), some))
