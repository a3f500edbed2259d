"""The word problem of a finite group: multiply (Merrill et al., arXiv 2404.08819)."""

from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Literal

import numpy as np

from lmsleep.tasks.base import Batch, check_literals, single_answers
from lmsleep.text import Split

Group = Literal["S5", "A5", "A4xZ5", "Z60", "S3"]

HELD_OUT = 8  # one word in 8 is kept for testing


@cache
def multiplication_table(group: Group) -> np.ndarray:
    """Return the table `[order, order]`: `table[a, b]` is `a`, then `b`; element 0 is the identity.

    S5 and A5 are not solvable (their word problems are complete for NC1); A4 x Z5 and Z60 have as many
    elements as A5 and are. S3 is the smallest group in which order matters.
    """
    if group == "Z60":
        return np.add.outer(np.arange(60), np.arange(60)) % 60
    if group == "A4xZ5":
        four, five = _permutations(4, even=True), np.add.outer(np.arange(5), np.arange(5)) % 5
        table: np.ndarray = 5 * four[:, None, :, None] + five[None, :, None, :]
        return table.reshape(60, 60)
    if group == "S3":
        return _permutations(3, even=False)
    return _permutations(5, even=group == "A5")


def _permutations(n: int, *, even: bool) -> np.ndarray:
    elements = [p for p in permutations(range(n)) if not even or _is_even(p)]
    number = {p: i for i, p in enumerate(elements)}
    return np.array([[number[tuple(b[i] for i in a)] for b in elements] for a in elements])


def _is_even(p: tuple[int, ...]) -> bool:
    return sum(p[i] > p[j] for i in range(len(p)) for j in range(i, len(p))) % 2 == 0


@dataclass(frozen=True, kw_only=True)
class WordProblem:
    """Random elements of a group, read and evicted; then: what is the product of the first j?

    One sample with group="Z60", length=4 and one question:

        context  12 50 7 33
        question FIRST_3 9        (12 + 50 + 7 = 9 mod 60; 9 is the answer, and all of the loss)
    """

    group: Group = "A5"
    """S5 (120 elements), A5 (60); solvable controls of 60 elements: A4xZ5, Z60; and of 6: S3."""
    length: int = 16
    """Elements in a word."""
    queries: int = 8
    """Prefixes asked for, of one word; each alone, on its own fork of the memory."""
    held_out_words: bool = False
    """Keep one word in 8 (by hash) out of training and test on those only; where there are few words."""

    def __post_init__(self) -> None:
        check_literals(self, ("group",))
        if self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}")
        if not 1 <= self.queries <= self.length:
            raise ValueError(f"queries must lie in 1 ... length={self.length}, got {self.queries}")
        # Of 200 words about 25 are held out; of a few there may be none.
        if self.held_out_words and self.order**self.length < 200:
            raise ValueError(
                f"held_out_words: {self.group} has {self.order**self.length} words of length={self.length}, "
                "too few to keep some for testing; use a greater length"
            )

    @property
    def order(self) -> int:
        """The number of elements of the group."""
        return len(multiplication_table(self.group))

    @property
    def vocab_size(self) -> int:
        """The vocabulary is the elements, then FIRST_1 ... FIRST_length."""
        return self.order + self.length

    @property
    def difficulty_name(self) -> str:
        """The difficulty key is the length of the prefix asked for."""
        return "j"

    def floors(self) -> dict[str, float]:
        """Products are uniform over the group, so a guess and any constant are right equally often."""
        return {"chance": 1 / self.order, "constant": 1 / self.order}

    def batch(self, rng: np.random.Generator, size: int, split: Split, level: float = 1.0) -> Batch:
        """Draw `size` words with their questions; `level` caps the prefixes at `ceil(level length)`."""
        table, order = multiplication_table(self.group), self.order
        word = self._words(rng, size, split)
        product = word.copy()
        for j in range(1, self.length):
            product[:, j] = table[product[:, j - 1], word[:, j]]
        # Every question asks for another prefix, so there are as many prefixes as questions at least.
        longest = max(self.queries, int(np.ceil(level * self.length)))
        asked = rng.permuted(np.tile(np.arange(longest), (size, 1)), axis=1)[:, : self.queries]
        answer = np.take_along_axis(product, asked, axis=1)
        rows = np.stack([order + asked.ravel(), answer.ravel()], axis=1)
        return single_answers(word, rows, asked.ravel() + 1)

    def _words(self, rng: np.random.Generator, size: int, split: Split) -> np.ndarray:
        """Draw words `[size, length]`, of those of a split if any are held out."""
        if not self.held_out_words:  # there are so many that train and test never meet by chance
            return rng.integers(0, self.order, (size, self.length))
        found = np.empty((0, self.length), dtype=np.int64)
        at_once = (HELD_OUT if split == "test" else 2) * size
        while len(found) < size:
            some = rng.integers(0, self.order, (at_once, self.length))
            found = np.concatenate([found, some[_held_out(some) == (split == "test")]])
        return found[:size]

    def solve(self, tokens: list[int]) -> list[list[int]]:
        """See `Task.solve`."""
        # The last token is the hidden answer itself.
        *word, asked, _ = tokens
        product, table = 0, multiplication_table(self.group)
        for element in word[: asked - self.order + 1]:
            product = int(table[product, element])
        return [[product]]

    def spell(self, tokens: list[int]) -> str:
        """Spell elements by number, the lengths asked for as FIRST_1 ...."""
        return " ".join(str(t) if t < self.order else f"FIRST_{t - self.order + 1}" for t in tokens)


def _held_out(words: np.ndarray) -> np.ndarray:
    """Say of words `[B, T]` which are for testing `[B]`: by a hash, which must never change."""
    code = np.zeros(len(words), dtype=np.uint64)
    for element in words.T.astype(np.uint64):
        # Mixed in the manner of splitmix64 (Steele et al., 2014): an odd factor loses nothing mod 2^64.
        code = (code + element + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        code ^= code >> np.uint64(29)
        code *= np.uint64(0xBF58476D1CE4E5B9)
        code ^= code >> np.uint64(32)
    held: np.ndarray = code % HELD_OUT == 0
    return held
