"""One of many runs: what it is, whether it is finished, and how a process trains it."""

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from lmsleep.training.config import RunConfig
from lmsleep.training.loop import Trainer
from lmsleep.training.processes import ALONE, Processes
from lmsleep.training.runs import BRANCH, RunFolder


@dataclass(frozen=True)
class Job:
    """One run, and optionally a shorter one that shares its start.

    A shorter run with the same settings makes the same steps until its learning rates begin to fall
    (`optim.schedule`), so it is continued from there instead of being trained twice.
    """

    path: Path
    config: RunConfig
    shorter: "Job | None" = None

    @property
    def branch_step(self) -> int:
        """Return the step at which the shorter run leaves; raises ValueError if it is not a shorter twin."""
        assert self.shorter is not None
        short, long = self.shorter.config, self.config
        if replace(short, train=replace(short.train, steps=long.train.steps)) != long:
            raise ValueError(f"{self.shorter.path} must differ from {self.path} in its steps alone")
        # Up to here the shorter run's rates have not begun to fall, and no longer run falls sooner.
        return math.floor((1 - short.train.decay) * short.train.steps)

    def absolute(self) -> "Job":
        """Return the job with absolute folders, for processes that may work in another one."""
        shorter = None if self.shorter is None else self.shorter.absolute()
        return replace(self, path=self.path.absolute(), shorter=shorter)

    def finished(self) -> bool:
        """Say whether the run and its shorter one have reports.

        Raises:
            ValueError: if a folder holds a run of another configuration.
        """
        if not (self.path / "config.json").exists():
            return False
        folder = RunFolder.open(self.path)
        if not folder.is_of(self.config):
            raise ValueError(
                f"{self.path} holds a run of another configuration; remove it or choose another folder"
            )
        return folder.report() is not None and (self.shorter is None or self.shorter.finished())

    def train(
        self, *, position: int | None = None, patience: float = 0.0, processes: Processes = ALONE
    ) -> None:
        """Train the run to its end, and the shorter one on the way; what is there already is gone on with.

        Args:
            position: the line of the progress bar, for runs side by side.
            patience: seconds to wait for another process that trains the run.
            processes: that train it together; all of them call this.

        Raises:
            Diverged, Interrupted, Lost: as of `Trainer.fit`.
            ValueError: if another process trains the run, or it cannot begin.
            OSError: if the folder cannot be written.
        """
        trainer = self._begun(processes)
        folder = trainer.folder if trainer else RunFolder.open(self.path)
        with folder.locked_for(processes, patience):
            # Read by all before any of them writes.
            with processes.together():
                # Whoever held the lock may have trained it meanwhile.
                finished, begun = self.finished(), folder.has_begun()
                shorter = None if self.shorter is None or self.shorter.finished() else self.shorter
            if finished:
                return
            if trainer is None or begun:
                trainer = Trainer.take_up(folder, processes=processes)
            if shorter is not None:
                trainer = _train_shorter(self, shorter, trainer, position)
            trainer.fit(position=position)

    def _begun(self, processes: Processes) -> Trainer | None:
        """Begin the run; None if there is one."""
        config = self.path / "config.json"
        with processes.together():
            there = config.exists()
        if there:
            return None
        try:
            return Trainer.begin(self.path, self.config, processes=processes)
        except (ValueError, FileExistsError):
            # Another process may have begun it in the same seconds.
            if not config.exists():
                raise
            return None


def _train_shorter(job: Job, shorter: Job, trainer: Trainer, position: int | None) -> Trainer:
    """Train to where the shorter run leaves, and that run to its end; return the trainer to go on with."""
    processes = trainer.processes
    # An earlier call without the shorter run, or one whose result was removed, has trained past it.
    if trainer.step > job.branch_step:
        # The shared start is gone: begin again.
        trainer = Trainer(trainer.folder, job.config, processes=processes)
    trainer.fit(until=job.branch_step, position=position)
    # Under another name than "step", so that it is not among the checkpoints that are thinned out.
    start = trainer.save(BRANCH)
    short = RunFolder(shorter.path)
    with short.locked_for(processes):
        with processes.together():
            if processes.main:
                # Half of it may be there from a call that was stopped; it costs the fall alone to do again.
                short.clear()
                short.make(shorter.config)
                # Its history is the longer run's; `fit` drops what lies after the branch.
                for record in trainer.folder.metrics():
                    short.log(record)
        Trainer.resume(short, start, processes=processes).fit(position=position)
    # Only the shorter run begins here; the longer one goes on with the trainer at hand.
    with processes.together():
        if processes.main:
            shutil.rmtree(start)
    return trainer
