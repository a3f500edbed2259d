"""Recall as a task: options, batches, floors, and the solver that reads tokens."""

from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch

from lmsleep.tasks.base import HIDDEN, Batch
from lmsleep.tasks.gsm_infinite import GSMInfinite
from lmsleep.tasks.recall import documents, planted
from lmsleep.tasks.recall.floors import floors
from lmsleep.tasks.recall.planted import RELATIONS, TOLD, Teller, label
from lmsleep.tasks.recall.story import Story
from lmsleep.text import Split
from lmsleep.text.packing import pad
from lmsleep.text.tokenizers import Tokenizer, absolute, load_tokenizer, tokenizer_files

KINDS = ("facts", "hops", "documents", "problems", "prose")
PROSE = 48  # tokens that are predicted after a passage of prose
MOST = 12  # facts in a text: there must be names and colors for all
OPS = (1, 4)  # operations of a problem
MISFITS = 100  # texts that are too long for a context before we give up
FLOOR_SAMPLES = 2000  # texts
MOST_CHARACTERS = 20  # of a token of prose, on average


LABELS = [
    *(label(kind, told) for kind in (*RELATIONS, planted.HOP) for told in TOLD),
    *documents.KINDS,
    *(f"op{op}" for op in range(OPS[0], OPS[1] + 1)),
]


class Row(NamedTuple):
    """What is read after a context."""

    tokens: list[int]
    learned: int
    """From this place on tokens carry loss."""
    answer: slice
    """The tokens that are scored; empty where nothing was asked."""
    key: int = 0
    """The difficulty key of the answer."""


