"""MQAR: recall the value of a key (Arora et al., "Zoology", arXiv 2312.04927)."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lmsleep.tasks.base import Batch, single_answers
from lmsleep.text import Split


@dataclass(frozen=True, kw_only=True)
class MQAR:
    """Key-value pairs, read and evicted; then: what is the value of this key?

    Storage without depth: the control on which more passes should not matter. One sample with pairs=3:

        context  k4 v9   k1 v7   k8 v9
        question k1 v7                     (v7 is the answer, and all of the loss)

    With filler=4 the context ends with four more values; without a key before them they say nothing, but
    they fill windows that are slept on. Keys are distinct, values need not be. Every question is asked alone,
    on its own fork of the memory; in the source they follow in the same sequence at random distances, in
    reach of attention.
    """

    pairs: int = 16
    """D: pairs in the context."""
    keys: int = 64
    """Keys to choose from."""
    values: int = 64
    """Values to choose from."""
    queries: int = 8
    """Keys asked for, of one context."""
    filler: int = 0
    """Values without a key between the pairs and the questions: tokens to sleep on, nothing to remember."""

    def __post_init__(self) -> None:
        for name in ("pairs", "keys", "values", "queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.filler < 0:
            raise ValueError(f"filler must not be negative, got {self.filler}")
        if self.pairs > self.keys:
            raise ValueError(f"pairs={self.pairs} needs as many keys, got keys={self.keys}")
        if self.queries > self.pairs:
            raise ValueError(f"queries={self.queries} must not exceed pairs={self.pairs}")

    @property
    def vocab_size(self) -> int:
        """The vocabulary is the keys, then the values."""
        return self.keys + self.values

    @property
    def difficulty_name(self) -> str:
        """The difficulty key counts the pairs in the context."""
        return "pairs"

    def floors(self) -> dict[str, float]:
        """Guess among all values, or say any constant; naming a value of the context gets about 1 / pairs."""
        return {"chance": 1 / self.values, "constant": 1 / self.values}

    def batch(self, rng: np.random.Generator, size: int, split: Split, level: float = 1.0) -> Batch:
        """Draw `size` contexts with their questions; `level` caps the pairs at `ceil(level D)`."""
        del split  # keys^pairs contexts: train and test never meet by chance
        # As many pairs as questions at least, for every question asks for another key.
        D = max(self.queries, int(np.ceil(level * self.pairs)))
        key = rng.permuted(np.tile(np.arange(self.keys), (size, 1)), axis=1)[:, :D]
        value = self.keys + rng.integers(0, self.values, (size, D))
        context = np.stack([key, value], axis=2).reshape(size, 2 * D)
        if self.filler:
            noise = self.keys + rng.integers(0, self.values, (size, self.filler))
            context = np.concatenate([context, noise], axis=1)
        # keys come in random order, so the first positions of another permutation are a random choice
        asked = rng.permuted(np.tile(np.arange(D), (size, 1)), axis=1)[:, : self.queries]
        rows = np.stack([np.take_along_axis(x, asked, axis=1).ravel() for x in (key, value)], axis=1)
        return single_answers(context, rows, np.full(len(rows), D))

    def solve(self, tokens: list[int]) -> list[list[int]]:
        """See `Task.solve`."""
        *context, asked, _ = tokens
        return [[{key: value for key, value in pairwise(context) if key < self.keys}[asked]]]

    def spell(self, tokens: list[int]) -> str:
        """Spell keys as k0 ..., values as v0 ...."""
        return " ".join(f"k{t}" if t < self.keys else f"v{t - self.keys}" for t in tokens)
