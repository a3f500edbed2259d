"""Variable tracking: follow assignments to a value (after RULER, arXiv 2404.06654)."""

from dataclasses import dataclass

import numpy as np

from lmsleep.tasks.base import Batch, single_answers
from lmsleep.text import Split

EQUALS, STOP, ASK, DIGITS = 0, 1, 2, 10
FIRST_NAME = 3 + DIGITS


@dataclass(frozen=True, kw_only=True)
class Variables:
    """Assignments in random order, read and evicted; then: what is the value of this variable?

    One sample with chains=2, hops=1; names are single tokens, drawn anew for every sample:

        context  c = a ;   b = 7 ;   d = b ;   a = 4 ;
        question ? d 7                                   (7 is the answer, and all of the loss)

    A variable k hops down its chain asks for k + 1 look-ups. Chains are equally long and each holds another
    value, so that frequency gives nothing away. RULER asks for all names that hold a value and leaves
    chains in order; this is its single-answer form, shuffled.
    """

    chains: int = 4
    """Chains, each with a value of its own (at most 10)."""
    hops: int = 3
    """Assignments from variable to variable in a chain."""
    names: int = 26
    """Names to choose from."""
    queries: int = 8
    """Variables asked for, of one context; each alone, on its own fork of the memory."""

    def __post_init__(self) -> None:
        if not 1 <= self.chains <= DIGITS:
            raise ValueError(f"chains must lie in 1 ... {DIGITS}, one value each, got {self.chains}")
        if self.hops < 0:
            raise ValueError(f"hops must not be negative, got {self.hops}")
        if self.names < self.variables:
            raise ValueError(
                f"names={self.names} cannot name chains x (hops + 1) = {self.variables} variables"
            )
        if not 1 <= self.queries <= self.variables:
            raise ValueError(f"queries must lie in 1 ... {self.variables} variables, got {self.queries}")

    @property
    def variables(self) -> int:
        """The number of variables in a sample."""
        return self.chains * (self.hops + 1)

    @property
    def vocab_size(self) -> int:
        """The vocabulary is =, ;, ?, ten digits, names, in this order."""
        return FIRST_NAME + self.names

    @property
    def difficulty_name(self) -> str:
        """The difficulty key counts the assignments between the variable and its value."""
        return "hops"

    def floors(self) -> dict[str, float]:
        """Guess among the values of the context; a constant digit is among them or not."""
        return {"chance": 1 / self.chains, "constant": 1 / DIGITS}

    def batch(self, rng: np.random.Generator, size: int, split: Split, level: float = 1.0) -> Batch:
        """Draw `size` contexts with their questions; `level` caps the hops at `ceil(level hops)`."""
        del split  # names!/(names - variables)! contexts: train and test never meet by chance
        links = int(np.ceil(level * self.hops)) + 1
        total = self.chains * links
        # Draws: names, values, order of statements, questions. Another order would change every sample of a
        # seed.
        name = rng.permuted(np.tile(np.arange(self.names), (size, 1)), axis=1)[:, :total] + FIRST_NAME
        name = name.reshape(size, self.chains, links)  # from the value down
        value = rng.permuted(np.tile(np.arange(DIGITS), (size, 1)), axis=1)[:, : self.chains, None] + 3
        # The first variable of a chain is set to the value, each further one to the variable before it.
        source = np.concatenate([value, name[:, :, :-1]], axis=2)
        mark = [np.full(name.shape, token) for token in (EQUALS, STOP)]
        statement = np.stack([name, mark[0], source, mark[1]], axis=3).reshape(size, total, 4)
        order = rng.permuted(np.tile(np.arange(total), (size, 1)), axis=1)
        context = np.take_along_axis(statement, order[:, :, None], axis=1).reshape(size, -1)
        # While a curriculum keeps chains short there may be fewer variables than questions.
        M = min(self.queries, total)
        asked = rng.permuted(np.tile(np.arange(total), (size, 1)), axis=1)[:, :M]
        answer = np.take_along_axis(np.broadcast_to(value, name.shape).reshape(size, total), asked, axis=1)
        variable = np.take_along_axis(name.reshape(size, total), asked, axis=1)
        rows = np.stack([np.full(M * size, ASK), variable.ravel(), answer.ravel()], axis=1)
        return single_answers(context, rows, asked.ravel() % links)

    def solve(self, tokens: list[int]) -> list[list[int]]:
        """See `Task.solve`."""
        *statements, _, node, _ = tokens
        source = dict(zip(statements[::4], statements[2::4], strict=True))
        while node in source:
            node = source[node]
        return [[node]]

    def spell(self, tokens: list[int]) -> str:
        """Spell the assignments as they would be written."""
        return " ".join(map(self._token, tokens))

    def _token(self, token: int) -> str:
        if token < 3:
            return "=;?"[token]
        return str(token - 3) if token < FIRST_NAME else f"x{token - FIRST_NAME}"
