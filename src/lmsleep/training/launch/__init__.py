"""Many runs side by side: on this machine, over a Ray cluster, or as jobs of Slurm."""

from lmsleep.training.launch.grid import run_all
from lmsleep.training.launch.launcher import Ended, Launcher, check_workers, find_launcher
from lmsleep.training.launch.local import Local, default_workers
from lmsleep.training.launch.together import Together

__all__ = [
    "Ended",
    "Launcher",
    "Local",
    "Together",
    "check_workers",
    "default_workers",
    "find_launcher",
    "run_all",
]
