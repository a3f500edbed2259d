"""One step of training: gradients of a batch, clipped, and a step of the optimizers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from lmsleep.sleep import SleepConfig
from lmsleep.tasks import Batch
from lmsleep.training.objective import Objective
from lmsleep.training.processes import ALONE, Processes
from lmsleep.training.sharing import Copies, Sharing


@dataclass(frozen=True)
class StepMetrics:
    """What a step found."""

    loss: float
    """Mean over the predicted tokens, in nats."""
    grad_norm: float
    """Of all gradients together, before clipping."""

    @property
    def finite(self) -> bool:
        """True if there was no NaN or infinity; where there was, no weight has changed."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def take_step(
    objective: Objective,
    parts: Sequence[Batch],
    sleep: SleepConfig,
    optimizers: Sequence[Optimizer],
    *,
    clip: float,
    total: int | None = None,
    processes: Processes = ALONE,
    sharing: Sharing | None = None,
) -> StepMetrics:
    """Change the weights once, by the gradients of all parts of a batch.

    Args:
        objective: with the parameters.
        parts: of the batch, of several processes those that this one reads; one is held in memory at a time.
        sleep: how the model reads them.
        optimizers: over the parameters, with their learning rates set.
        clip: largest norm of all gradients together.
        total: predicted tokens in the whole step; default those of the parts.
        processes: that take the step together.
        sharing: how they hold the parameters; default `Copies`.
    """
    loss = gradients(objective, parts, sleep, total, processes, sharing)
    # Over all parts together: clipping each by itself would change what they add up to.
    norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), clip)
    # Of sharded gradients each process has a share of it.
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    # Before the optimizers move: their state could not be cleaned of a NaN afterwards.
    metrics = StepMetrics(loss, norm.item())
    if metrics.finite:
        for optimizer in optimizers:
            optimizer.step()
            # No gradients are held between steps. One that is not finite leaves its own: its run ends.
            optimizer.zero_grad()
    return metrics


def gradients(
    objective: Objective,
    parts: Sequence[Batch],
    sleep: SleepConfig,
    total: int | None = None,
    processes: Processes = ALONE,
    sharing: Sharing | None = None,
) -> float:
    """Return the mean loss over the predicted tokens of all parts, in all processes.

    Its gradients are left on the parameters. Arguments as of `take_step`.
    """
    total = sum(part.num_predicted for part in parts) if total is None else total
    assert total, "a training batch without a token to predict"
    sharing = sharing or Copies(objective, processes)
    with sharing.gathered():
        # A process may have no part at all.
        loss = torch.zeros((), device=next(objective.parameters()).device)
        for part in parts:
            # Backward at once: the graph of one part is freed before the next one is built.
            share = objective(part, sleep, total)
            # A part may predict nothing.
            if share.requires_grad:
                share.backward()
            # A tensor on the device: reading the number here would wait for each part.
            loss = loss + share.detach()
        trained = [p for p in objective.parameters() if p.requires_grad]
        # In one exchange with the loss: who has a gradient. In no process, and it stays without one.
        whole, *have = processes.sums(loss.item(), *(float(p.grad is not None) for p in trained))
        sharing.reduce([p for p, has in zip(trained, have, strict=True) if has])
    return float(whole)
