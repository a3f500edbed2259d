"""One step of training: gradients of a batch, clipped, and a step of the optimizers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from lmsleep.sleep import SleepConfig
from lmsleep.tasks import Batch
from lmsleep.training.objective import Objective


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
) -> StepMetrics:
    """Change the weights once, by the gradients of all parts of a batch.

    Args:
        objective: with the parameters.
        parts: of the batch; one is held in memory at a time.
        sleep: how the model reads them.
        optimizers: over the parameters, with their learning rates set.
        clip: largest norm of all gradients together.
    """
    loss = gradients(objective, parts, sleep)
    # Over all parts together: clipping each by itself would change what they add up to.
    norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), clip)
    # Before the optimizers move: their state could not be cleaned of a NaN afterwards.
    metrics = StepMetrics(loss.item(), norm.item())
    if metrics.finite:
        for optimizer in optimizers:
            optimizer.step()
            # No gradients are held between steps. One that is not finite leaves its own: its run ends.
            optimizer.zero_grad()
    return metrics


def gradients(objective: Objective, parts: Sequence[Batch], sleep: SleepConfig) -> Tensor:
    """Return the mean loss over the predicted tokens of all parts; leave its gradients on the parameters."""
    total = sum(part.num_predicted for part in parts)
    assert total, "a training batch without a token to predict"
    loss = torch.zeros((), device=parts[0].tokens.device)
    for part in parts:
        # Backward at once: the graph of one part is freed before the next one is built.
        share = objective(part, sleep, total)
        # A part may predict nothing.
        if share.requires_grad:
            share.backward()
        # A tensor on the device: reading the number here would wait for each part.
        loss += share.detach()
    return loss
