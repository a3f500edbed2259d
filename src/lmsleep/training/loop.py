"""The loop of training: when to take a step, log, evaluate, save and stop."""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from lmsleep.backbones import Model, kind_of
from lmsleep.evaluation import Score, evaluate
from lmsleep.progress import progress
from lmsleep.tasks import Batch, batch_rng
from lmsleep.training import data
from lmsleep.training.batches import Batches, check_samples, draw, in_parts
from lmsleep.training.compute import StepFlops
from lmsleep.training.config import RunConfig
from lmsleep.training.device import autocast, choose_device, fitting, in_bfloat16
from lmsleep.training.objective import Objective
from lmsleep.training.optim import optimizers, set_rates, sleep_at
from lmsleep.training.processes import ALONE, Processes
from lmsleep.training.runs import SHARDS, TRAINER, RunFolder
from lmsleep.training.sharing import Copies, Sharing
from lmsleep.training.sources import software
from lmsleep.training.start import first_model, trained_weights
from lmsleep.training.step import take_step
from lmsleep.training.tracking import Events, installed

ANEW = "begin a new run with another --out"  # where a run cannot go on


class Diverged(RuntimeError):
    """The loss or a gradient became non-finite; the state before that step was saved."""


class Interrupted(RuntimeError):
    """A signal asked the run to stop; it was saved first."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class Trainer:
    """Trains one run in its folder. The state after step `i` is a function of the configuration alone.

    Several processes take its steps together, each on its own rows; however many there are, they are the same
    steps to rounding. One of them, `processes.main`, writes the folder and draws the bar.

    Attributes:
        log_every: steps between lines of the metrics.
        objective: the loss as a module, around `model`.
        processes: that train the run.
        step: steps taken; `tokens`, `flops` and `seconds` are what they took.
    """

    log_every = 10

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        model: Model | None = None,
        *,
        processes: Processes = ALONE,
    ) -> None:
        """Train `model`, by default what the run begins with (raises ValueError or OSError if it cannot)."""
        self.folder, self.config, self.processes = folder, config, processes
        train = config.train
        if train.batch_size < processes.size:
            raise ValueError(
                f"batch_size={train.batch_size} is less than the {processes.size} processes that share it"
            )
        self.device = choose_device(train.device)
        if train.tensorboard and not installed():
            raise ValueError("tensorboard=True needs TensorBoard: pip install 'lmsleep[track]'")
        if train.threads:
            torch.set_num_threads(train.threads)
        # Before the model is built: initial weights are drawn from the global generator.
        torch.manual_seed(train.seed)
        bfloat16 = in_bfloat16(train, self.device)
        with processes.together(), fitting("the model"):
            model = model or first_model(config, bfloat16=bfloat16, trust=folder.trust)
            self.model = model.to(self.device).train()
        trained_weights(self.model, train)
        self.objective = counted = Objective(self.model, train, bfloat16=bfloat16)
        if train.keep is not None:
            if processes.shard > 1:
                raise ValueError("keep: a model that is shared out keeps no hidden states; leave out --shard")
            kept = kind_of(config.model).keep(self.model, train.keep, bfloat16=bfloat16)
            self.objective = Objective(kept, train, bfloat16=bfloat16)
        self.sharing: Sharing = Copies(self.objective, processes)
        if processes.shard > 1:
            # Only now: FSDP takes seconds to import.
            from lmsleep.training.sharding import Shards
            from lmsleep.training.slices import Saver

            self.sharing = Shards(self.objective, processes.mesh(self.device))
            self._saver = Saver(processes)
        # After freezing, moving and sharding: they hold the parameters that there are now, on their device.
        self.optimizers = optimizers(self.model, train)
        self.step, self.tokens, self.flops, self.seconds = 0, 0, 0, 0.0
        self.batches = Batches(config, processes.rank, processes.size)
        self._flops = StepFlops(counted)

    @classmethod
    def begin(
        cls, path: str | Path, config: RunConfig, *, trust: bool = False, processes: Processes = ALONE
    ) -> "Trainer":
        """Begin a run in a new folder, which is made last: what cannot begin leaves none.

        Args:
            path: the folder.
            config: the run.
            trust: run the Python files that the run or model to start from names.
            processes: that train it; all of them call this.

        Raises:
            FileExistsError: if there is a run, or anything else, in the folder.
            ValueError: if the run cannot begin.
            OSError: if a file is missing, or the folder cannot be made.
        """
        folder = RunFolder(path, trust=trust)
        with processes.together():
            folder.check_new(config)  # first, for a model may take minutes to load
            check_samples(config)
        check_same(config, processes)
        with processes.together():
            trainer = cls(folder, config, processes=processes)
            trainer.rehearse()
        with processes.together():
            if processes.main:
                folder.make(config)
        return trainer

    def rehearse(self) -> None:
        """Make the forward and backward pass of the next step, and forget it: raise what that would raise.

        Raises:
            ValueError: if a batch cannot be read, or does not fit into memory.
        """
        train = self.config.train
        with fitting(f"batch_size={train.batch_size} in accumulate={train.accumulate} parts"):
            batch = draw(self.config, self.step, self.processes.rank, self.processes.size)
            sleep = sleep_at(self.step, self.config.sleep, train)
            # The counts are kept, so that the step itself does not make these passes again.
            with self.sharing.gathered():
                for part in self._parts(batch):
                    self._flops(part, sleep)

    def _parts(self, batch: Batch) -> list[Batch]:
        """Return the parts in which this process reads its rows, on its device."""
        parts = in_parts(batch, self.config.train.accumulate, self.config.train.batch_size)
        return [part.to(self.device) for part in parts]

    @classmethod
    def resume(
        cls,
        folder: RunFolder,
        checkpoint: Path | None = None,
        config: RunConfig | None = None,
        *,
        processes: Processes = ALONE,
    ) -> "Trainer":
        """Continue from the newest (or another) checkpoint exactly as if there had been no stop.

        Other `processes` than before may go on with it; then it is exact to rounding.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            ValueError: if it is damaged or belongs to another configuration, or if the data have changed.
        """
        folder.check_data(ANEW)
        config = config or folder.config()
        path = checkpoint or folder.latest(resumable=True)
        bfloat16 = in_bfloat16(config.train, choose_device(config.train.device))
        trainer = cls(folder, config, folder.model_of(path, config, bfloat16=bfloat16), processes=processes)
        try:
            # weights_only: a checkpoint is data and must not run code when it is opened.
            saved = torch.load(path / TRAINER, map_location=trainer.device, weights_only=True)
            if (path / SHARDS).is_dir():
                from lmsleep.training.slices import load_optimizers

                load_optimizers(path, trainer.model, trainer.optimizers)
            else:
                trainer._restore_optimizers(saved["optimizers"])
            trainer._restore(saved)
        # Of a file that may be whole: it cannot be read, or finds no room.
        except (PermissionError, MemoryError, torch.OutOfMemoryError):
            raise
        # A damaged file makes torch raise nearly anything else, and say it in many lines.
        except Exception as error:
            raise ValueError(f"{path / TRAINER} is damaged or foreign; {folder.without(path)}") from error
        return trainer

    def _restore_optimizers(self, states: Sequence[dict[str, Any]]) -> None:
        """Take over what a checkpoint of whole weights has of them; errors as of `_restore`."""
        for optimizer, state in zip(self.optimizers, states, strict=True):
            own = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict(state)
            # Its options are those of the configuration, whatever the file says.
            for group, options in zip(optimizer.param_groups, own, strict=True):
                group.update({name: value for name, value in options.items() if name != "params"})
            for p, kept in optimizer.state.items():
                if any(t.ndim and t.shape != p.shape for t in kept.values()):
                    raise ValueError("the state of an optimizer of another model")
        if self.processes.shard > 1:
            from lmsleep.training.slices import share_out

            share_out(self.optimizers)

    def _restore(self, saved: dict[str, Any]) -> None:
        """Take over where the run was; raises an error of any type if this says nothing of it."""
        self.step, self.tokens, self.flops = (int(saved[name]) for name in ("step", "tokens", "flops"))
        self.seconds = float(saved["seconds"])
        # Of checkpoints from before further shapes were counted by their positions: none.
        self._flops.counted = [(c, r, int(n), int(flops)) for c, r, n, flops in saved.get("counted", ())]
        if not 0 <= self.step <= self.config.train.steps:
            raise ValueError(f"step {self.step} is none of the run")

    @classmethod
    def take_up(cls, folder: RunFolder, *, processes: Processes = ALONE) -> "Trainer":
        """Continue a run; one that was stopped before its first checkpoint begins again."""
        with processes.together():
            config = folder.config()
        check_same(config, processes)
        with processes.together():
            if folder.checkpoints():
                trainer = cls.resume(folder, config=config, processes=processes)
            else:
                folder.check_data(ANEW)
                trainer = cls(folder, config, processes=processes)
        processes.check_same({"step": trainer.step})
        return trainer

    def fit(self, until: int | None = None, *, position: int | None = None) -> Score | None:
        """Train up to step `until` (default: the end, with a final evaluation and report).

        `position` is the line of the progress bar, for runs side by side. What the folder holds of later
        steps is dropped first.

        Raises:
            Diverged: if the loss or a gradient became non-finite.
            Interrupted: after SIGINT or SIGTERM.
            ValueError: if another process trains the run, or its metrics are damaged.
            Lost: if another process ended, or did not answer.
            OSError: naming the file that cannot be written; the last checkpoint stays.
        """
        with self.folder.locked_for(self.processes):
            with self.processes.together():
                if self.processes.main:
                    self.folder.rewind(self.step)
            # Of what FSDP sends in the middle of a step too.
            with self.processes.answering():
                return self._fit(until, position)

    def _fit(self, until: int | None, position: int | None) -> Score | None:
        """Train in the folder, which is locked and at the step of this trainer."""
        train = self.config.train
        last = train.steps if until is None else min(until, train.steps)
        name, main = self.folder.path.name, self.processes.main
        bar = progress(
            total=last, initial=self.step, desc=name, unit="step", position=position, leave=position is None
        )
        tracked = Events(self.folder.path, self.step) if train.tensorboard and main else nullcontext()
        with _signals() as caught, bar, closing(self.batches), tracked as events:

            def log(record: dict[str, Any]) -> None:
                with self.processes.together():
                    if main:
                        self.folder.log(record)
                    if events is not None:
                        events.log(record)

            # Carries model, optimizers and counts; all else of a step follows from `self.step`.
            while self.step < last:
                record = self.train_step()
                bar.update()
                bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
                if self.step % self.log_every == 0 or self.step == train.steps:
                    log(record)
                if self.step % train.eval_every == 0 or self.step == train.steps:
                    score = self.evaluate(train.eval_batches)
                    log({**self._position(), "eval": score.to_dict()})
                # Of several processes a signal to one stops all, after the same step.
                if self.processes.left_alone:
                    caught.append(signal.SIGTERM)
                stop = max(self.processes.gather(caught[:1]))
                # Saved last, after what belongs to the step was logged: going on drops only later lines.
                if self.step % train.save_every == 0 or self.step == train.steps or stop:
                    # Slices of a sharded model are written while training goes on.
                    self.save(wait=bool(stop) or self.step == train.steps)
                # A signal during the last step has nothing to stop.
                if stop and self.step < last:
                    resume = f"lmsleep train --resume {self.folder.path}"
                    raise Interrupted(stop[0], f"stopped after step {self.step}; to go on: {resume}")
            # The last one is in its place when the folder is let go.
            if self.processes.shard > 1:
                self._saver.wait()
        return self._finish() if self.step == train.steps else None

    def _finish(self) -> Score:
        """Score the trained model on more samples, export it where its kind has a format, and report."""
        score = self.evaluate(4 * self.config.train.eval_batches)
        floors = self.config.task.floors()
        # The report is written last: it says that the run is complete, so the export must be there by then.
        kind = kind_of(self.config.model)
        with self.sharing.gathered(), self.processes.together():
            if self.processes.main:
                options, sleep = self.config.model, self.config.sleep
                kind.export(self.model, options, sleep, self.folder.exported, self._about(score))
                self.folder.write_report({**self._position(), "eval": score.to_dict(), "floors": floors})
        return score

    def _about(self, score: Score) -> dict[str, str]:
        """Say in rows of a card how the model was trained, on what, and how well it does."""
        # Of runs that older versions made, some of it is not known.
        made = {"command": "unknown", "lmsleep": "unknown", "commit": None, **self.folder.made_by()}
        config = self.config
        files = [path.name for path in getattr(config.task, "sources", tuple)()]
        right = f"accuracy {score.accuracy:.3f}, " if score.total else ""
        return {
            "recipe": f"`{made['command']}`: {self.step} steps, seed {config.train.seed}; lmsleep "
            f"{made['lmsleep']}, commit {made['commit']}",
            "trained on": ", ".join([f"task {config.task_name}", *files]),
            "held out": f"{right}{score.bits():.3f} bits a predicted token",
        }

    def evaluate(self, batches: int) -> Score:
        """Score on held-out samples with the run's own sleep."""
        self.model.eval()
        with self.sharing.gathered(), autocast(self.device, self.objective.in_bfloat16):
            train = self.config.train
            score = evaluate(
                self.objective.model, self.config.task, self.config.sleep, batches=batches,
                device=self.device, batch_size=train.batch_size, parts=train.accumulate,
                share=(self.processes.rank, self.processes.size),
            )  # fmt: skip
        self.model.train()
        return Score.joined(self.processes.gather(score))

    def save(self, name: str = "step", *, wait: bool = True) -> Path:
        """Write a checkpoint, of a sharded model in slices.

        Args:
            name: what stands before the step in its name.
            wait: until it is in its place; a sharded model need not be waited for.
        """
        path, options = self.folder.checkpoint(self.step, name), self.config.model
        kind = kind_of(options)
        state = {**self._position(), "counted": self._flops.counted}
        if self.processes.shard > 1:
            from lmsleep.training.slices import tensors

            named = tensors(kind.weights(self.model), self.model, self.optimizers)
            self.folder.save_shards(path, self._saver, named, state)
            if wait:
                self._saver.wait()
            return path
        with self.processes.together():
            if self.processes.main:
                states = [optimizer.state_dict() for optimizer in self.optimizers]
                self.folder.save_checkpoint(
                    path,
                    lambda folder: kind.save(self.model, options, folder),
                    {**state, "optimizers": states},
                )
        return path

    def train_step(self) -> dict[str, Any]:
        """Take one step; return the record of it that is logged.

        Raises:
            Diverged: if the loss or a gradient became non-finite.
        """
        train, batch = self.config.train, self.batches[self.step]
        sleep = sleep_at(self.step, self.config.sleep, train)
        parts = self._parts(batch)
        # Set anew in every step, so that it does not matter which rates a checkpoint was written with.
        factor = set_rates(self.optimizers, self.step, train)
        started = time.perf_counter()
        with self.sharing.gathered():
            counting = time.perf_counter()
            flops = sum(self._flops(part, sleep) for part in parts)
            started += time.perf_counter() - counting  # which runs passes of its own
            predicted, tokens, flops = self.processes.sums(
                sum(part.num_predicted for part in parts), batch.num_tokens, flops
            )
            seed = batch_rng(train.seed, "train", self.step).integers(2**63).item()
            torch.manual_seed(seed ^ self.processes.rank)  # of dropout, which is another for other rows
            metrics = take_step(
                self.objective, parts, sleep, self.optimizers, clip=train.clip, total=predicted,
                processes=self.processes, sharing=self.sharing,
            )  # fmt: skip
        if not metrics.finite:
            # No weight has moved yet, so this is the state before the step.
            path = self.save("diverged")
            raise Diverged(
                f"step {self.step}: loss {metrics.loss}, gradient norm {metrics.grad_norm}; the state before "
                f"it is in {path}. A lower lr or adam_lr, a smaller clip or a longer warmup usually helps"
            )
        self.step += 1
        self.tokens += tokens
        self.flops += flops
        self.seconds += time.perf_counter() - started
        loss = {"loss": metrics.loss, "grad_norm": metrics.grad_norm}
        return {**self._position(), **loss, "lr_factor": factor}

    def _position(self) -> dict[str, Any]:
        """Return where the run is and what it took; every line of the metrics begins with it."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "flops": self.flops,
            "seconds": round(self.seconds, 3),
        }


def check_same(config: RunConfig, processes: Processes) -> None:
    """Refuse processes that would not train the same run: of other options, sources or data.

    Raises:
        ValueError: naming what differs.
    """
    if processes.joined:
        with processes.together():
            facts = {**config.to_dict(), **software(), "data": data.hashes(config.task)}
        processes.check_same({**facts, "shard": processes.shard})


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM while a step is under way, so that the state can be saved after it."""
    caught: list[int] = []
    # Only noted: an exception in the middle of a step would leave half of it in the weights.
    before = {s: signal.signal(s, lambda n, _: caught.append(n)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
