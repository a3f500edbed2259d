"""Training: configuration, optimizers, run folders, the loop."""

from lmsleep.training.baselines import BASELINES, baseline, equal_compute
from lmsleep.training.config import RunConfig, TrainConfig
from lmsleep.training.jobs import Job, default_workers, run_all
from lmsleep.training.runs import RunFolder, provenance
from lmsleep.training.stages import two_stages
from lmsleep.training.trainer import (
    Diverged,
    Interrupted,
    Trainer,
    choose_device,
    flops_per_step,
    training_flops,
)

__all__ = [
    "BASELINES",
    "Diverged",
    "Interrupted",
    "Job",
    "RunConfig",
    "RunFolder",
    "TrainConfig",
    "Trainer",
    "baseline",
    "choose_device",
    "default_workers",
    "equal_compute",
    "flops_per_step",
    "provenance",
    "run_all",
    "training_flops",
    "two_stages",
]
