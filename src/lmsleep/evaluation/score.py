"""Accuracy per difficulty and bits per token, at any number of passes."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmsleep.sleep import Backbone, SleepConfig
from lmsleep.tasks import Batch, Task, batch_rng
from lmsleep.tasks.reading import read_batch
from lmsleep.text import Split

EVAL_SEED = 1_000_003  # the test stream is the same for every run


@dataclass
class Score:
    """Sums over evaluated batches; the properties are the figures.

    Attributes:
        correct: right answers per difficulty key.
        total: answers per difficulty key.
        answer_nll: nats over the tokens of these answers per difficulty key.
        answer_tokens: the numbers of these tokens.
        nll: nats over all predicted tokens, and over those of windows that began after an eviction.
        tokens: the numbers of these tokens.
    """

    correct: dict[int, int] = field(default_factory=dict)
    total: dict[int, int] = field(default_factory=dict)
    answer_nll: dict[int, float] = field(default_factory=dict)
    answer_tokens: dict[int, int] = field(default_factory=dict)
    nll: dict[str, float] = field(default_factory=lambda: {"all": 0.0, "after_eviction": 0.0})
    tokens: dict[str, int] = field(default_factory=lambda: {"all": 0, "after_eviction": 0})

    def add(self, batch: Batch, logits: Tensor, after: int | None = None) -> None:
        """Add one batch; `logits` `[R, T - 1, V]` predict tokens 1 ... T - 1; `after` as for `evaluate`."""
        tokens, answers = batch.tokens[:, 1:], batch.answers[:, 1:]
        hit = logits.argmax(-1) == tokens
        # An answer is right until one of its tokens is wrong.
        right = torch.ones(len(batch.difficulty), dtype=torch.bool, device=tokens.device)
        right[answers[(answers >= 0) & ~hit]] = False  # one wrong token spoils its answer
        # Of a batch that was read in parts, only the answers of this part count.
        asked = torch.zeros_like(right)
        asked[answers[answers >= 0]] = True
        for key in batch.difficulty[asked].unique().tolist():
            mine = asked & (batch.difficulty == key)
            self.correct[key] = self.correct.get(key, 0) + int(right[mine].sum())
            self.total[key] = self.total.get(key, 0) + int(mine.sum())

        # Half-precision logits would round bits in their third digit.
        nll = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), reduction="none")
        of_answers = answers.flatten() >= 0
        key_of = batch.difficulty[answers.flatten()[of_answers]]
        for key in key_of.unique().tolist():
            own = nll[of_answers][key_of == key]
            self.answer_nll[key] = self.answer_nll.get(key, 0.0) + float(own.double().sum())
            self.answer_tokens[key] = self.answer_tokens.get(key, 0) + len(own)
        wanted = batch.loss_mask[:, 1:].flatten()
        # Position i reads token i and predicts token i + 1.
        position = torch.arange(tokens.shape[1], device=tokens.device).repeat(len(tokens))
        evicted = position >= (tokens.shape[1] if after is None else after)
        # A context is evicted before the first token of its rows.
        if after is not None and batch.context is not None:
            evicted = torch.ones_like(evicted)
        for which, mask in (("all", wanted), ("after_eviction", wanted & evicted)):
            # float32 would lose single tokens in a sum over millions.
            self.nll[which] += float(nll[mask].double().sum())
            self.tokens[which] += int(mask.sum())

    @classmethod
    def joined(cls, scores: "Iterable[Score]") -> "Score":
        """Return the score of all that several were summed over."""
        whole = cls()
        for score in scores:
            for name in ("correct", "total", "answer_nll", "answer_tokens", "nll", "tokens"):
                sums = getattr(whole, name)
                for key, value in getattr(score, name).items():
                    sums[key] = sums.get(key, 0) + value
        return whole

    @property
    def accuracy(self) -> float:
        """The share of right answers over all difficulties."""
        return sum(self.correct.values()) / max(sum(self.total.values()), 1)

    @property
    def per_difficulty(self) -> dict[int, float]:
        """The share of right answers per difficulty key."""
        return {key: self.correct[key] / self.total[key] for key in sorted(self.total)}

    @property
    def loss_per_difficulty(self) -> dict[int, float]:
        """The mean loss of a token of an answer, in nats, per difficulty key."""
        return {key: self.answer_nll[key] / self.answer_tokens[key] for key in sorted(self.answer_tokens)}

    def bits(self, which: str = "all") -> float:
        """Return the bits per predicted token (per byte, for text in bytes); nan where there was none."""
        return self.nll[which] / self.tokens[which] / math.log(2) if self.tokens[which] else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready figures."""
        return {
            "accuracy": self.accuracy,
            "per_difficulty": {str(k): v for k, v in self.per_difficulty.items()},
            "loss_per_difficulty": {str(k): v for k, v in self.loss_per_difficulty.items()},
            "answers": {str(k): self.total[k] for k in sorted(self.total)},
            "answer_tokens": {str(k): self.answer_tokens[k] for k in sorted(self.answer_tokens)},
            "bits": self.bits(),
            "bits_after_eviction": self.bits("after_eviction") if self.tokens["after_eviction"] else None,
        }


@torch.no_grad()
def evaluate(
    model: Backbone,
    task: Task,
    sleep: SleepConfig,
    *,
    batches: int = 8,
    batch_size: int = 64,
    parts: int = 1,
    seed: int = EVAL_SEED,
    split: Split = "test",
    device: torch.device | str = "cpu",
    after: int | None = None,
    share: tuple[int, int] = (0, 1),
    progress: Callable[[int], object] = lambda read: None,
) -> Score:
    """Score `model` on `batches * batch_size` held-out samples, the same for every call with one seed.

    With `split="train"` they are such as training draws, which tells what was learned by heart. A batch is
    read in `parts` parts, in the memory of one. What counts as "after eviction" are tokens from position
    `after` on, by default the window: give it to score the same tokens with a model that evicts
    nothing. `share` (number, of how many) leaves other batches to other processes. `progress` is called with
    the number of batches that were read just now, by all of them together.

    Raises:
        ValueError: for no batches, or a position before the first.
    """
    if batches < 1:
        raise ValueError(f"batches must be at least 1, got {batches}")
    if after is not None and after < 0:
        raise ValueError(f"after must not be negative, got {after}")
    score = Score()
    number, shares = share
    for index in range(number, batches, shares):
        for part in task.batch(batch_rng(seed, split, index), batch_size, split).parts(parts):
            batch = part.to(device)
            logits = read_batch(model, batch, sleep, return_logits=True).logits
            assert logits is not None
            score.add(batch, logits, sleep.window if after is None else after)
        progress(min(shares, batches - index + number))
    return score
