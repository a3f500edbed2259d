"""GSM-Infinite as a task: options, batches, floors, and the solver that reads tokens."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, groupby
from pathlib import Path
from random import Random
from typing import Literal

import numpy as np
import torch

from lmsleep.tasks.base import HIDDEN, Batch, check_literals
from lmsleep.tasks.gsm_infinite import reader
from lmsleep.tasks.gsm_infinite.graph import MOST_OPS, draw_graph
from lmsleep.tasks.gsm_infinite.language import WORDS, Language, Tokens, language, tokenizer
from lmsleep.tasks.gsm_infinite.meaning import LARGEST, MOST, Core, draw_core
from lmsleep.tasks.gsm_infinite.no_chain import no_chain
from lmsleep.tasks.gsm_infinite.noise import noise
from lmsleep.tasks.gsm_infinite.structure import Parameter
from lmsleep.tasks.gsm_infinite.templates import TEMPLATES, Names, draw_names
from lmsleep.tasks.gsm_infinite.thinning import thinned
from lmsleep.text import Split
from lmsleep.text.tokenizers import Marks, absolute, marks, tokenizer_files

MARKERS = ("PAD", "ANSWER", "END")  # after the tokens of a tokenizer that has no end of a text
OPENING = "\nAnswer:"  # before the answer, with a tokenizer that has one
HELD_OUT = 8  # one problem in 8 is kept for testing
NAMINGS = 100  # names that are tried to tell a core in, so that it belongs to the wanted split
TRIES = 100_000  # draws of a problem of the wanted operations and split before we give up
MISFITS = 1000  # problems that are too long for a context before we give up
FLOOR_SAMPLES = 200  # problems per number of operations


@dataclass(frozen=True, kw_only=True)
class GSMInfinite:
    """Problems in words: counts, averages and unstated totals, amid statements that change nothing.

    One sample, with the answer in brackets:

        context  What is the total number of boats in Gull Point? The number of ferries in Gull Point is 3.
                 The number of blue rafts in North Reef is the number of ferries in Gull Point. ...
        row      ANSWER [3 END]

    After GSM-Infinite (Zhou et al., arXiv 2502.05252); its algorithm, our words and names.
    """

    subset: Literal["medium", "hard"] = "hard"
    """medium: counts and their totals; hard: also averages and totals of count times average."""
    mode: Literal["forward", "reverse", "mixed"] = "mixed"
    """Ask for the result, or for a number that led to a given result; mixed: half of each."""
    ops: tuple[int, int] = (1, 8)
    """Fewest and most operations; every number between is as likely. Medium problems take at least 2."""
    length: tuple[int, int] = (2000, 3300)
    """Fewest and most tokens of a context; noise fills it up to a random length between."""
    noise: bool = True
    """False: no noise, and contexts of any length up to the longest."""
    noise_numbers: bool = False
    """Noise states numbers as problems do; without any (the original), digits tell the problem from it."""
    question: Literal["first", "last"] = "first"
    """The question opens the context, or the row that is read after the context was slept on."""
    modulus: int | None = None
    """Compute modulo this number, with constants up to it (23 makes answers uniform); None: up to 1000."""
    instruction: bool = False
    """Open the context with a paragraph that says what totals and differences are; it is always the same."""
    templates: tuple[str, ...] = tuple(TEMPLATES)
    """Worlds that problems are told in: harbour, library, orchard."""
    tokenizer: str = "words"
    """'words' (those of the templates), 'bytes', or the folder of a Hugging Face tokenizer. If it has an
    eos_token, the words "Answer:" stand for ANSWER and that token for END."""

    def __post_init__(self) -> None:
        check_literals(self, ("subset", "mode", "question"))
        fewest, most = self.ops
        if not 1 <= fewest <= most <= MOST_OPS:
            raise ValueError(f"ops must be 1 <= fewest <= most <= {MOST_OPS}, got {self.ops}")
        if self.subset == "medium" and fewest == 1:
            raise ValueError(
                f"ops={self.ops}: no medium problem has one operation; begin at 2 or use subset='hard'"
            )
        if not self.templates or not set(self.templates) <= set(TEMPLATES):
            raise ValueError(f"templates must be some of {', '.join(TEMPLATES)}, got {self.templates}")
        if self.modulus is not None and not 3 <= self.modulus <= LARGEST:
            raise ValueError(f"modulus must lie in 3 ... {LARGEST}, got {self.modulus}")
        if not 0 <= self.length[0] <= self.length[1]:
            raise ValueError(f"length must be 0 <= fewest <= most, got {self.length}")
        if self.tokenizer != "words":
            object.__setattr__(self, "tokenizer", absolute(self.tokenizer))
        slack = max(spoken.longest_noise(self._noise_most) for spoken in self._languages) - 1
        if self.noise and self.length[1] - self.length[0] < slack:
            raise ValueError(
                f"length={self.length} leaves too little room: a statement of noise can have {slack + 1} "
                f"tokens, so the longest context must have at least {slack} tokens more than the shortest"
            )

    def sources(self) -> tuple[Path, ...]:
        """Return the files of the tokenizer, which batches hang on."""
        return tokenizer_files(self.tokenizer)

    @property
    def _noise_most(self) -> int | None:
        """The largest number in noise, if it has any."""
        return (
            (MOST if self.modulus is None else self.modulus - 1)
            if self.noise and self.noise_numbers
            else None
        )

    @property
    def _languages(self) -> list[Language]:
        return [language(name, self.tokenizer) for name in self.templates]

    @property
    def pad(self) -> int:
        """The token of padding: the first marker, or the end of a text where the tokenizer has one."""
        words = tokenizer(self.tokenizer)
        return words.vocab_size if words.end is None else words.end

    @property
    def marks(self) -> Marks:
        """The tokens of ANSWER and END."""
        return marks(tokenizer(self.tokenizer), OPENING, self.pad + 1)

    @property
    def vocab_size(self) -> int:
        """The vocabulary is the tokenizer's; without an end of a text also PAD, ANSWER, END."""
        words = tokenizer(self.tokenizer)
        return words.vocab_size + (len(MARKERS) if words.end is None else 0)

    @property
    def largest_token(self) -> int:
        """The largest token of the words that problems are told in; the tokenizer may have larger ones."""
        words = tokenizer(self.tokenizer)
        held = (token for word in WORDS for text in (word, f" {word}") for token in words.encode(text))
        return max(*held, self.pad, *words.begin, *self.marks.answer, self.marks.end)

    @property
    def difficulty_name(self) -> str:
        """The difficulty key counts operations, as GSM-Infinite does."""
        return "op"

    def floors(self) -> dict[str, float]:
        """Guess by the frequency of answers ("chance"), or say the best constant, over all and of each op.

        "no chain" is what a classifier reaches that sees the numbers and follows no statement to another
        (`no_chain.py`), where that was measured. All of problems of any length.
        """
        found = _floors(self.subset, self.mode, self.ops, self.modulus)
        return found | no_chain(
            self.subset, self.mode, self.ops, self.modulus, hidden=self.noise and self.noise_numbers
        )

    def batch(self, rng: np.random.Generator, size: int, split: Split, level: float = 1.0) -> Batch:
        """Draw `size` problems; `level` caps the operations at `ceil(level most)`, but not below the fewest.

        Raises:
            ValueError: if no problem of so many operations fits into `length`.
        """
        random = Random(int(rng.integers(2**63)))  # far quicker than numpy for single draws
        fewest, most = self.ops
        ops = rng.integers(fewest, max(fewest, int(np.ceil(level * most))) + 1, size)
        # Padded on the right: lengths say where a context ends, and what follows is never read.
        context = np.full((size, self.length[1]), self.pad)
        lengths = np.zeros(size, dtype=np.int64)
        tokens, ends = np.full((size, self._row_length), self.pad), lengths.copy()
        answers = np.full(tokens.shape, -1)
        for i, wanted in enumerate(ops.tolist()):
            before, row, answer = self._draw(random, wanted, split)
            context[i, : len(before)], lengths[i] = before, len(before)
            tokens[i, : len(row)], ends[i] = row, len(row)
            answers[i, len(row) - len(answer) : len(row)] = i
        return Batch(
            tokens=torch.from_numpy(tokens),
            loss_mask=torch.from_numpy(answers >= 0),
            answers=torch.from_numpy(answers),
            difficulty=torch.from_numpy(ops),
            context=torch.from_numpy(context),
            context_row=torch.arange(size),
            context_lengths=torch.from_numpy(lengths),
            lengths=torch.from_numpy(ends),
        )

    def solve(self, tokens: list[int]) -> list[list[int]]:
        """See `Task.solve`."""
        words = tokenizer(self.tokenizer)
        read = tokens[len(words.begin) : tokens.index(HIDDEN) - len(self.marks.answer)]
        return [self._answer(reader.answer(words.decode(read)))]

    def spell(self, tokens: list[int]) -> str:
        """Decode the text, with PAD, ANSWER and END by name."""
        text, parts = tokenizer(self.tokenizer), []
        for marker, run in groupby(tokens, key=lambda token: max(token - text.vocab_size, -1)):
            some = list(run)
            # Markers are decoded by name, for the tokenizer does not know them.
            parts += [text.decode(some).strip()] if marker < 0 else [MARKERS[marker]] * len(some)
        return " ".join(parts)

    @property
    def _row_length(self) -> int:
        question = (
            max(spoken.longest_question for spoken in self._languages) if self.question == "last" else 0
        )
        return (
            question + len(self.marks.answer) + _longest_answer(self.tokenizer, self.modulus or LARGEST + 1)
        )

    def _answer(self, value: int) -> Tokens:
        return [*tokenizer(self.tokenizer).encode(f" {value}"), self.marks.end]

    def _draw(self, random: Random, ops: int, split: Split) -> tuple[Tokens, Tokens, Tokens]:
        """Draw a context, its row, and the answer that the row ends with."""
        # A problem that is too long is drawn anew, not cut: cutting would take away what the answer needs.
        for _ in range(MISFITS):
            core, names = draw_problem(
                random, ops, split, self.subset, self.mode, self.modulus, self.templates
            )
            spoken = language(names.template, self.tokenizer)
            question, statements, words = _tell(core, names, spoken, self.modulus)
            # As a session begins a stream, with what the tokenizer puts there.
            opening = [*tokenizer(self.tokenizer).begin, *(spoken.instruction if self.instruction else [])]
            if self.question == "first":
                opening = opening + question
            length = len(opening) + sum(map(len, statements))
            if length <= self.length[1]:
                break
        else:
            raise ValueError(
                f"length={self.length} is too short: of {MISFITS} problems of op={ops} none fits into "
                f"{self.length[1]} tokens"
            )
        if self.noise:
            hard = self.subset == "hard"
            more = noise(random, spoken, words, hard=hard, most=self._noise_most)
            self._fill(random, length, statements, more)
        # Noise and problem are mixed, so the place of a statement tells nothing.
        random.shuffle(statements)
        answer = self._answer(core.answer)
        row = [*(question if self.question == "last" else []), *self.marks.answer, *answer]
        return [*opening, *chain.from_iterable(statements)], row, answer

    def _fill(self, random: Random, length: int, statements: list[Tokens], more: Iterator[Tokens]) -> None:
        """Add noise up to a random length; one that would go too far is left out, if it is not needed."""
        fewest, most = self.length
        wanted = random.randint(fewest, most)
        for statement in more:
            if length >= wanted:
                return
            if length + len(statement) <= most:
                statements.append(statement)
                length += len(statement)
            elif length >= fewest:
                return
        raise ValueError(
            f"length={self.length} is too long: the names of noise do not suffice for {wanted} tokens"
        )


