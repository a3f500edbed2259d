"""Training: configuration, optimizers, run folders, the loop."""

from lmsleep.training.baselines import BASELINES, baseline, equal_compute, for_flops
from lmsleep.training.compute import flops_per_step, training_flops
from lmsleep.training.config import RunConfig, TrainConfig
from lmsleep.training.device import choose_device
from lmsleep.training.jobs import Job
from lmsleep.training.launch import Launcher, default_workers, find_launcher, run_all
from lmsleep.training.loop import Diverged, Interrupted, Trainer
from lmsleep.training.objective import Objective
from lmsleep.training.processes import Lost, Processes
from lmsleep.training.runs import RunFolder, provenance
from lmsleep.training.stages import two_stages
from lmsleep.training.step import take_step

__all__ = [
    "BASELINES",
    "Diverged",
    "Interrupted",
    "Job",
    "Launcher",
    "Lost",
    "Objective",
    "Processes",
    "RunConfig",
    "RunFolder",
    "TrainConfig",
    "Trainer",
    "baseline",
    "choose_device",
    "default_workers",
    "equal_compute",
    "find_launcher",
    "flops_per_step",
    "for_flops",
    "provenance",
    "run_all",
    "take_step",
    "training_flops",
    "two_stages",
]
