"""An adapting stream: a dictionary that changes every few windows, without notice."""

from dataclasses import dataclass

import numpy as np
import torch

from lmsleep.tasks.base import HIDDEN, Batch, Split

CAP = 4  # the difficulty key counts sights of a key up to here


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Pairs of a key and its value, on and on; every few windows all values change, unannounced.

    One sample with keys=3, values=4, segment=8, segments=2 (the dialects are a2 b1 c4, then a3 b2 c2):

        row      a 2 c 4 a 2 b 1 | a 3 b 2 b 2 c 2      (no token stands for the |)
        loss       *   *   *   *     *   *   *   *      every value
        answer             .                 .          those whose key has been seen since the shift

    The keys are drawn uniformly, so a value is either known from the stream or a guess. What was learned of
    the last dialect is wrong in the next: a model must forget it. `segments_of` gives the stream with
    what would follow each segment, for `lmsleep.adaptation`.
    """

    keys: int = 8
    """Keys of a dialect."""
    values: int = 8
    """Values that a key may have, each as likely."""
    segment: int = 32
    """Tokens between two shifts (two a pair)."""
    segments: int = 3
    """Segments in a sequence, each with a dialect of its own."""

    def __post_init__(self) -> None:
        if self.keys < 1 or self.segments < 1:
            raise ValueError(f"keys and segments must be at least 1, got {self.keys} and {self.segments}")
        if self.values < 2:
            raise ValueError(f"values must be at least 2 (else nothing changes), got {self.values}")
        if self.segment < 4 or self.segment % 2:
            raise ValueError(f"segment must be an even number of at least 4 tokens, got {self.segment}")

    @property
    def vocab_size(self) -> int:
        """Keys, then values."""
        return self.keys + self.values

    @property
    def difficulty_name(self) -> str:
        """Pairs of this key since the shift (4: or more)."""
        return "seen"

    def floors(self) -> dict[str, float]:
        """Values are uniform."""
        return {"chance": 1 / self.values, "constant": 1 / self.values}

    def batch(self, rng: np.random.Generator, size: int, split: Split, level: float = 1.0) -> Batch:
        """Draw `size` streams; there is no curriculum, whatever `level`."""
        del split, level  # values^keys dialects, in any order: train and test do not meet
        segments = self.segments_of(rng, size)
        key = segments[:, :, ::2]
        seen = (np.tril(key[..., :, None] == key[..., None, :], -1)).sum(-1)  # earlier pairs of the same key
        tokens = segments.reshape(size, -1)
        place = np.zeros(tokens.shape, dtype=bool)
        place[:, 1::2] = seen.reshape(size, -1) > 0
        answers = np.where(place, np.cumsum(place).reshape(place.shape) - 1, -1)
        mask = np.zeros(tokens.shape, dtype=bool)
        mask[:, 1::2] = True
        return Batch(
            tokens=torch.from_numpy(tokens),
            loss_mask=torch.from_numpy(mask),
            answers=torch.from_numpy(answers),
            difficulty=torch.from_numpy(np.minimum(seen[seen > 0], CAP)),
        )

    def segments_of(self, rng: np.random.Generator, size: int, more: int = 0) -> np.ndarray:
        """`[size, segments, segment + more]` tokens: each segment, and `more` of what would follow it."""
        pairs = (self.segment + more) // 2
        dialect = rng.integers(0, self.values, (size, self.segments, self.keys)) + self.keys
        key = rng.integers(0, self.keys, (size, self.segments, pairs))
        value = np.take_along_axis(dialect, key, axis=2)
        return np.stack([key, value], axis=3).reshape(size, self.segments, 2 * pairs)

    def is_predicted(self, tokens: np.ndarray) -> np.ndarray:
        """Which of `tokens` count in the loss: values."""
        return tokens >= self.keys

    def solve(self, tokens: list[int]) -> list[list[int]]:
        """See `Task.solve`; knows where the shifts are."""
        dialect: dict[int, int] = {}
        answers = []
        for place in range(0, len(tokens), 2):
            if place % self.segment == 0:
                dialect = {}
            key, value = tokens[place : place + 2]
            if value == HIDDEN:
                answers.append([dialect[key]])
            else:
                dialect[key] = value
        return answers

    def spell(self, tokens: list[int]) -> str:
        """Keys as k0 ..., values by number."""
        return " ".join(f"k{t}" if t < self.keys else str(t - self.keys) for t in tokens)
