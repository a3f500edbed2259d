"""What a task is: a seeded stream of batches, a vocabulary, and the floors to beat."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, get_args, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lmsleep.text import Split

HIDDEN = -1  # stands for an answer where it is to be found


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences to be read, and the answers expected in them.

    Attributes:
        tokens: `[R, T]` int64.
        loss_mask: `[R, T]` bool, the tokens to be predicted.
        answers: `[R, T]` int64: the number of the answer that a token is part of, -1 for none. An
            answer counts as right only if all its tokens are.
        difficulty: `[A]` int64, the difficulty key of each answer (hops, automaton steps, ...).
        context: `[C, Tc]` int64 or None: what is read and slept on before `tokens`.
        context_row: `[R]` int64: the context of each row (several rows may fork one memory).
        context_lengths: `[C]` int64: tokens per context; what follows is padding. None: all are full.
        lengths: `[R]` int64: tokens per row of `tokens`, likewise.
    """

    tokens: Tensor
    loss_mask: Tensor
    answers: Tensor
    difficulty: Tensor
    context: Tensor | None = None
    context_row: Tensor | None = None
    context_lengths: Tensor | None = None
    lengths: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same batch on another device."""
        moved = {k: v.to(device) for k, v in vars(self).items() if v is not None}
        return replace(self, **moved)

    @property
    def num_tokens(self) -> int:
        """The number of tokens read, without padding; a context counts once, whatever forks it."""
        read = self.tokens.numel() if self.lengths is None else int(self.lengths.sum())
        if self.context_lengths is not None:
            return read + int(self.context_lengths.sum())
        return read + (0 if self.context is None else self.context.numel())

    @property
    def num_samples(self) -> int:
        """The number of contexts, or of rows if there are none."""
        return len(self.tokens if self.context is None else self.context)

    @property
    def num_predicted(self) -> int:
        """The number of tokens that carry loss: no padding, no first token, which nothing precedes."""
        wanted = self.loss_mask
        if self.lengths is not None:
            place = torch.arange(wanted.shape[1], device=wanted.device)
            wanted = wanted & (place < self.lengths[:, None])
        return int(wanted[:, 1:].sum())

    def parts(self, number: int) -> "list[Batch]":
        """Cut the batch into at most `number` parts of about as many contexts (rows, if it has no contexts).

        Rows stay with the context they fork. `difficulty` is that of the whole batch, for `answers` count on.
        """
        if number == 1:
            return [self]
        some = torch.arange(self.num_samples, device=self.tokens.device).tensor_split(number)
        return [part for part in map(self._part, some) if len(part.tokens)]

    def share(self, rank: int, size: int) -> "Batch":
        """Return what one of `size` processes reads: every `size`-th context (row, if there are none)."""
        if size == 1:
            return self
        return self._part(torch.arange(rank, self.num_samples, size, device=self.tokens.device))

    def _part(self, some: Tensor) -> "Batch":
        """Return some contexts (rows, if there are none), by ascending number."""
        rows, split = some, {}
        if self.context_row is not None:
            rows = torch.isin(self.context_row, some).nonzero()[:, 0]
            split = {k: getattr(self, k) for k in ("context", "context_lengths")}
            split = {k: v[some] for k, v in split.items() if v is not None}
            split["context_row"] = torch.searchsorted(some, self.context_row[rows])
        for k in ("tokens", "loss_mask", "answers", "lengths"):
            if (v := getattr(self, k)) is not None:
                split[k] = v[rows]
        return replace(self, **split)

    @classmethod
    def joined(cls, batches: "Sequence[Batch]") -> "Batch":
        """Return one batch of all samples of several of one task, padded to the longest."""
        if len(batches) == 1:
            return batches[0]
        answers, contexts, moved = 0, 0, []
        for b in batches:
            # Answers and contexts are numbered over the whole batch.
            own = replace(b, answers=torch.where(b.answers < 0, b.answers, b.answers + answers))
            if b.context is not None and b.context_row is not None:
                own = replace(own, context_row=b.context_row + contexts)
                contexts += len(b.context)
            answers += len(b.difficulty)
            moved.append(own)
        made = {"difficulty": torch.cat([b.difficulty for b in moved])}
        for k, lengths, fill in (
            ("tokens", "lengths", 0), ("loss_mask", "lengths", False), ("answers", "lengths", -1),
            ("context", "context_lengths", 0),
        ):  # fmt: skip
            each = [t for b in moved if (t := getattr(b, k)) is not None]
            if not each:
                continue
            longest = max(t.shape[1] for t in each)
            made[k] = torch.cat([F.pad(t, (0, longest - t.shape[1]), value=fill) for t in each])
            ends = [getattr(b, lengths) for b in moved]
            if len({t.shape[1] for t in each}) > 1 or any(end is not None for end in ends):
                full = [t.new_full((len(t),), t.shape[1], dtype=torch.int64) for t in each]
                made[lengths] = torch.cat([f if e is None else e for e, f in zip(ends, full, strict=True)])
        if contexts:
            made["context_row"] = torch.cat([b.context_row for b in moved if b.context_row is not None])
        return cls(**made)

    def row(self, row: int) -> tuple[list[int], list[int], list[int]]:
        """Return one row without padding: its context (empty if none), its tokens, and `answers` of them."""
        context: list[int] = []
        if self.context is not None and self.context_row is not None:
            number = int(self.context_row[row])
            end = None if self.context_lengths is None else int(self.context_lengths[number])
            context = self.context[number, :end].tolist()
        end = None if self.lengths is None else int(self.lengths[row])
        return context, self.tokens[row, :end].tolist(), self.answers[row, :end].tolist()


class Task(Protocol):
    """A task: plain data (a frozen dataclass of options) that can draw batches."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def vocab_size(self) -> int:
        """The number of tokens in the vocabulary."""
        ...

    @property
    def difficulty_name(self) -> str:
        """The name of what the difficulty key counts."""
        ...

    def batch(self, rng: np.random.Generator, size: int, split: Split, level: float = 1.0) -> Batch:
        """Draw `size` samples; `level` in (0, 1] caps the difficulty (a curriculum)."""
        ...

    def floors(self) -> dict[str, float]:
        """Return the accuracy of guessing ("chance") and of the best constant answer ("constant").

        Others are what is reached without that which the task is about: "one hop" (Depo), "no chain"
        (GSM-Infinite). A floor that depends on the difficulty is also given by itself, as "constant op=3"
        (with the `difficulty_name` and the key).
        """
        ...

    def solve(self, tokens: list[int]) -> list[list[int]]:
        """Recompute the answers from what a model reads.

        Args:
            tokens: a context and a row, with every answer replaced by one `HIDDEN` (see `hide_answers`).

        Returns:
            The tokens of each hidden answer, in order.
        """
        ...

    def spell(self, tokens: list[int]) -> str:
        """Return tokens in human-readable form."""
        ...


