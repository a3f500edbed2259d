"""Recall as a task: options, batches, floors, and the solver that reads tokens."""

from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property
from math import ceil
from pathlib import Path
from random import Random
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch

from lmsleep.tasks.base import HIDDEN, Batch
from lmsleep.tasks.recall.planted import RELATIONS, TOLD, Story, Teller, solve
from lmsleep.text import Split
from lmsleep.text.packing import pad
from lmsleep.text.tokenizers import Tokenizer, absolute, load_tokenizer, tokenizer_files

KINDS = ("facts", "hops")
MOST = 12  # facts in a text: there must be names and colors for all
MISFITS = 100  # stories that are too long for a context before we give up
FLOOR_SAMPLES = 2000  # stories


def _label(kind: str, told: str) -> str:
    return kind if told == TOLD[0] else f"{kind}+{told}"


LABELS = [_label(kind, told) for kind in (*RELATIONS, "hop") for told in TOLD]


class Sample(NamedTuple):
    """A context in tokens, and its rows with the length and the key of the answer that each ends with."""

    context: list[int]
    rows: list[tuple[list[int], int, int]]


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Real English, read, slept on and evicted; then questions about it.

    One sample of facts, with the answers in brackets; each question alone, on its own fork of the memory:

        context  Anna has a red hat. The market was busy that morning. The hat of Ben is blue.
        row      What color is Ben's hat? It is [ blue]
        row      What color is Anna's hat? It is [ red]

    One of hops is answered by two sentences: of whom Carol is a friend, and what that one has:

        context  Ben's hat is blue. Carol is a friend of Anna. Anna owns a red hat. Dora's friend is Ben.
        row      What color is the hat of Carol's friend? It is [ red]

    The test asks for combinations of name and value that were never trained; a quarter of its texts each has
    names never trained (`color+names`), wordings never trained (`color+wordings`), or more filler.
    """

    kinds: tuple[str, ...] = KINDS
    """Kinds of sample: facts, hops."""
    shares: tuple[float, ...] = ()
    """How often each kind comes, beside the others; default: equally often."""
    facts: tuple[int, int] = (1, 4)
    """Fewest and most facts of a text (of hops: pairs of facts), all of which are asked for."""
    filler: tuple[int, int] = (0, 4)
    """Fewest and most sentences between them that say nothing; `+filler` of the test has more."""
    length: int = 1000
    """Most tokens of a context."""
    tokenizer: str = "bytes"
    """bytes, or the folder of a Hugging Face tokenizer."""

    def __post_init__(self) -> None:
        if not self.kinds or not set(self.kinds) <= set(KINDS) or len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds must be some of {', '.join(KINDS)}, each once, got {self.kinds}")
        if self.shares and (len(self.shares) != len(self.kinds) or min(self.shares) <= 0):
            raise ValueError(f"shares must be positive, one for each of {self.kinds}, got {self.shares}")
        if not 1 <= self.facts[0] <= self.facts[1] <= MOST:
            raise ValueError(f"facts must be 1 <= fewest <= most <= {MOST}, got {self.facts}")
        if not 0 <= self.filler[0] <= self.filler[1]:
            raise ValueError(f"filler must be 0 <= fewest <= most, got {self.filler}")
        object.__setattr__(self, "tokenizer", absolute(self.tokenizer))

    def sources(self) -> tuple[Path, ...]:
        """Return the files of the tokenizer, which batches hang on."""
        return tokenizer_files(self.tokenizer)

    @property
    def vocab_size(self) -> int:
        """The tokenizer's size (bytes: 256)."""
        return self._tokenizer.vocab_size

    @property
    def difficulty_name(self) -> str:
        """The difficulty key is the kind of question: a number of `difficulty_labels`."""
        return "kind"

    @property
    def difficulty_labels(self) -> list[str]:
        """The names of the kinds of question."""
        return LABELS

    def floors(self) -> dict[str, float]:
        """Guess among the answers of its kind in the text ("chance"), or say always the same ("constant").

        Over all questions of the test, and of each kind.
        """
        return _floors(self.kinds, self._shares, self.facts)

    def batch(self, rng: np.random.Generator, size: int, split: Split, level: float = 1.0) -> Batch:
        """Draw `size` texts with all their questions.

        `level` caps facts and filler at `ceil(level most)`, but not below the fewest.

        Raises:
            ValueError: if no text fits into `length`.
        """
        random = Random(int(rng.integers(2**63)))  # far quicker than numpy for single draws
        return _together([self._sample(random, split, level) for _ in range(size)])

    def solve(self, tokens: list[int]) -> list[list[int]]:
        """See `Task.solve`."""
        read = self._tokenizer.decode(tokens[len(self._tokenizer.begin) : tokens.index(HIDDEN)])
        text, question = read.rsplit("\n", 1)
        return [self._row(question, solve(text, question))[1]]

    def spell(self, tokens: list[int]) -> str:
        """Decode with the tokenizer."""
        return self._tokenizer.decode(tokens)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer)

    @property
    def _shares(self) -> tuple[float, ...]:
        return self.shares or (1.0,) * len(self.kinds)

    def _sample(self, random: Random, split: Split, level: float) -> Sample:
        """Draw a text that fits, in tokens."""
        for _ in range(MISFITS):
            story, told = _draw(random, split, level, self.kinds, self._shares, self.facts, self.filler)
            context = [*self._tokenizer.begin, *self._tokenizer.encode(" ".join(story.sentences))]
            if len(context) <= self.length:
                break
        else:
            raise ValueError(
                f"length={self.length} is too short: of {MISFITS} texts none fits; use fewer facts or filler"
            )
        rows = []
        for question in story.questions:
            row, answer = self._row(question.text, question.answer)
            rows.append((row + answer, len(answer), LABELS.index(_label(question.kind, told))))
        return Sample(context, rows)

    def _row(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a question and those of its answer."""
        before = self._tokenizer.encode(f"\n{question}")
        whole = self._tokenizer.encode(f"\n{question} {answer}")
        # Where the tokenizer cuts the whole otherwise, the answer is what it makes of it alone.
        alone = (
            whole[len(before) :] if whole[: len(before)] == before else self._tokenizer.encode(f" {answer}")
        )
        return before, alone


def _draw(
    random: Random,
    split: Split,
    level: float,
    kinds: tuple[str, ...],
    shares: tuple[float, ...],
    facts: tuple[int, int],
    filler: tuple[int, int],
) -> tuple[Story, str]:
    """Draw a story, and how it is told."""
    (kind,) = random.choices(kinds, shares)
    told = TOLD[0] if split == "train" else random.choice(TOLD)
    number = random.randint(facts[0], max(facts[0], ceil(level * facts[1])))
    fill = random.randint(filler[0], max(filler[0], ceil(level * filler[1])))
    if told == "filler":
        fill = random.randint(filler[1] + 1, 2 * filler[1] + 4)
    teller = Teller(random, split, told)
    return (teller.facts if kind == "facts" else teller.hops)(number, fill), told


def _together(samples: list[Sample]) -> Batch:
    """Pad samples into a batch."""
    context, context_lengths = pad([np.array(sample.context) for sample in samples])
    rows = [row for sample in samples for row in sample.rows]
    tokens, lengths = pad([np.array(row) for row, _, _ in rows])
    answers = torch.full(tokens.shape, -1)
    for number, (row, length, _) in enumerate(rows):
        answers[number, len(row) - length : len(row)] = number
    return Batch(
        tokens=tokens,
        loss_mask=answers >= 0,
        answers=answers,
        difficulty=torch.tensor([key for _, _, key in rows]),
        context=context,
        context_row=torch.tensor([i for i, sample in enumerate(samples) for _ in sample.rows]),
        context_lengths=context_lengths,
        lengths=lengths,
    )


@cache
def _floors(kinds: tuple[str, ...], shares: tuple[float, ...], facts: tuple[int, int]) -> dict[str, float]:
    """See `Recall.floors`."""
    random = Random(0)
    answers: dict[str, Counter[str]] = {}
    chances: dict[str, list[float]] = {}
    for _ in range(FLOOR_SAMPLES):
        story, told = _draw(random, "test", 1.0, kinds, shares, facts, (0, 0))
        for question in story.questions:
            label = _label(question.kind, told)
            answers.setdefault(label, Counter())[question.answer] += 1
            chances.setdefault(label, []).append(1 / question.candidates)
    found = [label for label in LABELS if label in answers]
    together = sum(answers.values(), Counter[str]())
    return {
        "chance": fmean(chance for label in found for chance in chances[label]),
        "constant": max(together.values()) / together.total(),
        **{f"chance kind={k}": fmean(chances[k]) for k in found},
        **{
            f"constant kind={label}": max(answers[label].values()) / answers[label].total() for label in found
        },
    }
