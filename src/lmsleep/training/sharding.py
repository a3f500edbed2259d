"""Parameters shared out over processes: each keeps a slice of all, gathered for a step and freed after it."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, UnshardHandle, fully_shard

from lmsleep.training.objective import Objective


class Shards(nn.Module):
    """The parameters of an objective as FSDP2 shares them out, one unit a block and one for the rest.

    FSDP2 by itself gathers what a module needs when it is called, and reduces gradients when the backward
    pass leaves it. Sleeping calls a block any number of times, in each process another. So nothing happens in
    a forward or backward pass here: a step is made `gathered`, and `reduce` ends it. All processes make the
    same collectives in the same order, one gather and one reduction a unit, whatever they read: no rows at
    all, another number of windows, losses without a gradient, gradients taken within the forward pass.

    Parameters keep their dtype, and blocks compute under the autocast of the objective, as in one process. A
    `MixedPrecisionPolicy` would round all that a unit holds and is given: decays (`A_log`), norms, S.

    Optimizers are made afterwards: the parameters are other ones then, each a `DTensor` with the slice of
    this process. Training from the same weights, with rows dealt over the processes and each loss a share of
    the mean over all tokens, takes the steps that one process would.

    Args:
        objective: with parameters that are equal in all processes; on the device of the mesh, or on the CPU
            where they do not fit there as a whole: units move one by one.
        mesh: with dimensions "replicate" and "shard"; processes along the first hold the same slices.

    Raises:
        ValueError: for a parameter that is a number and has no rows to be shared out, or for parameters that
            are trained in several dtypes.
    """

    def __init__(self, objective: Objective, mesh: DeviceMesh) -> None:
        super().__init__()
        for name, p in objective.named_parameters():
            if not p.ndim:
                raise ValueError(f"{name} is a number, which cannot be sharded; give it the shape [1]")
        dtypes = sorted({str(p.dtype) for p in objective.parameters() if p.requires_grad})
        if len(dtypes) > 1:
            raise ValueError(f"sharded, all that is trained must have one dtype, not {', '.join(dtypes)}")
        self._held = False
        # Without copies of the slices there is nothing to be reduced over them.
        over = mesh["shard"] if mesh["replicate"].size() == 1 else mesh
        self.units = nn.ModuleList(map(_Unit, objective.model.blocks if _apart(objective) else ()))
        for unit in self.units:
            fully_shard(unit, mesh=over, reshard_after_forward=False)
        self.objective = objective
        # The objective leads to the blocks as well, which are done.
        fully_shard(self, mesh=over, reshard_after_forward=False, ignored_params={*self.units.parameters()})
        for shared in self._sharded():
            # Sums: each loss is divided by the count of all tokens already.
            shared.set_gradient_divide_factor(1.0)
            shared.set_force_sum_reduction_for_comms(True)

    def _sharded(self) -> list[FSDPModule]:
        """List the rest and the units, in the same order in all processes."""
        return [cast(FSDPModule, module) for module in (self, *self.units)]

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Hold whole parameters, plain tensors, for as long as they are read; all processes must enter.

        They are read by name or by attribute: `state_dict` gives slices always, for which FSDP2 frees them.
        """
        if self._held:
            yield
            return
        with torch.no_grad():
            self()  # once before all else: FSDP2 finds out by the first call which module is the outermost
        handles = [shared.unshard(async_op=True) for shared in self._sharded()]
        for handle in handles:
            cast(UnshardHandle, handle).wait()
        self._held = True
        try:
            yield
        finally:
            self._held = False
            for shared in self._sharded():
                shared.reshard()

    def reduce(self, used: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of all processes and free the whole parameters: the end of a step.

        It is called once, within `gathered`, after all backward passes. Then each slice has its gradient.

        Args:
            used: the parameters that any process has a gradient of, the same in all: experts, say, that no
                token here was sent to count as zeros. All others stay without a gradient.
        """
        for p in used:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        # At the end of the backward pass of the outermost module FSDP2 reduces the gradients of all.
        with torch.enable_grad():
            self().backward()

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.objective.model.device

    def forward(self) -> Tensor:
        """Compute nothing: this is where FSDP2 has its hooks."""
        return torch.zeros((), device=self.device, requires_grad=True).clone()


class _Unit(nn.Module):
    """What is gathered and freed together. It is never called, and what it holds gets no hooks by it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def _apart(objective: Objective) -> bool:
    """Say whether no block has a parameter that is in use elsewhere too, which two units would gather."""
    everywhere = _uses(objective)
    return all(everywhere[p] == n for block in objective.model.blocks for p, n in _uses(block).items())


def _uses(module: nn.Module) -> Counter[nn.Parameter]:
    """Count how often each parameter is in a module."""
    return Counter(p for _, p in module.named_parameters(remove_duplicate=False))
