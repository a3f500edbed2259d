"""Training: configuration, optimizers, run folders, the loop."""

from lmsleep.training.config import RunConfig, TrainConfig
from lmsleep.training.runs import RunFolder
from lmsleep.training.trainer import Diverged, Interrupted, Trainer

__all__ = ["Diverged", "Interrupted", "RunConfig", "RunFolder", "TrainConfig", "Trainer"]
