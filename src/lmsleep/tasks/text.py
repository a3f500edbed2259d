"""Your own documents, in bytes or the tokens of any tokenizer."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from lmsleep.tasks.base import Batch
from lmsleep.text import Split
from lmsleep.text.documents import asks, read_set
from lmsleep.text.files import encoded, read_text, to_tokens
from lmsleep.text.packing import alike, is_real, pad
from lmsleep.text.rows import has_rows
from lmsleep.text.splits import splits_of_paths
from lmsleep.text.tokenizers import (
    HuggingFace,
    Marks,
    Tokenizer,
    absolute,
    load_tokenizer,
    marks,
    tokenizer_files,
)

HELD_OUT = 0.1  # the last tenth of each file is for testing; of sets, whole documents are

Part = tuple[np.ndarray, ...]  # the tokens of a document, or those of a prompt and those of its answer


@dataclass(frozen=True, kw_only=True)
class Text:
    """Your own documents: files, or rows of text or of prompts with their answers.

    Files are read as random excerpts, and the last tenth of each is held out. Of a set (rows of JSON, CSV,
    Parquet, a folder of datasets) each row is a document, and one in ten is held out; files whose names speak
    of both train and test (dev, validation ...) are kept apart so. All of a text is to be predicted:

        row      t h e   f i r s t   d o c
        row      t h e   n e x t

    Of a prompt with an answer only the answer is, after the prompt was read, slept on and evicted:

        context  w h o   s l e p t ?
        row      <answer> i   d i d <end>          (the answer counts as right if all of it is, its end too)

    With a tokenizer that has an eos_token a line break stands for <answer> and that token for <end>. What the
    tokenizer puts before a text (a BOS, in many) stands before each document, and is not predicted.

    A row never holds more than one document, so none reads what another left behind.
    """

    data: tuple[Path, ...] = ()
    """Files (any bytes; UTF-8 with a tokenizer), or sets: JSON lines or arrays, CSV, Parquet, Arrow, folders
    saved by datasets. Files may be packed by gzip, bzip2 or xz."""
    length: int = 256
    """Tokens in a sequence (at most, where a document is shorter); prompts and answers are read whole."""
    tokenizer: str = "bytes"
    """bytes, or the folder of a Hugging Face tokenizer."""
    fields: tuple[str, ...] = ()
    """Field of the text, or the two of prompt and answer, in a set; default: question answer, prompt
    completion, text or messages (a conversation, in the tokenizer's chat template), whichever its first row
    has."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data must name at least one file")
        if self.length < 2:
            raise ValueError(f"length must be at least 2 {self.unit}s, got {self.length}")
        if len(self.fields) > 2:
            raise ValueError(f"fields must be one (text) or two (prompt, answer), got {self.fields}")
        object.__setattr__(self, "tokenizer", absolute(self.tokenizer))

    def sources(self) -> tuple[Path, ...]:
        """Return the files and folders that batches are drawn from, those of the tokenizer included."""
        return (*self.data, *tokenizer_files(self.tokenizer))

    @cached_property
    def asks(self) -> bool:
        """True if the documents are prompts with answers; the first row says so."""
        return self._has_rows and asks(self.data[0], self.fields)

    @property
    def summary(self) -> str | None:
        """What became of the rows of sets, in words; None for files, each of which is a document."""
        if not self._has_rows:
            return None
        names, (train, test) = ", ".join(path.name for path in self.data), map(len, self._parts.values())
        return f"{names}: each row is a document, {train} to train on and {test} held out"

    @property
    def unit(self) -> str:
        """The word for a token: "byte" or "token"."""
        return "byte" if self.tokenizer == "bytes" else "token"

    @property
    def marks(self) -> Marks:
        """The tokens of <answer> and <end>."""
        return marks(self._tokenizer, "\n", self._tokenizer.vocab_size)

    @property
    def vocab_size(self) -> int:
        """The tokenizer's size (bytes: 256); with answers and no end of a text, plus <answer> and <end>."""
        own = self.asks and self._tokenizer.end is None
        return self._tokenizer.vocab_size + (2 if own else 0)

    @property
    def largest_token(self) -> int:
        """The largest token that a batch can hold; the tokenizer may have larger ones."""
        held = max(int(tokens.max(initial=0)) for of in self._parts.values() for p in of for tokens in p)
        return max(held, *self.marks.answer, self.marks.end) if self.asks else held

    @property
    def difficulty_name(self) -> str:
        """Text has no difficulty key: all tokens, or whole answers, count as one kind, 0."""
        return "answers" if self.asks else "all"

    @cached_property
    def bytes_per_token(self) -> float:
        """The mean length in bytes (UTF-8) of the held-out tokens of texts or answers."""
        if self.unit == "byte":
            return 1.0
        # Without what the tokenizer puts before a text, which is no text.
        begin = [*self._tokenizer.begin]
        whole = [part[-1].tolist() for part in self._parts["test"]]
        tokens = [t[len(begin) :] if t[: len(begin)] == begin else t for t in whole]
        return sum(len(self._tokenizer.decode(t).encode()) for t in tokens) / sum(map(len, tokens))

    def floors(self) -> dict[str, float]:
        """Guess, or always say the most frequent: token of the training part, or answer of the training set.

        Guesses at an answer are among those of the training set.
        """
        if self.asks:
            answers = Counter(answer.tobytes() for _, answer in self._parts["train"])
            return {"chance": 1 / len(answers), "constant": max(answers.values()) / answers.total()}
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for (tokens,) in self._parts["train"]:
            counts += np.bincount(tokens, minlength=self.vocab_size)
        return {"chance": 1 / self.vocab_size, "constant": float(counts.max() / counts.sum())}

    def batch(self, rng: np.random.Generator, size: int, split: Split, level: float = 1.0) -> Batch:
        """Draw `size` excerpts or rows; every token of a text is about equally likely to be in one."""
        del level
        parts, lengths = self._parts[split], self._lengths[split]
        if self.asks:
            return self._questions([parts[i] for i in alike(rng, lengths, size)])
        # Every excerpt of a file is as likely as any other, so a file counts by its number of excerpts.
        starts = np.maximum(lengths - self.length, 0) + 1
        if self._has_rows:
            weights = np.maximum(lengths / self.length, 1)
            which = alike(rng, np.minimum(lengths, self.length), size, weights)
        else:
            which = rng.choice(len(parts), size, p=starts / starts.sum())
        begin = rng.integers(0, starts[which])
        tokens, ends = pad([parts[w][0][b : b + self.length] for w, b in zip(which, begin, strict=True)])
        mask = is_real(tokens, ends)
        mask[:, 0] = False  # nothing precedes the first token
        return Batch(
            tokens=tokens,
            loss_mask=mask,
            answers=torch.where(mask, torch.arange(mask.numel()).view_as(tokens), -1),
            difficulty=torch.zeros(mask.numel(), dtype=torch.int64),
            lengths=ends,
        )

    def _questions(self, pairs: list[Part]) -> Batch:
        context, context_lengths = pad([prompt for prompt, _ in pairs])
        begin, end = self.marks
        tokens, lengths = pad([np.concatenate([begin, answer, [end]]) for _, answer in pairs])
        mask = is_real(tokens, lengths)
        # <answer> is given, the answer and its end are to be predicted.
        mask[:, : len(begin)] = False
        return Batch(
            tokens=tokens,
            loss_mask=mask,
            answers=torch.where(mask, torch.arange(len(pairs))[:, None], -1),
            difficulty=torch.zeros(len(pairs), dtype=torch.int64),
            context=context,
            context_row=torch.arange(len(pairs)),
            context_lengths=context_lengths,
            lengths=lengths,
        )

    def solve(self, tokens: list[int]) -> list[list[int]]:
        """Return nothing: the next token does not follow from those before it."""
        del tokens
        return []

    def spell(self, tokens: list[int]) -> str:
        """Decode with the tokenizer; bytes that are no UTF-8 appear as escapes."""
        first = self._tokenizer.vocab_size
        runs = groupby(tokens, key={first: "<answer>", first + 1: "<end>"}.get)
        return "".join(mark or self._tokenizer.decode(list(run)) for mark, run in runs)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer)

    @cached_property
    def _has_rows(self) -> bool:
        """True if the data are sets."""
        for path in self.data:
            if not path.is_file() and not path.is_dir():
                raise ValueError(f"data: {path} is not a file")
        kinds = {has_rows(path) for path in self.data}
        if len(kinds) > 1:
            raise ValueError("data must be files, or sets (of rows), not both")
        return kinds.pop()

    # Read when the first batch is drawn: a run can be opened, and its model asked, where its data are gone.
    @cached_property
    def _parts(self) -> dict[Split, list[Part]]:
        parts = self._documents() if self._has_rows else self._excerpts()
        kinds = {len(part) for some in parts.values() for part in some}
        if len(kinds) > 1:
            raise ValueError("data: some rows are texts and some prompts with answers; name the fields")
        return parts

    def _documents(self) -> dict[Split, list[Part]]:
        """Return the rows of sets."""
        parts: dict[Split, list[Part]] = {"train": [], "test": []}
        splits = splits_of_paths(self.data)
        chat = self._tokenizer.chat if isinstance(self._tokenizer, HuggingFace) else None
        for path in self.data:
            for document in read_set(path, self.fields, split=splits.get(path), chat=chat):
                part = tuple(
                    encoded(text, self._tokenizer, first=not i) for i, text in enumerate(document.fields)
                )
                if len(part) == 2 or len(part[0]) >= 2:  # a text of one token leaves nothing to predict
                    parts[document.split].append(part)
        for split, some in parts.items():
            if not some:
                raise ValueError(
                    f"data: no document for the {split} split (one in ten is held out, by its hash); "
                    f"{', '.join(map(str, self.data))} must hold more that are not empty"
                )
        return parts

    def _excerpts(self) -> dict[Split, list[Part]]:
        """Return what excerpts are cut from: all but the last tenth of each file, and that tenth."""
        parts: dict[Split, list[Part]] = {"train": [], "test": []}
        splits, longest = splits_of_paths(self.data), 0
        for path in self.data:
            tokens = to_tokens(read_text(path), self._tokenizer, path, first=True)
            longest = max(longest, len(tokens))
            cut = len(tokens) - int(HELD_OUT * len(tokens))
            cuts: dict[Split, np.ndarray] = {"train": tokens[:cut], "test": tokens[cut:]}
            if path in splits:
                cuts = {splits[path]: tokens}
            for split, cut_out in cuts.items():
                if len(cut_out) >= self.length:
                    parts[split].append((cut_out,))
        if not parts["train"] or not parts["test"]:
            raise ValueError(
                f"data: no document is long enough to hold out {self.length} {self.unit}s of its last tenth "
                f"(the longest has {longest} {self.unit}s); use longer files or a length of at most "
                f"{longest // 11}"
            )
        return parts

    @cached_property
    def _lengths(self) -> dict[Split, np.ndarray]:
        return {split: np.array([sum(map(len, p)) for p in of]) for split, of in self._parts.items()}