def batch_rng(seed: int, split: Split, index: int) -> np.random.Generator:
    """The generator of batch `index`: a function of its arguments alone, so that resuming needs no state.

    Raises:
        ValueError: for a seed outside 0 ... 2^63 - 1.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must lie in 0 ... 2^63 - 1, got {seed}")
    # Philox is counter-based: every key has a stream of its own at no cost, however far apart the indices
    # are. Training takes the even keys and tests the odd ones, so none is used twice.
    return np.random.Generator(np.random.Philox(key=[seed, 2 * index + (split == "test")]))


def difficulty_text(task: Task, key: int) -> str:
    """Return a difficulty key as people read it: `hops=3`, or `kind=color` where a task names its keys."""
    labels: Sequence[str] | None = getattr(task, "difficulty_labels", None)
    return f"{task.difficulty_name}={key if labels is None else labels[key]}"


def hide_answers(batch: Batch, row: int) -> tuple[list[int], list[list[int]]]:
    """Return what `Task.solve` takes for row `row`, and what it should return."""
    seen, tokens, answers = batch.row(row)
    hidden: dict[int, list[int]] = {}
    for token, answer in zip(tokens, answers, strict=True):
        if answer < 0:
            seen.append(token)
        elif answer in hidden:
            hidden[answer].append(token)
        else:
            seen.append(HIDDEN)
            hidden[answer] = [token]
    return seen, list(hidden.values())


def single_answers(context: np.ndarray, rows: np.ndarray, difficulty: np.ndarray) -> Batch:
    """Make a batch of contexts `[C, Tc]` and R / C questions to each, `[R, T]`, which end in the answer."""
    answers = np.full(rows.shape, -1)
    answers[:, -1] = np.arange(len(rows))
    return Batch(
        tokens=torch.from_numpy(rows),
        loss_mask=torch.from_numpy(answers >= 0),
        answers=torch.from_numpy(answers),
        difficulty=torch.from_numpy(difficulty),
        context=torch.from_numpy(context),
        context_row=torch.arange(len(context)).repeat_interleave(len(rows) // len(context)),
    )


def check_literals(options: Any, names: tuple[str, ...]) -> None:
    """Raise ValueError for an option that is none of its `Literal`'s values."""
    for name in names:
        allowed, value = get_args(get_type_hints(type(options))[name]), getattr(options, name)
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