class Sample(NamedTuple):
    """A context in tokens, and its rows."""

    context: list[int]
    rows: list[Row]


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

    Documents are passages of the Python reference, with questions that are made by rule: which method or
    option is described so, what it takes, which word is missing. Problems are those of GSM-Infinite, with one
    to four operations and no noise. Prose is a passage of the same reference and how it goes on: nothing is
    asked and nothing scored, but a memory that was trained on answers alone speaks into every text.

    An answer is followed by the end of a text, if the tokenizer has one: it is learned and, but for problems,
    not scored.

    The test asks for combinations of name and value that were never trained; a quarter of its texts each has
    names never trained (`color+names`), wordings never trained (`color+wordings`), or more filler. Of
    documents one in eight is for the test.
    """

    kinds: tuple[str, ...] = ("facts", "hops")
    """Kinds of sample: facts, hops, documents, problems, prose."""
    shares: tuple[float, ...] = ()
    """How often each kind comes, beside the others; default: equally often."""
    facts: tuple[int, int] = (1, 4)
    """Fewest and most facts of a text (of hops: pairs of facts; of documents: entries or paragraphs)."""
    filler: tuple[int, int] = (0, 4)
    """Fewest and most sentences between facts that say nothing; `+filler` of the test has more."""
    length: int = 1000
    """Most tokens of a context; what is longer is drawn anew."""
    documents: tuple[Path, ...] = ()
    """Documents beside the Python reference: manual pages (/usr/share/man/man1/ls.1.gz) or plain text."""
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
        if self.length < 1:
            raise ValueError(f"length must be at least 1 token, got {self.length}")
        if self.kinds == ("prose",):
            raise ValueError("kinds: of prose nothing is asked; name another kind beside it")
        if self.documents and not self._reads:
            raise ValueError(
                f"documents={self.documents} need 'documents' or 'prose' among kinds, got {self.kinds}"
            )
        object.__setattr__(self, "tokenizer", absolute(self.tokenizer))

    def sources(self) -> tuple[Path, ...]:
        """Return the files that batches are drawn from: documents, and those of the tokenizer."""
        files = [*tokenizer_files(self.tokenizer), *self.documents]
        if self._reads and (found := find_spec("pydoc_data.topics")) and found.origin:
            files.append(Path(found.origin))
        return tuple(files)

    @property
    def vocab_size(self) -> int:
        """The tokenizer's size (bytes: 256); with problems that of `GSMInfinite`."""
        return self._problems.vocab_size if "problems" in self.kinds else self._tokenizer.vocab_size

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

        Over all questions of the test, and of each kind, in texts of any length; of problems as `GSMInfinite`
        has them.
        """
        random = Random(0)
        kinds = [
            kind for kind in random.choices(self.kinds, self._shares, k=FLOOR_SAMPLES) if kind != "prose"
        ]
        number = kinds.count("problems")
        drawn = [self._draw(random, kind, "test", 1.0)[0] for kind in kinds if kind != "problems"]
        asked = [question for story in drawn for question in story.questions]
        return floors(asked, number, self._problems.floors() if number else {})

    def batch(self, rng: np.random.Generator, size: int, split: Split, level: float = 1.0) -> Batch:
        """Draw `size` texts with all their questions.

        `level` caps facts, filler and operations at `ceil(level most)`, but not below the fewest.

        Raises:
            ValueError: for documents that cannot be read, or if no text fits into `length`.
        """
        random = Random(int(rng.integers(2**63)))  # far quicker than numpy for single draws
        kinds = random.choices(self.kinds, self._shares, k=size)
        # In one draw, for what makes problems makes batches of them.
        problems = iter(self._draw_problems(rng, kinds.count("problems"), split, level))
        return _together(
            [
                next(problems) if kind == "problems"
                else self._prose(random, split) if kind == "prose"
                else self._sample(random, kind, split, level)
                for kind in kinds
            ]
        )  # fmt: skip

    def solve(self, tokens: list[int]) -> list[list[int]]:
        """See `Task.solve`."""
        if HIDDEN not in tokens:  # prose
            return []
        read = tokens[: tokens.index(HIDDEN)]
        if "problems" in self.kinds:
            mark = self._problems.marks.answer
            if read[-len(mark) :] == mark:
                return self._problems.solve(tokens)
        text, question = self._tokenizer.decode(read[len(self._tokenizer.begin) :]).rsplit("\n", 1)
        answers = documents.solutions(text, question)
        return [self._row(question, answers.pop() if answers else planted.solve(text, question))[1]]

    def spell(self, tokens: list[int]) -> str:
        """Decode with the tokenizer; problems may have tokens beyond it, as `GSMInfinite` names them."""
        if max(tokens, default=0) >= self._tokenizer.vocab_size:
            return self._problems.spell(tokens)
        return self._tokenizer.decode(tokens)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer)

    @cached_property
    def _problems(self) -> GSMInfinite:
        return GSMInfinite(
            ops=OPS, length=(0, self.length), noise=False, question="last", tokenizer=self.tokenizer
        )

    @property
    def _reads(self) -> bool:
        """Whether documents are read."""
        return not {"documents", "prose"}.isdisjoint(self.kinds)

    @property
    def _shares(self) -> tuple[float, ...]:
        return self.shares or (1.0,) * len(self.kinds)

    def _draw_problems(
        self, rng: np.random.Generator, number: int, split: Split, level: float
    ) -> list[Sample]:
        if not number:
            return []
        batch, samples = self._problems.batch(rng, number, split, level), []
        for i, op in enumerate(batch.difficulty.tolist()):
            context, row, answers = batch.row(i)
            length = sum(answer >= 0 for answer in answers)
            start = len(row) - length
            samples.append(Sample(context, [Row(row, start, slice(start, None), LABELS.index(f"op{op}"))]))
        return samples

    def _prose(self, random: Random, split: Split) -> Sample:
        """Draw a passage of at least half of `length` tokens, and the tokens that follow it."""
        begin = self._tokenizer.begin
        for _ in range(MISFITS):
            text = documents.prose(random, split, self.documents)
            most = self.length - len(begin)
            size = random.randint(ceil(most / 2), most)
            tokens = self._tokenizer.encode(text[: MOST_CHARACTERS * (size + PROSE)])
            if len(tokens) >= size + PROSE:
                row = Row(tokens[size : size + PROSE], 1, slice(0))
                return Sample([*begin, *tokens[:size]], [row])
        raise ValueError(f"length={self.length} is too long: of {MISFITS} passages none has as many tokens")

    def _sample(self, random: Random, kind: str, split: Split, level: float) -> Sample:
        """Draw a text that fits, in tokens."""
        for _ in range(MISFITS):
            story, told = self._draw(random, kind, split, level)
            context = [*self._tokenizer.begin, *self._tokenizer.encode(story.text)]
            if story.questions and len(context) <= self.length:
                break
        else:
            raise ValueError(
                f"length={self.length} is too short: of {MISFITS} texts of {kind} none fits; "
                "use fewer facts or less filler"
            )
        end = [] if self._tokenizer.end is None else [self._tokenizer.end]
        rows = []
        for question in story.questions:
            before, answer = self._row(question.text, question.answer)
            scored = slice(len(before), len(before) + len(answer))
            key = LABELS.index(label(question.kind, told))
            rows.append(Row([*before, *answer, *end], len(before), scored, key))
        return Sample(context, rows)

    def _draw(self, random: Random, kind: str, split: Split, level: float) -> tuple[Story, str]:
        """Draw a text with its questions, and how it is told."""
        number = random.randint(self.facts[0], max(self.facts[0], ceil(level * self.facts[1])))
        if kind == "documents":
            return documents.draw(random, split, self.documents, number), TOLD[0]
        told = TOLD[0] if split == "train" else random.choice(TOLD)
        fewest, most = self.filler
        fill = random.randint(fewest, max(fewest, ceil(level * most)))
        if told == "filler":
            fill = random.randint(most + 1, 2 * most + 4)
        teller = Teller(random, split, told)
        return (teller.facts if kind == "facts" else teller.hops)(number, fill), told

    def _row(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a question and those of its answer."""
        before = self._tokenizer.encode(f"\n{question}")
        whole = self._tokenizer.encode(f"\n{question} {answer}")
        # Where the tokenizer cuts the whole otherwise, the answer is what it makes of it alone.
        if whole[: len(before)] == before:
            return before, whole[len(before) :]
        return before, self._tokenizer.encode(f" {answer}")


def _together(samples: list[Sample]) -> Batch:
    """Pad samples into a batch."""
    context, context_lengths = pad([np.array(sample.context) for sample in samples])
    rows = [row for sample in samples for row in sample.rows]
    tokens, lengths = pad([np.array(row.tokens) for row in rows])
    answers, loss_mask = torch.full(tokens.shape, -1), torch.zeros(tokens.shape, dtype=torch.bool)
    keys = list[int]()
    for number, row in enumerate(rows):
        loss_mask[number, row.learned : len(row.tokens)] = True
        if row.tokens[row.answer]:
            answers[number, : len(row.tokens)][row.answer] = len(keys)
            keys.append(row.key)
    return Batch(
        tokens=tokens,
        loss_mask=loss_mask,
        answers=answers,
        difficulty=torch.tensor(keys, dtype=torch.int64),
        context=context,
        context_row=torch.tensor([i for i, sample in enumerate(samples) for _ in sample.rows]),
        context_lengths=context_lengths,
        lengths=lengths,
    )
