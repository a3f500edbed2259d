"""Where the runs of a command are trained, and how many at a time."""

from dataclasses import dataclass
from typing import Literal

from lmsleep.launched import launched
from lmsleep.training import Launcher, Processes, find_launcher
from lmsleep.training.launch import Together, check_workers


@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """What commands that train many runs have in common."""

    workers: int | None = None
    """Runs at a time; default one for each GPU, or without one for each core; on a cluster all there is room
    for."""
    launcher: Literal["local", "ray", "slurm"] = "local"
    """Train in processes of this machine, as tasks of Ray (RAY_ADDRESS names a cluster), or as Slurm jobs."""
    launcher_options: tuple[str, ...] = ()
    """KEY=VALUE ...: of Ray's tasks (num_gpus=1 num_cpus=4), or of submitit and sbatch (timeout_min=240
    gpus_per_node=1 partition=NAME account=NAME)."""

    def found(self) -> Launcher:
        """Return the launcher; raises ValueError for what does not fit, or is not installed.

        Under torchrun it is all processes together, and nothing else.
        """
        check_workers(self.workers)
        if launched():
            for name, given in (("workers", self.workers), ("launcher", self.launcher != "local" or None)):
                if given is not None:
                    raise ValueError(f"{name}: under torchrun all processes train one run; leave it out")
            return Together(Processes.join())
        return find_launcher(self.launcher, self.launcher_options)
