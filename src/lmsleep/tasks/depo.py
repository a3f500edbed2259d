"""Depo: follow a hidden cycle k hops (Allen-Zhu, Physics of Language Models 4.1, arXiv 2512.17351)."""

from dataclasses import dataclass
from enum import IntEnum
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
import torch

from lmsleep.tasks.base import HIDDEN, Batch, check_literals
from lmsleep.text import Split

PAD = 0
HELD_OUT = 8  # one cycle in 8 is kept for testing


class Role(IntEnum):
    """The part that a token plays in a question."""

    GIVEN = 0
    """It is read and not predicted: the question itself, and padding."""
    MARKER = 1
    """It is ANS, which is predicted and belongs to no answer."""
    ANSWER = 2
    """It is predicted, and part of an answer."""


@dataclass(frozen=True, kw_only=True)
class Depo:
    """A cycle over n named nodes, its edges in random order; then: where is node x after k hops?

    One sample with nodes=4, names=4, hops=2, name_lengths=(1, 1); the cycle is a -> c -> d -> b -> a:

        tokens   d b   a c   b a   c d   HOP_2 a ANS d
        loss                                      *  *     (* in the loss; d is the answer)

    A question that is asked alone (ask="fork") has no ANS: its end is where the name ends.
    Names are words of fresh random tokens per sequence; the last token of a word is drawn from a
    second copy of the alphabet, so words need no separators. The context is padded on the left to a
    constant length.

    Nodes are the load (facts to store), hops the depth (look-ups to answer); with `pad_to` graphs of every
    load fill the same number of windows, which parts retrieval from reasoning. Keep nodes >= 2 hops for that:
    n - 1 hops are one hop back.
    """

    nodes: int = 75
    """n: nodes on the cycle (at most, if node_distribution is "depo")."""
    hops: int = 16
    """K: questions ask for 1 ... K hops."""
    queries: int = 10
    """M: questions asked about one graph."""
    names: int = 50
    """Letters that names are made of."""
    name_lengths: tuple[int, int] = (1, 2)
    """Shortest and longest name, in tokens."""
    node_distribution: Literal["depo", "fixed"] = "depo"
    """Nodes while training: "depo" draws 3 ... n with weight 1/(n + sqrt(N)); tests always use n."""
    test_hops: Literal["powers", "all"] = "powers"
    """Hops in a test: powers of two up to K and K itself, or all of 1 ... K."""
    ask: Literal["block", "fork"] = "block"
    """Questions follow in one block (the paper), or each alone to its own fork of the memory."""
    pad_to: int | None = None
    """Tokens of the padded context; default what the largest graph needs."""
    held_out_cycles: bool = False
    """Keep one cycle in 8 (by hash) out of training and test on those only; for small n."""

    def __post_init__(self) -> None:
        check_literals(self, ("node_distribution", "test_hops", "ask"))
        low, high = self.name_lengths
        if not 1 <= low <= high <= 8:
            raise ValueError(f"name_lengths must be 1 <= shortest <= longest <= 8, got {self.name_lengths}")
        if self.nodes < 3:
            raise ValueError(f"nodes must be at least 3, got {self.nodes}")
        if self.pad_to is not None and self.pad_to < self.graph_length:
            raise ValueError(
                f"pad_to={self.pad_to} is too short: nodes={self.nodes} take up to {self.graph_length} tokens"
            )
        if self.hops < 1 or self.queries < 1:
            raise ValueError(f"hops and queries must be at least 1, got {self.hops} and {self.queries}")
        if self.ask == "fork" and self.queries > self.nodes:
            raise ValueError(f"queries={self.queries} must not exceed nodes={self.nodes} with ask='fork'")
        if sum(self.names**length for length in range(low, high + 1)) < self.nodes:
            raise ValueError(
                f"names={self.names} with name_lengths={self.name_lengths} cannot name {self.nodes} nodes"
            )

    @property
    def ans(self) -> int:
        """The number of the token ANS, which asks for the answer."""
        return 2 * self.names + 1

    @property
    def vocab_size(self) -> int:
        """The vocabulary is PAD, letters, last letters, ANS, HOP_1 ... HOP_K, in this order."""
        return self.ans + 1 + self.hops

    @property
    def difficulty_name(self) -> str:
        """The difficulty key counts hops."""
        return "k"

    @property
    def graph_length(self) -> int:
        """The most tokens that a graph can have."""
        return 2 * self.nodes * self.name_lengths[1]

    @property
    def context_length(self) -> int:
        """The number of tokens of the padded context."""
        return self.pad_to or self.graph_length

    @property
    def inline_context(self) -> int | None:
        """The number of tokens before the questions; None where these are read apart (fork)."""
        return None if self.ask == "fork" else self.context_length

    def floors(self) -> dict[str, float]:
        """Guess among the nodes that are not the start; no constant answer does better than 1/n.

        "one hop", of each k and over those of a test: a model that has stored every edge and chains none
        knows the start, its successor and its predecessor. Asked for any other node it names none of these
        three, which leaves n - 3. (In a block, answers to earlier questions exclude a few more.)
        """
        n, K = self.nodes, self.hops
        known = {k: k % n in (0, 1, n - 1) for k in range(1, K + 1)}
        one_hop = {k: 1.0 if given else 1 / (n - 3) for k, given in known.items()}
        tested = self._tested_hops
        over_all = sum(one_hop[k] for k in tested) / len(tested)
        per_k = {f"one hop k={k}": floor for k, floor in one_hop.items()}
        return {"chance": 1 / (n - 1), "constant": 1 / n, "one hop": over_all, **per_k}

    def batch(self, rng: np.random.Generator, size: int, split: Split, level: float = 1.0) -> Batch:
        """Draw `size` graphs with their questions; `level` caps the hops at `ceil(level K)`."""
        # The order of the draws (graph, edges, starts, hops) is part of the data: another one would give
        # other samples for the same seed.
        words, counts = self._graphs(rng, size, split)
        context = self._context(rng, words, counts)
        questions = self._questions(rng, words, counts, split, level)
        return self._pack(context, questions)

    def _context(self, rng: np.random.Generator, words: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Return the edges of each graph in random order, padded on the left: `[B, context_length]`."""
        B, n, _ = words.shape
        # a -> c, c -> d, d -> b, b -> a, and an edge of padding for each node that the graph does not have
        edges = np.concatenate([words, _hop(words, counts, np.arange(n)[None, :] + 1)], axis=2)
        edges[~_present(counts, n)] = PAD
        # d b  a c  b a  c d
        edges = np.take_along_axis(edges, _shuffled(rng, counts, n)[:, :, None], axis=1)
        # . . d b a c b a c d: short names and missing nodes leave holes; they all go to the front, so that
        # the newest token stands at the right and the questions follow without a gap.
        tokens = np.pad(edges.reshape(B, -1), ((0, 0), (self.context_length - self.graph_length, 0)))
        return np.take_along_axis(tokens, _to_left(tokens == PAD), axis=1)

    def _questions(
        self, rng: np.random.Generator, words: np.ndarray, counts: np.ndarray, split: Split, level: float
    ) -> "_Questions":
        """Draw up to M questions about each graph, from different nodes."""
        B, n, _ = words.shape
        start = _shuffled(rng, counts, n)[:, : self.queries]
        k = self._hops(rng, start.shape, split, level)
        M = start.shape[1]
        # HOP_2 a ANS d; asked alone, HOP_2 a d
        parts = [
            (self.ans + k[:, :, None], Role.GIVEN),
            (_hop(words, counts, start), Role.GIVEN),
            (np.full((B, M, 0 if self.ask == "fork" else 1), self.ans), Role.MARKER),
            (_hop(words, counts, start + k), Role.ANSWER),
        ]
        tokens = np.concatenate([part for part, _ in parts], axis=2)
        role = np.concatenate([np.full(part.shape, role) for part, role in parts], axis=2)
        # A graph of fewer nodes than M has fewer questions; the places of the others are padding, as are
        # those behind a short name.
        tokens = np.where(_present(counts, M)[:, :, None], tokens, PAD)
        return _Questions(tokens, np.where(tokens == PAD, Role.GIVEN, role), k)

    def _pack(self, context: np.ndarray, questions: "_Questions") -> Batch:
        """Put each block of questions behind its context, or each question into a row of its own."""
        (B, M, _), fork = questions.tokens.shape, self.ask == "fork"
        tokens, role = questions.tokens, questions.role
        number = np.where(role == Role.ANSWER, np.arange(B * M).reshape(B, M, 1), -1)
        shape = (B * M, -1) if fork else (B, -1)
        tokens, role, number = (x.reshape(shape) for x in (tokens, role, number))
        # HOP_2 a ANS d . HOP_1 ...: here padding goes to the end, where it changes nothing that precedes it.
        close_up = _to_left(tokens != PAD)
        tokens, role, number = (np.take_along_axis(x, close_up, axis=1) for x in (tokens, role, number))
        if not fork:
            tokens = np.concatenate([context, tokens], axis=1)
            role = np.concatenate([np.full(context.shape, Role.GIVEN), role], axis=1)
            number = np.concatenate([np.full(context.shape, -1), number], axis=1)
        return Batch(
            tokens=torch.from_numpy(tokens),
            loss_mask=torch.from_numpy(role != Role.GIVEN),
            answers=torch.from_numpy(number),
            difficulty=torch.from_numpy(questions.hops.reshape(-1)),
            context=torch.from_numpy(context) if fork else None,
            context_row=torch.arange(B).repeat_interleave(M) if fork else None,
        )

    def solve(self, tokens: list[int]) -> list[list[int]]:
        """See `Task.solve`."""
        edges: dict[tuple[int, ...], tuple[int, ...]] = {}
        words: list[tuple[int, ...]] = []
        letters: tuple[int, ...] = ()
        k, answers = 0, []
        for token in tokens:
            if token == HIDDEN:
                node = words.pop()
                for _ in range(k):
                    node = edges[node]
                answers.append(list(node))
            elif token > self.ans:
                edges = edges or dict(zip(words[::2], words[1::2], strict=True))
                k = token - self.ans
            elif token not in (PAD, self.ans):
                letters += (token,)
                if token > self.names:  # the last letter of a word
                    words, letters = [*words, letters], ()
        return answers

    def intermediate(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return what hopping passes through: at the last token of every edge, the nodes that lie ahead.

        Args:
            tokens: contexts `[B, T]` int64, as far as they were read.

        Returns:
            `[B, T, K + 1]` int64: the node that an edge points to, and those 1 ... K hops on, each as the
            number of the last letter of its name; -1 at all other tokens, and where no edge leads on.
        """
        ahead = torch.full((*tokens.shape, self.hops + 1), -1)
        for row, context in enumerate(tokens.tolist()):
            words, ends, begin = list[tuple[int, ...]](), list[int](), 0
            for place, token in enumerate(context):
                if token >= self.ans:
                    break
                if token == PAD:
                    begin = place + 1
                elif token > self.names:  # the last letter of a word
                    words.append(tuple(context[begin : place + 1]))
                    ends.append(place)
                    begin = place + 1
            edges = dict(zip(words[::2], words[1::2], strict=False))
            for place, word in zip(ends[1::2], words[1::2], strict=True):
                node: tuple[int, ...] | None = word
                for j in range(self.hops + 1):
                    if node is not None:
                        ahead[row, place, j] = node[-1] - self.names - 1
                        node = edges.get(node)
        return ahead

    def spell(self, tokens: list[int]) -> str:
        """Spell letters as l, last letters of names as n, HOP and ANS by name, and padding as dots."""
        return " ".join(map(self._token, tokens))

    def _token(self, token: int) -> str:
        if token == PAD:
            return "."
        if token > self.ans:
            return f"HOP_{token - self.ans}"
        if token == self.ans:
            return "ANS"
        return f"n{token - self.names}" if token > self.names else f"l{token}"

    def _hops(
        self, rng: np.random.Generator, shape: tuple[int, ...], split: Split, level: float
    ) -> np.ndarray:
        if split == "test" and self.test_hops == "powers":
            return rng.choice(np.array(self._tested_hops), shape)
        return rng.integers(1, max(1, int(np.ceil(level * self.hops))) + 1, shape)

    @property
    def _tested_hops(self) -> list[int]:
        """The hops that a test asks for, each as often."""
        K = self.hops
        powers = {2**i for i in range(K.bit_length()) if 2**i <= K}
        return sorted({*powers, K}) if self.test_hops == "powers" else list(range(1, K + 1))

    def _graphs(self, rng: np.random.Generator, size: int, split: Split) -> tuple[np.ndarray, np.ndarray]:
        """Draw words `[B, n, w]` (0-padded) of the nodes in cycle order, and the node counts `[B]`."""
        if not self.held_out_cycles:
            return self._draw(rng, size, split)
        words, counts, have, draws = [], [], 0, 0
        while have < size:
            # On average this holds `size` of the wanted part or more: 7 cycles in 8 are for training.
            some, count = self._draw(rng, 2 * size if split == "train" else HELD_OUT * size, split)
            mine = (_cycle_hash(some, count) % HELD_OUT == 0) == (split == "test")
            words.append(some[mine])
            counts.append(count[mine])
            have += int(mine.sum())
            draws += len(mine)
            # Of 8,000 cycles about 1,000 fall into either part, unless there are too few different ones.
            if draws > 1000 * HELD_OUT and not have:
                raise ValueError(
                    f"held_out_cycles: no cycle of nodes={self.nodes} and names={self.names} falls into the "
                    f"{split} part; use more nodes or names"
                )
        return np.concatenate(words)[:size], np.concatenate(counts)[:size]

    def _draw(self, rng: np.random.Generator, B: int, split: Split) -> tuple[np.ndarray, np.ndarray]:
        n = self.nodes
        universe, weight = self._universe()
        # Drawing words until n distinct ones exist = the n first arrivals of an exponential race. Smaller
        # graphs take some of these n, so that their names are as long on average (docs/fidelity.md).
        arrival = rng.exponential(size=(B, len(universe))) / weight
        chosen = np.argpartition(arrival, n - 1, axis=1)[:, :n]  # without order; a shuffle follows below
        if split == "train" and self.node_distribution == "depo":
            sizes = np.arange(3, n + 1)
            p = 1 / (sizes + np.sqrt(n))
            counts = rng.choice(sizes, B, p=p / p.sum())
        else:
            counts = np.full(B, n)
        chosen = np.take_along_axis(chosen, np.argsort(rng.random((B, n)), axis=1), axis=1)
        words = universe[chosen]
        words[~_present(counts, n)] = PAD
        return words, counts

    def _universe(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all names, 0-padded `[U, w]`, and the probability of drawing each, `[U]`."""
        low, high = self.name_lengths
        letters = range(1, self.names + 1)
        rows, weight = [], []
        for length in range(low, high + 1):
            for word in product(letters, repeat=length):
                rows.append([*word[:-1], word[-1] + self.names] + [PAD] * (high - length))
                weight.append(self.names**-length / (high - low + 1))
        return np.array(rows), np.array(weight)


class _Questions(NamedTuple):
    """Questions before they are packed: `tokens` and the `Role` of each `[B, M, q]`, and `hops` `[B, M]`."""

    tokens: np.ndarray
    role: np.ndarray
    hops: np.ndarray


def _present(counts: np.ndarray, n: int) -> np.ndarray:
    """Return a mask `[B, n]`, bool: row i has the first `counts[i]` of n things."""
    present: np.ndarray = np.arange(n) < counts[:, None]
    return present


def _shuffled(rng: np.random.Generator, counts: np.ndarray, n: int) -> np.ndarray:
    """Return an order `[B, n]` of n things a row: the `counts[i]` it has at random, then the others."""
    # One number in [0, 1) per thing, plus 1 for what is not there: sorting shuffles and sorts out at once.
    return np.argsort(rng.random((len(counts), n)) + ~_present(counts, n), axis=1)


def _to_left(wanted: np.ndarray) -> np.ndarray:
    """Return the order `[B, T]` that brings `wanted` places to the left and changes nothing else."""
    # False sorts before True; only a stable sort leaves equals in their order.
    return np.argsort(~wanted, axis=1, kind="stable")


def _hop(words: np.ndarray, counts: np.ndarray, node: np.ndarray) -> np.ndarray:
    """Return the words `[B, m, w]` of nodes `[B, m]`, counted modulo the length of the cycle."""
    index = np.broadcast_to(node, (len(words), node.shape[1])) % counts[:, None]
    return np.take_along_axis(words, index[:, :, None], axis=1)


def _cycle_hash(words: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Hash the successor map `[B]`: every rotation of a cycle has the same hash."""
    B, n, w = words.shape
    # A polynomial code per word, then per edge a mix of both ends in the manner of splitmix64 (Steele et al.,
    # 2014): odd factors, so that multiplying mod 2^64 loses nothing. They decide what is held out, so they
    # must never change.
    code = np.zeros((B, n), dtype=np.uint64)
    for i in range(w):
        code = code * np.uint64(1_000_003) + words[:, :, i].astype(np.uint64)
    after = np.take_along_axis(code, (np.arange(n) + 1)[None, :] % counts[:, None], axis=1)
    edge = (code * np.uint64(0x9E3779B97F4A7C15)) ^ (after * np.uint64(0xC2B2AE3D27D4EB4F))
    edge ^= edge >> np.uint64(29)
    edge *= np.uint64(0xBF58476D1CE4E5B9)
    edge ^= edge >> np.uint64(32)
    present = _present(counts, n)
    # A sum does not depend on where the cycle begins.
    total: np.ndarray = (edge * present).sum(axis=1, dtype=np.uint64)
    return (total ^ (total >> np.uint64(31))) >> np.uint64(3)
