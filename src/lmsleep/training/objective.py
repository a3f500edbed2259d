"""What is minimised: the whole of Algorithm 1 over a batch, as one module."""

from functools import partial

import torch
from torch import Tensor, nn

from lmsleep.backbones import Model
from lmsleep.sleep import SleepConfig
from lmsleep.tasks import Batch
from lmsleep.tasks.reading import read_batch
from lmsleep.training.config import TrainConfig
from lmsleep.training.device import autocast


class Objective(nn.Module):
    """The loss of a model on a batch.

    Sleeping calls `embed`, `run` and `head` of a model, in no fixed number. Whoever wraps a module (DDP,
    FSDP2, hooks) sees `forward` alone: so one call of this one is all that a batch asks of the model.

    Args:
        model: whose parameters are trained.
        train: how gradients go back: `backprop_passes`, `checkpoint`.
        bfloat16: blocks compute in bfloat16, by autocast.

    Attributes:
        in_bfloat16: the same.
    """

    model: Model

    def __init__(self, model: Model, train: TrainConfig, *, bfloat16: bool = False) -> None:
        super().__init__()
        self.model, self.in_bfloat16 = model, bfloat16
        self.read = partial(read_batch, backprop_passes=train.backprop_passes, checkpoint=train.checkpoint)

    def forward(self, batch: Batch, sleep: SleepConfig, total: int | None = None) -> Tensor:
        """Return the share of a batch in the mean loss over `total` predicted tokens.

        Parts of a step, and ranks of several processes, differ in how many tokens they predict. So each
        divides its sum by the count of all, which is known beforehand, and the shares add up to the mean.

        Args:
            batch: what is read and predicted, on the device of the model.
            sleep: window, consolidator and eviction.
            total: predicted tokens in the whole step; default those of this batch.

        Returns:
            A number in nats; zero, and no gradient, for a batch that predicts nothing.
        """
        # The forward pass alone: backward passes run in the types that autocast chose for it.
        with autocast(batch.tokens.device, self.in_bfloat16):
            mean = self.read(self.model, batch, sleep).loss
        if mean is None:
            return torch.zeros((), device=batch.tokens.device)
        own = batch.num_predicted
        # `mean` is over the batch's own tokens; the factor turns it into its share of the step's mean.
        return mean * (own / (own if total is None else total))
