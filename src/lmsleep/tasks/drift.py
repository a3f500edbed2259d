"""An adapting stream: a dictionary that changes without notice."""

from dataclasses import dataclass

import numpy as np
import torch

from lmsleep.tasks.base import HIDDEN, Batch
from lmsleep.text import Split

CAP = 4  # the difficulty key counts sights of a key up to here


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Pairs of a key and its value, on and on; at any time all values may change, unannounced.

    One sample with keys=3, values=4, segment=8, segments=2; the values are a2 b1 c4, then a3 b2 c2:

        row      a 2 c 4 a 2 b 1 c 4 | a 3 b 2 b 2        (no token stands for the |)
        loss       *   *   *   *   *     *   *   *        every value
        answer             .       .             .        those whose key has been seen since the shift

    A pair is the first of new values with probability 2/segment, so nothing but the pairs themselves tells
    of a shift. Keys are drawn uniformly: a value is either known from the stream or a guess, and what was
    learned before the shift is wrong after it. `segments_of` draws streams that shift every `segment`
    tokens, with what would follow each segment, for `lmsleep.evaluation.around_sleep`.
    """

    keys: int = 8
    """Keys."""
    values: int = 8
    """Values that a key may have, each as likely."""
    segment: int = 32
    """Tokens between two shifts, on average (two a pair)."""
    segments: int = 3
    """Length of a sequence, in segments."""

    def __post_init__(self) -> None:
        if self.keys < 1 or self.segments < 1:
            raise ValueError(f"keys and segments must be at least 1, got {self.keys} and {self.segments}")
        if self.values < 2:
            raise ValueError(f"values must be at least 2 (else nothing changes), got {self.values}")
        if self.segment < 4 or self.segment % 2:
            raise ValueError(f"segment must be an even number of at least 4 tokens, got {self.segment}")

    @property
    def vocab_size(self) -> int:
        """The vocabulary is the keys, then the values."""
        return self.keys + self.values

    @property
    def difficulty_name(self) -> str:
        """The difficulty key counts the pairs of this key since the shift (4: or more)."""
        return "seen"

    def floors(self) -> dict[str, float]:
        """Values are uniform, so a guess and any constant are right equally often."""
        return {"chance": 1 / self.values, "constant": 1 / self.values}

    def batch(self, rng: np.random.Generator, size: int, split: Split, level: float = 1.0) -> Batch:
        """Draw `size` streams; there is no curriculum, whatever `level`."""
        del split, level  # values^keys dictionaries, in any order: train and test do not meet
        pairs = self.segments * self.segment // 2
        # A segment has segment / 2 pairs, so this makes one shift a segment on average.
        shifts = rng.random((size, pairs)) < 2 / self.segment
        # Dictionary number 0 holds until the first shift, number 1 from it on, and so forth.
        dictionary = np.cumsum(shifts, axis=1)
        key, value = self._pairs(rng, dictionary)
        same = (key[:, :, None] == key[:, None, :]) & (dictionary[:, :, None] == dictionary[:, None, :])
        seen = np.tril(same, -1).sum(-1)  # earlier pairs of the key since the shift
        known = np.stack([np.zeros_like(seen), seen], axis=2).reshape(size, -1) > 0
        tokens = np.stack([key, value], axis=2).reshape(size, -1)
        return Batch(
            tokens=torch.from_numpy(tokens),
            loss_mask=torch.from_numpy(self.is_predicted(tokens)),
            answers=torch.from_numpy(np.where(known, np.cumsum(known).reshape(known.shape) - 1, -1)),
            difficulty=torch.from_numpy(np.minimum(seen[seen > 0], CAP)),
        )

    def segments_of(self, rng: np.random.Generator, size: int, more: int = 0) -> np.ndarray:
        """Draw tokens `[size, segments, segment + more]`: segments, each with `more` that would follow it."""
        # Rounded up: `more` may end within a pair.
        pairs = -(-(self.segment + more) // 2)
        dictionary = np.tile(np.arange(self.segments).repeat(pairs), (size, 1))
        tokens = np.stack(self._pairs(rng, dictionary), axis=2).reshape(size, self.segments, -1)
        return tokens[:, :, : self.segment + more]

    def _pairs(self, rng: np.random.Generator, dictionary: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Draw keys, and look up their values in the dictionaries of these numbers `[size, pairs]`."""
        values = rng.integers(0, self.values, (len(dictionary), int(dictionary.max()) + 1, self.keys))
        key = rng.integers(0, self.keys, dictionary.shape)
        return key, values[np.arange(len(key))[:, None], dictionary, key] + self.keys

    def is_predicted(self, tokens: np.ndarray) -> np.ndarray:
        """Mark the `tokens` that count in the loss: values."""
        return tokens >= self.keys

    def solve(self, tokens: list[int]) -> list[list[int]]:
        """See `Task.solve`: the value that the key had last, right for a key seen since the shift."""
        last: dict[int, int] = {}
        answers = []
        for key, value in zip(tokens[::2], tokens[1::2], strict=True):
            if value == HIDDEN:
                answers.append([last[key]])
            else:
                last[key] = value
        return answers

    def spell(self, tokens: list[int]) -> str:
        """Spell keys as k0 ..., values by number."""
        return " ".join(f"k{t}" if t < self.keys else str(t - self.keys) for t in tokens)
