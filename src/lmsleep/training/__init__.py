"""Training: configuration, optimizers, run folders, the loop."""

from lmsleep.training.config import RunConfig, TrainConfig
from lmsleep.training.jobs import Job, run_all
from lmsleep.training.runs import RunFolder
from lmsleep.training.trainer import Diverged, Interrupted, Trainer, flops_per_step

__all__ = [
    "Diverged",
    "Interrupted",
    "Job",
    "RunConfig",
    "RunFolder",
    "TrainConfig",
    "Trainer",
    "flops_per_step",
    "run_all",
]
