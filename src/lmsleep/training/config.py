"""A run as plain data: task, model, sleep, training."""

from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from lmsleep import backbones
from lmsleep.backbones import kind_of
from lmsleep.backbones.hybrid import hybrid_options
from lmsleep.models import HybridConfig
from lmsleep.plain import from_plain, to_plain
from lmsleep.sleep import Hard, SleepConfig
from lmsleep.sleep.config import TRAINING
from lmsleep.tasks import Task, find_task, task_name


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation, evaluation and saving. Defaults are tuned for small models on a CPU."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 64
    """Sequences (graphs, for depo with ask="fork") per step."""
    accumulate: int = 1
    """Parts that a step's batch is read in, their gradients added up: the memory of one, and the same step up
    to rounding."""
    draws: int = 1
    """Draws that a step's batch is made of, each with a key of its own. Several processes make only theirs,
    where there are as many; of one draw each makes the whole and reads its rows."""
    batches: int | None = None
    """Draw so many batches, and read them again and again, in another order in each epoch; default: new ones
    in every step."""
    keep: Path | None = None
    """Folder for hidden states of a pretrained model whose memory layers alone are trained: each of the
    `batches` goes through what is frozen once. FLOPs are counted as if nothing were kept."""
    seed: int = 0
    """Seed of the weights and of the data order; the data do not depend on anything else."""
    start: Path | None = None
    """Run or model to take the first weights from; default: random ones, by the seed."""
    inserted: tuple[int, ...] = ()
    """Blocks that the start does not have; they begin by writing nothing into the residual stream."""
    only_inserted: bool = False
    """Train the inserted blocks alone."""
    lr: float = 0.02
    """Learning rate of Muon (the matrices inside the blocks). The paper: 2e-3."""
    adam_lr: float = 0.01
    """Learning rate of AdamW (embedding, head, norms, gates, convolutions). The paper: 5e-5."""
    weight_decay: float = 0.0
    """Decoupled weight decay of both."""
    warmup: int = 20
    """Steps over which the learning rates rise."""
    decay: float = 0.3
    """Last share of the steps, over which they fall to zero."""
    clip: float = 1.0
    """Largest gradient norm."""
    curriculum: int = 0
    """Steps over which the difficulty rises to its full range; 0: full from the start."""
    random_passes: bool = False
    """Draw the passes of each step uniformly from 1 ... N, for a model that can be read with any."""
    early_steps: int = 0
    """First steps, which make `early_passes` passes at most: few early and many late cost less."""
    early_passes: int = 2
    """N of the first `early_steps`."""
    backprop_passes: int | None = None
    """Passes of a window, counted from the last, through which gradients flow. None: all."""
    checkpoint: bool = False
    """Of the activations keep only h and S between passes for the backward pass; recompute the others."""
    eval_every: int = 100
    """Steps between evaluations."""
    eval_batches: int = 4
    """Test batches in each (the final report takes four times as many)."""
    save_every: int = 500
    """Steps between checkpoints (one is also saved at the end and on SIGINT or SIGTERM)."""
    device: str = "auto"
    """auto (CUDA where present), cpu, cuda, ..."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the blocks; auto: bfloat16 autocast on CUDA, float32 elsewhere. S stays float32."""
    threads: int | None = None
    """CPU threads; default all, or of runs side by side an equal share."""
    data_workers: int = 0
    """Processes that draw batches ahead; 0: the training process draws them itself."""
    tensorboard: bool = False
    """Write TensorBoard events beside metrics.jsonl (needs the extra "track")."""

    def __post_init__(self) -> None:
        names = (
            "steps",
            "batch_size",
            "accumulate",
            "draws",
            "early_passes",
            "eval_every",
            "eval_batches",
            "save_every",
        )
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("backprop_passes", "batches"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batches is not None and self.curriculum > self.batches:
            raise ValueError(
                f"curriculum={self.curriculum} must not exceed batches={self.batches}: each is drawn once"
            )
        if self.keep is not None and self.batches is None:
            raise ValueError("keep: new batches have no kept hidden states; say how many there are: batches")
        for name in ("accumulate", "draws"):
            if getattr(self, name) > self.batch_size:
                raise ValueError(
                    f"{name}={getattr(self, name)} must not exceed the batch_size={self.batch_size} sequences"
                )
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision must be auto, float32 or bfloat16, got {self.precision!r}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        for name in ("lr", "adam_lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup", "curriculum", "early_steps", "seed", "data_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.inserted and self.start is None:
            raise ValueError("inserted: blocks are inserted into a model; name it with start")
        if self.only_inserted and not self.inserted:
            raise ValueError("only_inserted leaves nothing to train: name the blocks with inserted")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay must lie in 0 ... 1, got {self.decay}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that determines a run."""

    task: Task
    model: Any
    """Options of a backbone of any kind (`lmsleep.backbones`): `HybridConfig`, `FineTune`, one's own."""
    sleep: SleepConfig
    train: TrainConfig
    fit: InitVar[bool] = True
    """Give the model as many tokens as the task has. False: it has them, and the task is not asked, which may
    have to read its data to know."""

    def __post_init__(self, fit: bool) -> None:
        self._check_window()
        self._check_backward()
        kind = kind_of(self.model)
        # The dataclass is frozen; this one field depends on another: the task says how many tokens there are.
        if fit:
            object.__setattr__(self, "model", kind.fitted(self.model, self.task.vocab_size))
        # Only now: the checks are about the model as it will be built.
        kind.check(self.model, self.sleep)
        if self.train.keep is not None:
            kind.check_keep(self.model, self.sleep)
        if self.train.start is not None:
            kind.check_start(self.model, self.train.inserted)

    def _check_backward(self) -> None:
        """Refuse ways of going backward through passes where there are no such passes."""
        by, train = self.sleep.consolidator, self.train
        limit = train.backprop_passes
        if limit is not None and limit > by.passes:
            raise ValueError(f"backprop_passes must lie in 1 ... passes={by.passes}, got {limit}")
        by.check_backward(limit, train.checkpoint)

    def _check_window(self) -> None:
        """Refuse windows that hold some of the context and some of the answers, where these follow inline."""
        before, window = getattr(self.task, "inline_context", None), self.sleep.window
        # Answers in one window with the end of their context would read it by attention; Algorithm 1 would
        # not sleep on that window, for it carries loss. Sliding windows have no such boundary.
        if before and window and isinstance(self.sleep.eviction, Hard) and before % window:
            raise ValueError(
                f"window={window} puts the end of the context and the answers into one window; choose one "
                f"that divides the {before} tokens of the context"
            )

    @property
    def architecture(self) -> HybridConfig:
        """Return the model, where it must be a hybrid.

        Raises:
            ValueError: if it is not.
        """
        return hybrid_options(self.model)

    @property
    def task_name(self) -> str:
        """Return the name by which `find_task` finds the task's class."""
        return task_name(self.task)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as plain data: what a task has read stays here, and workers find a user's class by name."""
        return RunConfig.from_dict, (self.to_dict(), False)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form, read back by `from_dict`; paths are absolute."""
        return {
            "task": {"name": self.task_name, **to_plain(self.task)},
            "model": kind_of(self.model).to_dict(self.model),
            "sleep": self.sleep.to_dict(),
            "train": to_plain(self.train),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], fit: bool = True) -> Self:
        """Invert `to_dict`, also after a trip through JSON; `fit` is that of the class.

        Raises:
            ValueError: for a missing, unknown or invalid field.
        """
        try:
            # A copy, for the name is taken out of it and `data` is the caller's.
            task = dict(data["task"])
            name = task.pop("name")
            # In older runs what is said of the backward pass stands with the sleep.
            training = {k: data["sleep"][k] for k in TRAINING if k in data["sleep"]}
            return cls(
                task=from_plain(find_task(name), task),
                model=backbones.from_dict(data["model"]),
                sleep=SleepConfig.from_dict(data["sleep"]),
                # What the training says of itself comes last and wins.
                train=from_plain(TrainConfig, {**training, **data["train"]}),
                fit=fit,
            )
        # A damaged file can hold anything where a mapping is expected; ValueErrors already say what is wrong.
        except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"not a run configuration: {error}") from error