def draw_problem(
    random: Random,
    ops: int,
    split: Split | None,
    subset: str,
    mode: str,
    modulus: int | None,
    templates: Sequence[str] = tuple(TEMPLATES),
) -> tuple[Core, Names]:
    """Draw a problem of the wanted operations, and names that put it into the split (None: into either).

    As names decide, and any core has many, the cores of both splits are distributed alike.

    Raises:
        ValueError: if none is found.
    """
    reverse = mode == "reverse" or (mode == "mixed" and random.random() < 0.5)
    for _ in range(TRIES):
        core = _attempt(random, ops, subset == "hard", reverse, modulus)
        if core is None:
            continue
        for _ in range(NAMINGS):
            names = draw_names(random, core.structure, templates)
            if split is None or (core.hash(names) % HELD_OUT == 0) == (split == "test"):
                return core, names
    raise ValueError(f"of {TRIES} draws none is a problem of op={ops} (subset={subset!r}, mode={mode!r})")


def _attempt(random: Random, ops: int, hard: bool, reverse: bool, modulus: int | None) -> Core | None:
    graph = draw_graph(random, ops, hard=hard, reverse=reverse)
    if graph is None:
        return None
    core = draw_core(random, graph, reverse=reverse, modulus=modulus)
    # Last, as the table was made of problems whose values are in range.
    if core is not None and hard and not reverse and thinned(random, graph.order, ops):
        return None
    return core


