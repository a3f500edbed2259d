"""Rule 110: what is a cell of an automaton after t steps?"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from lmsleep.tasks.base import Batch, check_literals
from lmsleep.text import Split

SEP = 2


def automaton(cells: np.ndarray, steps: int, rule: int = 110, boundary: str = "ring") -> np.ndarray:
    """Update an elementary automaton (Wolfram's rule numbers) `steps` times; cells `[..., width]` of 0/1.

    `boundary="ring"` joins the ends; `"zero"` holds the cells outside at 0.
    """
    # Bit i of Wolfram's number is what becomes of a cell whose neighbourhood reads i in binary.
    table = np.array([rule >> i & 1 for i in range(8)], dtype=cells.dtype)
    for _ in range(steps):
        left, right = np.roll(cells, 1, axis=-1), np.roll(cells, -1, axis=-1)
        if boundary == "zero":
            # np.roll made copies, so writing into them leaves the cells alone.
            left[..., 0] = right[..., -1] = 0
        cells = table[4 * left + 2 * cells + right]
    return cells


@dataclass(frozen=True, kw_only=True)
class Rule110:
    """Random states, each of one window; then: what are they after t steps?

    One sample with width=4, states=2, asked=1 (the first cell of each state after t steps):

        tokens   0 1 1 0   1 0 0 0   SEP 1 1
        loss                             * *     (* in the loss and the answer)
    """

    width: int = 24
    """Cells of a state (the paper's window is one state)."""
    states: int = 4
    """Independent states in a sequence."""
    t: int = 8
    """Updates between the state and the answer."""
    rule: int = 110
    """Elementary automaton, 0 ... 255."""
    boundary: Literal["ring", "zero"] = "ring"
    """Cells outside the state: the other end, or zeros."""
    asked: int = 1
    """Cells of each state that are asked for, from the first; the paper asks for one."""

    def __post_init__(self) -> None:
        check_literals(self, ("boundary",))
        for name in ("width", "states", "t", "asked"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.asked > self.width:
            raise ValueError(f"asked={self.asked} must not exceed width={self.width}")
        if not 0 <= self.rule <= 255:
            raise ValueError(f"rule must lie in 0 ... 255, got {self.rule}")

    @property
    def vocab_size(self) -> int:
        """The vocabulary is 0, 1 and SEP."""
        return 3

    @property
    def difficulty_name(self) -> str:
        """The difficulty key counts updates of the automaton."""
        return "t"

    @property
    def inline_context(self) -> int:
        """The number of tokens before the answers: those of the states."""
        return self.states * self.width

    def floors(self) -> dict[str, float]:
        """Return how often a coin is right, and the better constant bit (estimated on 4096 samples)."""
        bits = self.states * self.asked
        # A fixed seed: a floor is a constant of the task.
        rng = np.random.default_rng(0)
        cells = rng.integers(0, 2, (4096 * self.states, self.width), dtype=np.int64)
        after = self._after(cells, self.t).reshape(4096, bits)
        constant = max(float((after == bit).all(axis=1).mean()) for bit in (0, 1))
        return {"chance": 0.5**bits, "constant": constant}

    def batch(self, rng: np.random.Generator, size: int, split: Split, level: float = 1.0) -> Batch:
        """Draw `size` sequences; `level` caps the steps at `ceil(level t)`, asked of the whole batch."""
        del split  # two streams; where states are few, tests meet some of training's (docs/fidelity.md)
        t = max(1, int(np.ceil(level * self.t)))
        cells = rng.integers(0, 2, (size, self.states, self.width), dtype=np.int64)
        after = self._after(cells, t).reshape(size, -1)
        tokens = np.concatenate([cells.reshape(size, -1), np.full((size, 1), SEP), after], axis=1)
        mask = np.zeros(tokens.shape, dtype=bool)
        mask[:, -after.shape[1] :] = True
        return Batch(
            tokens=torch.from_numpy(tokens),
            loss_mask=torch.from_numpy(mask),
            answers=torch.from_numpy(np.where(mask, np.arange(size)[:, None], -1)),
            difficulty=torch.full((size,), t),
        )

    def solve(self, tokens: list[int]) -> list[list[int]]:
        """See `Task.solve`."""
        answer = []
        # Written without `automaton`, so that an error there shows.
        for state in range(self.states):
            cells = tokens[state * self.width : (state + 1) * self.width]
            for _ in range(self.t):
                ends = [cells[-1], cells[0]] if self.boundary == "ring" else [0, 0]
                wide = [ends[0], *cells, ends[1]]
                triples = zip(wide, cells, wide[2:], strict=False)
                cells = [self.rule // 2 ** (4 * left + 2 * own + right) % 2 for left, own, right in triples]
            answer += cells[: self.asked]
        return [answer]

    def intermediate(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return what the automaton passes through: at every cell, what it is after 0, 1, ... t steps.

        Args:
            tokens: states `[B, T]` int64, as far as they were read.

        Returns:
            `[B, T, t + 1]` int64 of 0 and 1; -1 at what is no cell of a whole state.
        """
        whole = min(tokens.shape[1] // self.width, self.states) * self.width
        cells = tokens[:, :whole].unflatten(1, (-1, self.width)).numpy()
        after = [automaton(cells, j, self.rule, self.boundary).reshape(-1, whole) for j in range(self.t + 1)]
        states = torch.full((*tokens.shape, self.t + 1), -1)
        states[:, :whole] = torch.from_numpy(np.stack(after, axis=-1))
        return states

    def spell(self, tokens: list[int]) -> str:
        """Spell cells as digits, SEP as a bar."""
        return "".join("01|"[token] for token in tokens)

    def _after(self, cells: np.ndarray, t: int) -> np.ndarray:
        return automaton(cells, t, self.rule, self.boundary)[..., : self.asked]
