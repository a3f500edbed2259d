"""Equations between variables: GSM-Infinite's symbolic subset (arXiv 2502.05252), one answer a question."""

from dataclasses import dataclass

import numpy as np

from lmsleep.tasks.base import Batch, single_answers
from lmsleep.text import Split

EQUALS, MORE, LESS, STOP, ASK = range(5)
STEP = np.array([0, 1, -1])  # of EQUALS, MORE, LESS
LARGEST = 10  # value of a root


@dataclass(frozen=True, kw_only=True)
class GSMSymbolic:
    """Equations in random order, read and evicted; then: what is the value of this variable?

    One sample with ops=3, noise=2 and one question; names are single tokens, drawn anew for every sample:

        context  a = c + 1 ;   e = d - 1 ;   c = 7 ;   b = a ;
        question ? b 8                                         (8 is the answer, and all of the loss)

    The variables hang on one that has a value as a random tree (each on one of those before it), and are
    equal to, one more or one less than what they hang on. Noise is another such tree without a value. The
    source asks for all variables of a value and has a model grade the names; this is its single-answer form.
    """

    ops: int = 8
    """Variables that have a value, each from one equation."""
    noise: int = 24
    """Variables that have none."""
    names: int = 64
    """Names to choose from."""
    queries: int = 4
    """Variables asked for, of one context; each alone, on its own fork of the memory."""

    def __post_init__(self) -> None:
        if self.ops < 1 or self.noise < 0:
            raise ValueError(
                f"ops must be at least 1 and noise not negative, got {self.ops} and {self.noise}"
            )
        if self.names < self.ops + self.noise:
            raise ValueError(
                f"names={self.names} cannot name ops + noise = {self.ops + self.noise} variables"
            )
        if not 1 <= self.queries <= self.ops:
            raise ValueError(f"queries must lie in 1 ... ops={self.ops}, got {self.queries}")

    @property
    def zero(self) -> int:
        """The number of the token of the value 0; values reach from 1 - ops to 10 + ops - 1."""
        return ASK + self.ops

    @property
    def first_name(self) -> int:
        """The number of the token of the first name."""
        return self.zero + LARGEST + self.ops

    @property
    def vocab_size(self) -> int:
        """The vocabulary is =, = 1 +, = -1 +, ;, ?, values, names, in this order."""
        return self.first_name + self.names

    @property
    def difficulty_name(self) -> str:
        """The difficulty key counts the equations between the variable and the one that has a value."""
        return "h"

    def floors(self) -> dict[str, float]:
        """Repeat the only number of the context ("chance", also by h), or say the best constant."""
        shares = self._depths()
        walk, value, same = np.ones(1), np.zeros(LARGEST + 2 * self.ops - 1), []
        for h, share in enumerate(shares):  # walk: of the difference to the root after h steps
            same.append(float(walk[h]))
            reach = np.convolve(walk, np.full(LARGEST + 1, share / (LARGEST + 1)))
            value += np.pad(reach, self.ops - 1 - h)
            walk = np.convolve(walk, np.full(3, 1 / 3))
        per_h = {f"chance h={h}": chance for h, chance in enumerate(same)}
        return {"chance": float(shares @ same), "constant": float(value.max()), **per_h}

    def batch(self, rng: np.random.Generator, size: int, split: Split, level: float = 1.0) -> Batch:
        """Draw `size` contexts with their questions; `level` caps the variables at `ceil(level ops)`."""
        del split  # names!/(names - ops - noise)! contexts: train and test never meet by chance
        # Every question asks for another variable, so there are as many variables as questions at least.
        ops = max(self.queries, int(np.ceil(level * self.ops)))
        value, depth, parent, relation = self._trees(rng, size, ops)
        _, _, noise_parent, noise_relation = self._trees(rng, size, max(self.noise, 1))
        name = rng.permuted(np.tile(np.arange(self.names), (size, 1)), axis=1)[:, : ops + self.noise]
        name, other = np.split(name + self.first_name, [ops], axis=1)
        source = np.take_along_axis(name, parent, axis=1)
        # The root is set to a number, which stands where the others have the name of their parent.
        source[:, 0] = self.zero + value[:, 0]
        other_source = np.take_along_axis(other, noise_parent[:, : self.noise], axis=1)
        left = np.concatenate([name, other[:, 1:]], axis=1)
        right = np.concatenate([source, other_source[:, 1:]], axis=1)
        how = np.concatenate([relation, noise_relation[:, 1 : self.noise]], axis=1)
        statement = np.stack([left, how, right, np.full(left.shape, STOP)], axis=2)
        statement = np.take_along_axis(statement, _orders(rng, size, left.shape[1])[:, :, None], axis=1)
        asked = _orders(rng, size, ops)[:, : self.queries]
        variable, answer, h = (np.take_along_axis(x, asked, axis=1).ravel() for x in (name, value, depth))
        rows = np.stack([np.full(len(h), ASK), variable, self.zero + answer], axis=1)
        return single_answers(statement.reshape(size, -1), rows, h)

    def solve(self, tokens: list[int]) -> list[list[int]]:
        """See `Task.solve`."""
        *statements, _, node, _ = tokens
        lines = zip(statements[1::4], statements[2::4], strict=True)
        source = dict(zip(statements[::4], lines, strict=True))
        offset = 0
        while node in source:
            relation, node = source[node]
            offset += (0, 1, -1)[relation]
        return [[node + offset]]

    def spell(self, tokens: list[int]) -> str:
        """Spell the equations as they would be written."""
        return " ".join(map(self._token, tokens))

    def _token(self, token: int) -> str:
        if token <= ASK:
            return ("=", "= 1 +", "= -1 +", ";", "?")[token]
        return str(token - self.zero) if token < self.first_name else f"x{token - self.first_name}"

    def _depths(self) -> np.ndarray:
        """Return the shares `[ops]` of the variables that have h = 0, 1, ... equations above them."""
        depth = np.zeros((self.ops, self.ops))
        depth[0, 0] = 1
        for node in range(1, self.ops):
            # A node's parent is any earlier one with equal chance, and it lies one deeper.
            depth[node, 1:] = depth[:node, :-1].mean(axis=0)
        shares: np.ndarray = depth.mean(axis=0)
        return shares

    def _trees(
        self, rng: np.random.Generator, size: int, nodes: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Draw value, depth, parent and relation to it, each `[size, nodes]`; node 0 is the root."""
        # Node i hangs from any node before it, so each row is a random recursive tree.
        parent = rng.integers(0, np.maximum(np.arange(nodes), 1), (size, nodes))
        relation = rng.integers(0, len(STEP), (size, nodes))
        relation[:, 0] = EQUALS
        value, depth, rows = STEP[relation], np.zeros((size, nodes), dtype=np.int64), np.arange(size)
        value[:, 0] = rng.integers(0, LARGEST + 1, size)
        for node in range(1, nodes):
            value[:, node] += value[rows, parent[:, node]]
            depth[:, node] = depth[rows, parent[:, node]] + 1
        return value, depth, parent, relation


def _orders(rng: np.random.Generator, size: int, length: int) -> np.ndarray:
    return rng.permuted(np.tile(np.arange(length), (size, 1)), axis=1)