def _tell(
    core: Core, names: Names, spoken: Language, modulus: int | None
) -> tuple[Tokens, list[Tokens], list[Tokens]]:
    """Put the core into words: return the question, the statements, and the names of all parameters."""
    places, kinds = names.places, names.things

    def name(p: Parameter, *, capital: bool = False) -> Tokens:
        return spoken.name(p.kind, places[p.place], kinds[p.thing] if p.thing >= 0 else None, capital=capital)

    words = {p: name(p) for p in [*core.structure.instances, *core.structure.totals]}
    statements = [
        spoken.statement(name(p, capital=True), definition, [words[q] for q in definition.operands])
        for p, definition in core.definitions.items()
    ]
    query = core.query
    if core.given is not None:
        statements.append(spoken.unknown(name(query, capital=True)))
        statements.append(spoken.value(name(core.given[0], capital=True), core.given[1]))
    question = spoken.question(
        query.kind, places[query.place], kinds[query.thing] if query.thing >= 0 else None, modulus
    )
    return question, statements, list(words.values())


@cache
def _longest_answer(name: str, values: int) -> int:
    """Return the most tokens that an answer can have, END included."""
    return 1 + max(len(tokenizer(name).encode(f" {value}")) for value in range(values))


@cache
def _floors(subset: str, mode: str, ops: tuple[int, int], modulus: int | None) -> dict[str, float]:
    """See `GSMInfinite.floors`."""
    random = Random(0)
    per_op = {
        op: Counter(
            draw_problem(random, op, None, subset, mode, modulus)[0].answer for _ in range(FLOOR_SAMPLES)
        )
        for op in range(ops[0], ops[1] + 1)
    }
    together = sum(per_op.values(), Counter[int]())
    total = together.total()
    chance = sum((n / total) ** 2 for n in together.values())
    best = {f"constant op={op}": max(n.values()) / FLOOR_SAMPLES for op, n in per_op.items()}
    return {"chance": chance, "constant": max(together.values()) / total, **best}
