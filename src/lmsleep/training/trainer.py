"""The training loop: one for every task, model and sleep."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lmsleep.evaluation import Score, evaluate, read_batch
from lmsleep.hf import HFBackbone
from lmsleep.hf.finetune import FineTune
from lmsleep.models import HybridLM
from lmsleep.session import Session
from lmsleep.sleep import SleepConfig
from lmsleep.tasks import Batch, stream
from lmsleep.training.batches import Batches, draw
from lmsleep.training.config import RunConfig, TrainConfig
from lmsleep.training.models import Model, build, export, load
from lmsleep.training.optim import learning_rate, optimizers, schedule
from lmsleep.training.progress import progress
from lmsleep.training.runs import RunFolder
from lmsleep.training.tracking import Events, installed

LOG_EVERY = 10  # steps between lines of the metrics


def flops_per_step(config: RunConfig) -> int:
    """FLOPs of the forward and backward pass of one training step (its first batch, all N passes).

    Samples without padding cost the same, so one of them is counted for all.
    """
    whole = replace(config, train=replace(config.train, curriculum=0))
    model, batch = build(config.model), draw(whole, 0)
    if batch.lengths is not None or batch.context_lengths is not None:
        parts = batch.parts(config.train.accumulate)
        return sum(_count_flops(model, part, config.sleep, config.train) for part in parts)
    samples = batch.parts(config.train.batch_size)
    one = samples[0]  # with loss in all windows where any has some
    one = replace(one, loss_mask=one.loss_mask | batch.loss_mask.any(dim=0))
    return len(samples) * _count_flops(model, one, config.sleep, config.train)


def training_flops(config: RunConfig) -> int:
    """FLOPs of a whole training run, all its steps like the first one with so many passes.

    Where passes are drawn, each number counts equally often.
    """
    train, sleep = config.train, config.sleep
    early = min(train.early_steps, train.steps)

    def of_a_step(most: int) -> int:
        drawn = range(1, most + 1) if train.random_passes else (most,)
        counted = [flops_per_step(replace(config, sleep=sleep.with_passes(n))) for n in drawn]
        return sum(counted) // len(counted)

    few = of_a_step(min(train.early_passes, sleep.passes)) if early else 0
    return early * few + (train.steps - early) * of_a_step(sleep.passes)


def first_model(config: RunConfig, *, bfloat16: bool = False) -> Model:
    """What a run begins with: random weights, those of another run or model, or a pretrained model.

    Raises:
        FileNotFoundError: if there is no model at `config.train.start`, or no pretrained one.
        ValueError: if it does not fit.
    """
    model, train = build(config.model, bfloat16=bfloat16), config.train
    if isinstance(model, HFBackbone):
        _check_fit(config, model)
    if train.start is not None:
        folder = RunFolder(train.start)
        source = folder.model() if folder.is_run() else HybridLM.from_pretrained(train.start)
        assert isinstance(model, HybridLM) and isinstance(source, HybridLM), "RunConfig has checked"
        model.take_weights(source, train.inserted)
    return model


def _check_fit(config: RunConfig, model: HFBackbone) -> None:
    """Raise ValueError where a pretrained model does not fit its run."""
    task, sleep, known = config.task, config.sleep, model.config.vocab_size
    if task.vocab_size > known:
        raise ValueError(
            f"{config.task_name} has {task.vocab_size} tokens, the model only {known}; use the model's own "
            "tokenizer (--tokenizer)"
        )
    Session(model, sleep)  # refuses what could not be used afterwards


def _count_flops(
    model: Model,
    batch: Batch,
    sleep: SleepConfig,
    train: TrainConfig,
    forward: AbstractContextManager[object] | None = None,
) -> int:
    with FlopCounterMode(display=False) as counter:
        with forward or nullcontext():
            loss = _loss(model, batch, sleep, train)
        if loss is not None:
            loss.backward()
    model.zero_grad()
    return counter.get_total_flops()


def _loss(model: Model, batch: Batch, sleep: SleepConfig, train: TrainConfig) -> Tensor | None:
    return read_batch(
        model, batch, sleep, backprop_passes=train.backprop_passes, checkpoint=train.checkpoint
    ).loss


class Diverged(RuntimeError):
    """The loss or a gradient became non-finite; the state before that step was saved."""


class Interrupted(RuntimeError):
    """A signal asked the run to stop; it was saved first."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class Trainer:
    """Trains one run in its folder. The state after step `i` is a function of the configuration alone."""

    def __init__(self, folder: RunFolder, config: RunConfig, model: Model | None = None) -> None:
        """Train `model`, by default what the run begins with (raises ValueError or OSError if it cannot)."""
        self.folder, self.config = folder, config
        train = config.train
        self.device = choose_device(train.device)
        if train.tensorboard and not installed():
            raise ValueError("tensorboard=True needs TensorBoard: pip install 'lmsleep[track]'")
        if train.threads:
            torch.set_num_threads(train.threads)
        torch.manual_seed(train.seed)
        self.autocast = _autocasts(train, self.device)
        self.model = (model or first_model(config, bfloat16=self.autocast)).to(self.device).train()
        if train.only_inserted:
            for i, block in enumerate(self.model.requires_grad_(False).blocks):
                block.requires_grad_(i in train.inserted)
        self.optimizers = optimizers(self.model, train)
        self.step, self.tokens, self.flops, self.seconds = 0, 0, 0, 0.0
        self.batches = Batches(config)
        self._flops_of: dict[tuple[Any, ...], int] = {}

    @classmethod
    def resume(
        cls, folder: RunFolder, checkpoint: Path | None = None, config: RunConfig | None = None
    ) -> "Trainer":
        """Continue from the newest (or another) checkpoint exactly as if there had been no stop.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            ValueError: if it is damaged or belongs to another configuration.
        """
        config = config or folder.config()
        path = checkpoint or folder.latest()
        bfloat16 = _autocasts(config.train, choose_device(config.train.device))
        trainer = cls(folder, config, load(config.model, path, bfloat16=bfloat16))
        try:
            saved = torch.load(path / "trainer.pt", map_location=trainer.device, weights_only=True)
            for optimizer, state in zip(trainer.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            for name in ("step", "tokens", "flops", "seconds"):
                setattr(trainer, name, saved[name])
        except (
            OSError,
            RuntimeError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
            EOFError,
            UnpicklingError,
        ) as error:
            raise ValueError(f"{path / 'trainer.pt'} is damaged or foreign: {error}") from error
        folder.rewind(trainer.step)
        return trainer

    @classmethod
    def take_up(cls, folder: RunFolder) -> "Trainer":
        """Continue a run; one that was stopped before its first checkpoint begins again."""
        if folder.checkpoints():
            return cls.resume(folder)
        trainer = cls(folder, folder.config())
        folder.rewind(0)
        return trainer

    def fit(self, until: int | None = None, *, position: int | None = None) -> Score | None:
        """Train up to step `until` (default: the end, with a final evaluation and report).

        `position` is the line of the progress bar, for runs side by side.

        Raises:
            Diverged: if the loss or a gradient became non-finite.
            Interrupted: after SIGINT or SIGTERM.
        """
        train = self.config.train
        last = train.steps if until is None else min(until, train.steps)
        name = self.folder.path.name
        bar = progress(
            total=last, initial=self.step, desc=name, unit="step", position=position, leave=position is None
        )
        tracked = Events(self.folder.path, self.step) if train.tensorboard else nullcontext()
        with _signals() as caught, bar, closing(self.batches), tracked as events:

            def log(record: dict[str, Any]) -> None:
                self.folder.log(record)
                if events is not None:
                    events.log(record)

            while self.step < last:
                record = self.train_step()
                bar.update()
                bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
                if self.step % LOG_EVERY == 0 or self.step == train.steps:
                    log(record)
                if self.step % train.eval_every == 0 or self.step == train.steps:
                    score = self.evaluate(train.eval_batches)
                    log({**self._position(), "eval": score.to_dict()})
                if self.step % train.save_every == 0 or self.step == train.steps or caught:
                    self.save()
                if caught and self.step < last:
                    resume = f"lmsleep train --resume {self.folder.path}"
                    raise Interrupted(caught[0], f"stopped after step {self.step}; to go on: {resume}")
        return self._finish() if self.step == train.steps else None

    def _finish(self) -> Score:
        score = self.evaluate(4 * self.config.train.eval_batches)
        floors = self.config.task.floors()
        if isinstance(self.model, HFBackbone) and isinstance(self.config.model, FineTune):
            export(self.model, self.config.model, self.config.sleep, self.folder.exported)
        self.folder.write_report({**self._position(), "eval": score.to_dict(), "floors": floors})
        return score

    def evaluate(self, batches: int) -> Score:
        """Score on held-out samples with the run's own sleep."""
        self.model.eval()
        with self._autocast():
            score = evaluate(
                self.model, self.config.task, self.config.sleep, batches=batches, device=self.device,
                batch_size=self.config.train.batch_size, parts=self.config.train.accumulate,
            )  # fmt: skip
        self.model.train()
        return score

    def save(self, name: str = "step") -> Path:
        """Write a checkpoint."""
        state = {
            **self._position(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        return self.folder.save_checkpoint(self.step, self.model, state, name)

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; the record of it that is logged."""
        train = self.config.train
        batch, sleep = self.batches[self.step], self._sleep()
        parts = [part.to(self.device) for part in batch.parts(train.accumulate)]
        flops = sum(self._flops(part, sleep) for part in parts)
        started = time.perf_counter()
        factor = schedule(self.step, train)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(optimizer, train) * factor
        torch.manual_seed(stream(train.seed, "train", self.step).integers(2**63).item())  # of dropout
        loss = self._backward(parts, sleep)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.clip)
        value, norm_value = loss.item(), norm.item()
        if not (math.isfinite(value) and math.isfinite(norm_value)):
            path = self.save("diverged")
            raise Diverged(
                f"step {self.step}: loss {value}, gradient norm {norm_value}; the state before it is in "
                f"{path}. A lower lr or adam_lr, a smaller clip or a longer warmup usually helps"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.tokens += batch.num_tokens
        self.flops += flops
        self.seconds += time.perf_counter() - started
        return {**self._position(), "loss": value, "grad_norm": norm_value, "lr_factor": factor}

    def _sleep(self) -> SleepConfig:
        """The sleep of this step."""
        sleep, train = self.config.sleep, self.config.train
        if self.step < train.early_steps:
            sleep = sleep.with_passes(min(train.early_passes, sleep.passes))
        if not train.random_passes:
            return sleep
        passes = int(np.random.default_rng((train.seed, self.step)).integers(1, sleep.passes + 1))
        return sleep.with_passes(passes)

    def _backward(self, parts: list[Batch], sleep: SleepConfig) -> Tensor:
        """Mean loss over the predicted tokens of all parts; its gradients are left on the parameters."""
        predicted = [part.num_predicted for part in parts]
        assert any(predicted), "a training batch without a token to predict"
        total = torch.zeros((), device=self.device)
        for part, count in zip(parts, predicted, strict=True):
            with self._autocast():
                mean = _loss(self.model, part, sleep, self.config.train)
            if mean is not None:
                loss = mean * (count / sum(predicted))
                loss.backward()
                total += loss.detach()
        return total

    def _flops(self, batch: Batch, sleep: SleepConfig) -> int:
        """FLOPs of a forward and backward pass over a batch of this shape.

        Counted in a pass of its own: under the counter PyTorch picks other kernels, and a run must not
        round differently in the step where it happens to count. Padding counts, and rows of other lengths
        count like those of the first batch of their shape.
        """
        key = (batch.tokens.shape, None if batch.context is None else batch.context.shape, sleep.passes)
        if key not in self._flops_of:
            self._flops_of[key] = _count_flops(self.model, batch, sleep, self.config.train, self._autocast())
        return self._flops_of[key]

    def _position(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.tokens,
            "flops": self.flops,
            "seconds": round(self.seconds, 3),
        }

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast)


def _autocasts(train: TrainConfig, device: torch.device) -> bool:
    """Whether blocks compute in bfloat16."""
    if train.precision != "auto":
        return train.precision == "bfloat16"
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM while a step is under way, so that the state can be saved after it."""
    caught: list[int] = []
    before = {s: signal.signal(s, lambda n, _: caught.append(n)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto": CUDA where PyTorch sees it, else the CPU.

    Raises:
        ValueError: if there is none of that name here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}: PyTorch sees no CUDA device here; use device='cpu' or 'auto'")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r} is none that PyTorch knows; use 'auto', 'cpu' or 'cuda'") from None
