"""Your own documents, byte by byte."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from lmsleep.tasks.base import Batch, Split

HELD_OUT = 0.1  # the last tenth of each document is for testing


@dataclass(frozen=True, kw_only=True)
class Text:
    """Random excerpts of documents; every byte is to be predicted.

    The last tenth of each document is held out. A token is a byte (0 ... 255).
    """

    data: tuple[Path, ...] = ()
    """Files to read (any bytes; UTF-8 text is what they are usually)."""
    length: int = 256
    """Bytes in a sequence."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data must name at least one file")
        if self.length < 2:
            raise ValueError(f"length must be at least 2 bytes, got {self.length}")
        for path in self.data:
            if not path.is_file():
                raise ValueError(f"data: {path} is not a file")
        if not len(self._parts["test"]):
            longest = max(p.stat().st_size for p in self.data)
            raise ValueError(
                f"data: no document is long enough to hold out {self.length} bytes of its last tenth "
                f"(the longest has {longest} bytes); use longer files or a length of at most {longest // 11}"
            )

    @property
    def vocab_size(self) -> int:
        """One token a byte."""
        return 256

    @property
    def difficulty_name(self) -> str:
        """Text has no difficulty key: all bytes count as one kind."""
        return "all"

    def floors(self) -> dict[str, float]:
        """Accuracy per byte of a guess, and of always the most frequent byte of the training part."""
        counts = sum(np.bincount(part, minlength=256) for part in self._parts["train"])
        assert isinstance(counts, np.ndarray)
        return {"chance": 1 / 256, "constant": float(counts.max() / counts.sum())}

    def batch(self, rng: np.random.Generator, size: int, split: Split, level: float = 1.0) -> Batch:
        """Draw `size` excerpts, documents weighted by their length."""
        del level
        parts = self._parts[split]
        starts = np.array([len(part) - self.length + 1 for part in parts])
        which = rng.choice(len(parts), size, p=starts / starts.sum())
        begin = rng.integers(0, starts[which])
        rows = [parts[w][b : b + self.length] for w, b in zip(which, begin, strict=True)]
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
        mask = torch.ones_like(tokens, dtype=torch.bool)
        mask[:, 0] = False  # nothing precedes the first byte
        return Batch(
            tokens=tokens,
            loss_mask=mask,
            answers=torch.where(mask, torch.arange(mask.numel()).view_as(tokens), -1),
            difficulty=torch.zeros(mask.numel(), dtype=torch.int64),
        )

    def solve(self, tokens: list[int]) -> list[list[int]]:
        """Nothing: the next byte does not follow from those before it."""
        del tokens
        return []

    def spell(self, tokens: list[int]) -> str:
        """The bytes as text; what is no UTF-8 as escapes."""
        return bytes(tokens).decode("utf-8", "backslashreplace")

    @cached_property
    def _parts(self) -> dict[Split, list[np.ndarray]]:
        train, test = [], []
        for path in self.data:
            data = np.frombuffer(path.read_bytes(), dtype=np.uint8)
            cut = len(data) - int(HELD_OUT * len(data))
            train.append(data[:cut])
            test.append(data[cut:])
        return {
            "train": [p for p in train if len(p) >= self.length],
            "test": [p for p in test if len(p) >= self.length],
        }
