"""How the processes of a run hold its parameters: each a copy of its own, or slices of one copy."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import nn

from lmsleep.backbones import Model
from lmsleep.training.objective import Objective
from lmsleep.training.processes import ALONE, Processes


class Sharing(Protocol):
    """What a step asks of those that share it; all of them ask in the same order."""

    def gathered(self) -> AbstractContextManager[None]:
        """Hold whole parameters for as long as they are read; may be entered again within."""
        ...

    def reduce(self, used: Sequence[nn.Parameter]) -> None:
        """Add up the gradients of all, once all backward passes are made; called within `gathered`.

        Args:
            used: the parameters that any process has a gradient of, the same in all of them. One that has
                none here counts as zeros.
        """
        ...


class Copies:
    """Parameters of which each process has a copy.

    Gradients are summed after the whole backward pass, a block at a time. Nothing could be summed sooner: a
    block is used in every pass over every window, so its gradients are complete only in the backward pass of
    the first. By the same token it does not matter for what is sent how long a model sleeps.

    Args:
        objective: with parameters that are equal in all processes.
        processes: that have them.
    """

    def __init__(self, objective: Objective, processes: Processes = ALONE) -> None:
        self.objective, self.processes = objective, processes

    def gathered(self) -> AbstractContextManager[None]:
        """Do nothing: they are whole."""
        return nullcontext()

    @torch.no_grad()
    def reduce(self, used: Sequence[nn.Parameter]) -> None:
        """See `Sharing`: one reduction for each block, and one for the rest."""
        if not self.processes.joined:
            return
        somewhere = {id(p) for p in used}
        for unit in units(self.objective.model):
            some = [p for p in unit if id(p) in somewhere]
            if not some:
                continue
            parts = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in some]
            summed = self.processes.summed(torch.cat(parts))
            for p, grad in zip(some, summed.split([*map(len, parts)]), strict=True):
                p.grad = grad.view_as(p)


def units(model: Model) -> Iterator[list[nn.Parameter]]:
    """Yield the parameters that are trained: those of each block, then all others; each by dtype."""
    blocks = {id(p) for p in model.blocks.parameters()}
    rest = (p for p in model.parameters() if id(p) not in blocks)
    for some in (*(block.parameters() for block in model.blocks), rest):
        alike: dict[torch.dtype, list[nn.Parameter]] = defaultdict(list)
        for p in some:
            if p.requires_grad:
                alike[p.dtype].append(p)
        yield from alike.values()
