"""Slow weights: what a stream holds is distilled into an adapter, and is known with nothing in view.

Context distillation (Askell et al., arXiv 2112.00861; Snell et al., arXiv 2209.15189): the teacher is the
model as the stream left it, its fast weights and its open window, with the text in view besides; the student
is the same model with an adapter and an empty state. What is made alike, by the KL divergence, is how they
predict the next token, on the text itself and on what the teacher writes when it goes on.
"""

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmsleep.files import replacing_folder
from lmsleep.progress import progress
from lmsleep.session.answer import Answer
from lmsleep.session.rows import Row, advance, raise_first
from lmsleep.session.sampling import Sampling
from lmsleep.session.stream import Stream, awake
from lmsleep.sleep import Backbone, SleepConfig
from lmsleep.state import State

CLIP = 1.0  # most that the norm of a step's gradients is


class Adapted(Backbone, Protocol):
    """A backbone with an adapter, whose weights alone require gradients."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All weights, those of the adapter among them."""
        ...

    def save(self, folder: Path, about: Mapping[str, str]) -> None:
        """Write the adapter, and a card with the rows `about`, into a folder."""
        ...


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How what a session holds is distilled into an adapter."""

    rank: int = 16
    """Rank of the adapter (LoRA)."""
    alpha: float = 32.0
    """Its scale is alpha / rank."""
    targets: tuple[str, ...] = ()
    """Linear maps that get it, by the last part of their names (q_proj down_proj ...); default all inside the
    blocks but routers of experts and inserted memory layers."""
    steps: int = 100
    """Steps of AdamW."""
    lr: float = 1e-3
    """Learning rate of the first step, from where it falls to zero."""
    batch: int = 4
    """Rows of a step: windows of the text, and continuations that the teacher wrote."""
    samples: int = 4
    """Continuations that the teacher writes of each window of the text. Without a text they are all there is:
    take more."""
    length: int = 64
    """Longest continuation, in tokens."""
    seed: int = 0
    """Of the adapter's first weights, of what is sampled, and of the order of the rows."""

    def __post_init__(self) -> None:
        for name, least in {"rank": 1, "steps": 1, "batch": 1, "samples": 0, "length": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("alpha", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class SlowWeights:
    """What a distillation left.

    Attributes:
        model: the backbone with the adapter, as `Session` takes it; it shares the weights of the session's
            model, which has no adapter.
        divergence: of each step, before it: nats a token between teacher and student.
        text_tokens: of the text.
        sampled_tokens: of what the teacher wrote.
        seconds: that it took, sampling included.
        how: the options.
    """

    model: Any
    divergence: tuple[float, ...]
    text_tokens: int
    sampled_tokens: int
    seconds: float
    how: Distillation

    @property
    def nbytes(self) -> int:
        """Count the bytes of the adapter."""
        return sum(p.nbytes for p in self.model.parameters() if p.requires_grad)

    def save(self, folder: str | Path) -> None:
        """Write the adapter as a folder in the format of `peft`, complete or not at all.

        Raises:
            FileExistsError: if there is something at `folder`.
            OSError: if it cannot be written.
        """
        folder = Path(folder)
        if folder.exists():
            raise FileExistsError(f"folder={str(folder)!r} exists; name another")
        how, first, last = self.how, self.divergence[0], self.divergence[-1]
        about = {
            "distilled on": f"{self.text_tokens:,} tokens of text, {self.sampled_tokens:,} that were sampled",
            "training": f"{how.steps} steps of {how.batch} rows, learning rate {how.lr:g}, seed {how.seed}",
            "divergence": f"{first:.3f} nats a token at first, {last:.3f} at last",
        }
        with replacing_folder(folder) as partial:
            self.model.save(partial, about)


@dataclass(frozen=True, eq=False)
class Lesson:
    """Tokens that the student reads from nothing, and what the teacher makes of them.

    Attributes:
        tokens: `[t]` int64.
        h: `[1, t, d]`, hidden states of the teacher after them; its head makes logits of these again in each
            step, for logits of a large vocabulary would be a hundred times as many numbers.
        sampled: the teacher wrote them.
    """

    tokens: Tensor
    h: Tensor
    sampled: bool

    def loss(self, teacher: Backbone, student: Backbone) -> Tensor:
        """Return the divergence of the student from the teacher, summed over the tokens, in nats."""
        with torch.no_grad():
            wanted = teacher.head(self.h)
        return divergence(student.head(_read(student, self.tokens, student.initial_state(1))), wanted)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher || student) in nats of logits `[..., V]`, summed, in float32 or better."""
    wide = torch.promote_types(student.dtype, torch.float32)
    q, p = (logits.to(wide).log_softmax(-1) for logits in (student, teacher))
    return F.kl_div(q, p, reduction="sum", log_target=True)


@dataclass(frozen=True, eq=False)
class Teacher:
    """A model as a stream left it.

    Attributes:
        model: that read the stream.
        sleep: how it sleeps; what the teacher reads besides stays in view.
        stream: what it has read.
        cue: `[n]` int64, what continuations begin with.
        ends: tokens that end one.
    """

    model: Backbone
    sleep: SleepConfig
    stream: Stream
    cue: Tensor
    ends: Collection[int]

    @torch.no_grad()
    def lessons(self, windows: Sequence[Tensor], how: Distillation, bar: Any) -> Iterator[Lesson]:
        """Yield each window `[n]`, read once more, and the continuations that are written after it.

        Without any window continuations are written after the stream itself.
        """
        for number, window in enumerate(windows or [self.cue[:0]]):
            before = self._on(self.stream, window[:-1])
            state = self._on(before, window[-1:]).state
            if len(window):
                yield Lesson(window, _read(self.model, window, state), sampled=False)
            first = how.seed + number * how.samples
            seeds = range(first, first + how.samples)
            for written in self._written(before, torch.cat([window[-1:], self.cue]), how.length, seeds):
                if len(tokens := torch.cat([self.cue, written])):
                    yield Lesson(tokens, _read(self.model, tokens, state), sampled=True)
            bar.update(1)

    def _on(self, stream: Stream, tokens: Tensor) -> Stream:
        """Return a stream after tokens that are read awake, and not evicted."""
        open_end = replace(self.sleep, window=None)
        return awake(self.model, open_end, [stream], [tokens]).streams[0] if len(tokens) else stream

    def _written(self, stream: Stream, unread: Tensor, length: int, seeds: Sequence[int]) -> list[Tensor]:
        """Return what the model writes, `[n]` each, after it has read `unread`; drawn as it predicts."""
        rows = [
            Row(
                stream=stream,
                unread=unread,
                budget=length,
                answer=Answer(None, (*self.ends,)),
                sampling=Sampling(temperature=1.0),
                generator=torch.Generator().manual_seed(seed),
            )
            for seed in seeds
        ]
        while not all(row.done for row in rows):
            rows = advance(self.model, replace(self.sleep, window=None), rows)
            raise_first(rows)
        return [torch.tensor(row.answer.tokens, dtype=torch.int64) for row in rows]


def _read(model: Backbone, tokens: Tensor, state: State) -> Tensor:
    """Return the hidden states `[1, t, d]` after all blocks, of tokens `[t]` read in one ordinary pass."""
    h = model.embed(tokens[None].to(model.device))
    return model.run(h, state, 0, model.num_blocks)[0]


def distil(
    teacher: Teacher, windows: Sequence[Tensor], how: Distillation, *, show: bool = False
) -> SlowWeights:
    """Distil what a teacher holds, and windows of a text, into an adapter; see `Session.consolidate`.

    Args:
        teacher: the model and what it has read.
        windows: `[n]` int64 each, of a text; none: the teacher writes all that is distilled on.
        how: the options.
        show: draw progress bars.

    Raises:
        ValueError: for a model that takes no adapter of `peft`, if there is nothing to learn, or the training
            diverges.
    """
    model: Any = teacher.model
    if not hasattr(model, "adapted"):
        raise ValueError(
            f"{type(model).__name__} takes no adapter of peft: slow weights are those of models of "
            "transformers (lmsleep.adapt)"
        )
    begin = time.perf_counter()
    student: Adapted = model.adapted(rank=how.rank, alpha=how.alpha, targets=how.targets, seed=how.seed)
    with progress(show=show, total=max(len(windows), 1), desc="teacher", leave=False) as bar:
        taught = list(teacher.lessons(windows, how, bar))
    if not taught:
        raise ValueError("there is nothing to distil on: no text, and nothing sampled; take samples > 0")
    with progress(show=show, total=how.steps, desc="distilling", leave=False) as bar:
        losses = tuple(_trained(teacher.model, student, taught, how, bar))
    return SlowWeights(
        model=student,
        divergence=losses,
        text_tokens=sum(len(x.tokens) for x in taught if not x.sampled),
        sampled_tokens=sum(len(x.tokens) for x in taught if x.sampled),
        seconds=time.perf_counter() - begin,
        how=how,
    )


def _trained(
    teacher: Backbone, student: Adapted, taught: Sequence[Lesson], how: Distillation, bar: Any
) -> Iterator[float]:
    """Train the student; yield the divergence, in nats a token, before each step."""
    weights = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=how.lr, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / how.steps)
    order, waiting = torch.Generator().manual_seed(how.seed), list[int]()
    for _ in range(how.steps):
        while len(waiting) < min(how.batch, len(taught)):  # all of them come before one comes again
            waiting += torch.randperm(len(taught), generator=order).tolist()
        rows, waiting = [taught[i] for i in waiting[: how.batch]], waiting[how.batch :]
        tokens, total = sum(len(row.tokens) for row in rows), 0.0
        optimizer.zero_grad(set_to_none=True)
        for row in rows:  # one by one: they differ in length, and one needs the least memory
            loss = row.loss(teacher, student) / tokens
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise ValueError(f"the divergence is {total}: lr={how.lr:g} is too large, or logits are NaN")
        nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        falling.step()
        bar.set_postfix_str(f"{total:.3f} nats a token", refresh=False)
        bar.update(1)
        yield total
