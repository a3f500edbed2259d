"""A training step on K GPUs by formulas: memory, collectives and the bytes they move, seconds.

What a process computes and keeps is simulated (`training.simulated`); all else follows from the weights and
from how they lie: a copy a GPU (S = 1), or each group of S GPUs holds one copy together. Gradients are summed
after the whole backward pass, for a weight's gradient is complete only when the first window has been left:
no communication hides behind computing.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from lmsleep.backbones import Model
from lmsleep.sleep import SleepConfig
from lmsleep.tasks import Batch
from lmsleep.training.batches import in_parts
from lmsleep.training.config import TrainConfig
from lmsleep.training.muon import ITERATIONS, TOGETHER, Muon
from lmsleep.training.optim import optimizers
from lmsleep.training.sharing import units
from lmsleep.training.simulated import Parts, Simulated, simulate

FLOAT32 = 4  # bytes: of what optimizers keep
MUON = 2  # bytes: matrices are gathered in the precision that they are orthogonalised in, bfloat16 on GPUs
EXCHANGES = 4  # small ones a step: tokens; loss, and who has gradients; two for who was asked to stop


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What GPUs, and the lines between them, are assumed to attain.

    Attributes:
        flops: FLOP a second of a GPU, on this model.
        bandwidth: bytes a second that a GPU sends within its node.
        between: bytes a second that a GPU sends to another node.
        latency: seconds that a collective takes, however little it moves.
        node: GPUs of a node.
        memory: bytes of a GPU.

    Raises:
        ValueError: naming the field that is out of range.
    """

    flops: float = 2e14
    bandwidth: float = 3e11
    between: float = 4e10
    latency: float = 5e-5
    node: int = 8
    memory: float = 80e9

    def __post_init__(self) -> None:
        for name in ("flops", "bandwidth", "between", "memory", "node"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.latency < float("inf"):
            raise ValueError(f"latency must not be negative, got {self.latency}")


@dataclass(frozen=True)
class Layout:
    """How weights lie on GPUs: in K / S groups, each of which holds one copy.

    Attributes:
        gpus: K.
        shard: S; 1: every GPU has a copy.

    Raises:
        ValueError: if S does not divide K.
    """

    gpus: int
    shard: int = 1

    def __post_init__(self) -> None:
        for name in ("gpus", "shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.shard > self.gpus:
            raise ValueError(f"shard={self.shard} must not exceed the gpus={self.gpus}")
        if self.gpus % self.shard:
            raise ValueError(f"shard={self.shard} must divide the gpus={self.gpus}")


@dataclass(frozen=True)
class Weights:
    """The weights of a model, as far as memory and communication depend on them.

    Attributes:
        nbytes: of all.
        units: bytes of each block and of the rest: of all, and of those that are trained. What is gathered,
            or whose gradients are scattered, at once.
        sums: bytes of each unit whose gradients are summed at once, of one dtype.
        matrices: shape of each matrix that Muon trains.
        vectors: elements of each tensor that AdamW trains.
    """

    nbytes: int
    units: tuple[tuple[int, int], ...]
    sums: tuple[int, ...]
    matrices: tuple[torch.Size, ...]
    vectors: tuple[int, ...]

    @classmethod
    def of(cls, model: Model, train: TrainConfig) -> "Weights":
        """Return those of a model, on any device, that would be trained so."""
        groups = optimizers(model, train)
        by = {
            muon: [
                p for o in groups if isinstance(o, Muon) is muon for g in o.param_groups for p in g["params"]
            ]
            for muon in (True, False)
        }
        inside = {id(p) for block in model.blocks for p in block.parameters()}
        whole = [[*block.parameters()] for block in model.blocks]
        whole.append([p for p in model.parameters() if id(p) not in inside])
        return cls(
            nbytes=_bytes(model.parameters()),
            units=tuple((_bytes(unit), _bytes(p for p in unit if p.requires_grad)) for unit in whole),
            sums=tuple(map(_bytes, units(model))),
            matrices=tuple(p.shape for p in by[True]),
            vectors=tuple(p.numel() for p in by[False]),
        )

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of all that is trained."""
        return sum(trained for _, trained in self.units)

    @property
    def optimizer_bytes(self) -> int:
        """Bytes that the optimizers keep: a momentum a matrix; two moments and a count a tensor of AdamW."""
        momenta = sum(map(prod, self.matrices))
        return FLOAT32 * (momenta + 2 * sum(self.vectors) + len(self.vectors))

    @property
    def muon_flops(self) -> int:
        """FLOPs of orthogonalising all matrices, which every GPU does for itself."""
        sides = [(min(shape), max(shape)) for shape in self.matrices]
        # An iteration: X X^T, its square, and that times X.
        return ITERATIONS * sum(4 * s * s * n + 2 * s**3 for s, n in sides)

    @property
    def stacks(self) -> list[int]:
        """Elements of each stack of matrices of one shape that are orthogonalised together."""
        found = []
        for shape, count in Counter(self.matrices).items():
            some = max(1, TOGETHER // prod(shape))
            sizes = [min(some, count - i) for i in range(0, count, some)]
            found += [size * prod(shape) for size in sizes]
        return found


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


@dataclass(frozen=True)
class Collective:
    """One collective of a step.

    Attributes:
        kind: all-reduce, all-gather or reduce-scatter.
        nbytes: of what is summed or gathered, whole.
        ranks: GPUs that take part.
        stride: distance between two of them, in GPUs.
    """

    kind: str
    nbytes: float
    ranks: int
    stride: int

    @property
    def sent(self) -> float:
        """Bytes that each GPU sends, along a ring."""
        return (2 if self.kind == "all-reduce" else 1) * (self.ranks - 1) / self.ranks * self.nbytes

    def seconds(self, cluster: Cluster) -> float:
        """Return how long it takes: the slowest line of the ring decides."""
        within = self.ranks * self.stride <= cluster.node
        return cluster.latency + self.sent / (cluster.bandwidth if within else cluster.between)


def collectives(weights: Weights, layout: Layout, muon: int = MUON) -> Iterator[Collective]:
    """Yield the collectives of a step, in which Muon gathers numbers of `muon` bytes.

    Windows and passes do not come in.
    """
    K, S = layout.gpus, layout.shard
    if S == 1:
        if K > 1:
            yield from (Collective("all-reduce", nbytes, K, 1) for nbytes in weights.sums)
        return
    for every, trained in weights.units:
        yield Collective("all-gather", every, S, 1)
        if trained:
            yield Collective("reduce-scatter", trained, S, 1)
            # Each slice, over the groups that hold it too.
            if K > S:
                yield Collective("all-reduce", trained / S, K // S, S)
    yield from (Collective("all-gather", muon * size, S, 1) for size in weights.stacks)


def memory(weights: Weights, layout: Layout, step: Simulated, parts: int = 1) -> dict[str, int]:
    """Return the bytes of a GPU by what they are for.

    Args:
        weights: of the model.
        layout: how they lie.
        step: what a process keeps.
        parts: in which a batch is read.
    """
    S, gradients = layout.shard, weights.gradient_bytes
    return {
        "parameters": ceil(weights.nbytes / S),
        # Kept from the forward pass of the first window to the end of the backward pass.
        "gathered": weights.nbytes if S > 1 else 0,
        # Whole until the first window has been left; those of earlier parts, to which they are added, too.
        "gradients": gradients * (2 if parts > 1 else 1) + (ceil(gradients / S) if S > 1 else 0),
        "optimizers": ceil(weights.optimizer_bytes / S),
        "activations": step.activations,
        "room": step.room,
    }


class Plan:
    """Steps of one run on any number of GPUs.

    Args:
        model: on any device, which it leaves; nothing is computed on it.
        train: how it is trained.
        sleep: how it sleeps.
        batch: of a step, all of it.
        cluster: what GPUs attain.
        bfloat16: blocks compute in bfloat16.
    """

    def __init__(
        self,
        model: Model,
        train: TrainConfig,
        sleep: SleepConfig,
        batch: Batch,
        cluster: Cluster,
        *,
        bfloat16: bool = True,
    ) -> None:
        self.train, self.sleep, self.batch, self.cluster = train, sleep, batch, cluster
        self.weights = Weights.of(model, train)
        self.parts = Parts(model, bfloat16=bfloat16)
        self.simulated = cache(self._simulated)

    @property
    def rows(self) -> int:
        """The number of rows (contexts) that are dealt out."""
        return self.batch.num_samples

    def _simulated(self, gpus: int, passes: int) -> Simulated:
        """Return what the GPU with the most rows does in a step."""
        return simulate(self.parts, self._read(gpus), self.sleep.with_passes(passes), self.train)

    def _read(self, gpus: int) -> list[Batch]:
        """Return the parts in which the GPU with the most rows reads them."""
        return in_parts(self.batch.share(0, gpus), self.train.accumulate, self.batch.num_samples)

    def step(self, layout: Layout, passes: int) -> dict[str, Any]:
        """Return what a step takes.

        Returns:
            `gpus`, `shard`, `passes`; of the fullest GPU `rows`, `memory` (bytes by what they are for),
            `memory_bytes`, `fits`, `flops` and `muon_flops`; `collectives` and `sent_bytes` of each GPU;
            `compute_seconds`, `communication_seconds`, `seconds`, and `efficiency` against one GPU.

        Raises:
            ValueError: for more GPUs than rows.
        """
        if layout.gpus > self.rows:
            raise ValueError(f"gpus={layout.gpus} must not exceed the {self.rows} rows that they share out")
        step = self.simulated(layout.gpus, passes)
        alone = step if layout.gpus == 1 else self.simulated(1, passes)
        held = memory(self.weights, layout, step, len(self._read(layout.gpus)))
        moved = [*collectives(self.weights, layout)]
        muon = self.weights.muon_flops
        computing = (step.flops + muon) / self.cluster.flops
        waiting = sum(c.seconds(self.cluster) for c in moved)
        waiting += EXCHANGES * self.cluster.latency if layout.gpus > 1 else 0.0
        seconds = computing + waiting
        return {
            **asdict(layout),
            "passes": passes,
            "rows": ceil(self.rows / layout.gpus),
            "memory": held,
            "memory_bytes": sum(held.values()),
            "fits": sum(held.values()) <= self.cluster.memory,
            "flops": step.flops,
            "muon_flops": muon,
            "collectives": len(moved) + (EXCHANGES if layout.gpus > 1 else 0),
            "sent_bytes": round(sum(c.sent for c in moved)),
            "compute_seconds": computing,
            "communication_seconds": waiting,
            "seconds": seconds,
            "efficiency": (alone.flops + muon) / self.cluster.flops / seconds / layout.gpus,
        }

    def least(self, shard: int, passes: int) -> int | None:
        """Return the fewest GPUs, doubled from `shard` on, on which a step fits; None: on no number."""
        gpus = shard
        while gpus <= self.rows:
            if self.step(Layout(gpus, shard), passes)["fits"]:
                return gpus
            gpus *= 2
        return None


def rows_of_text(rows: int, tokens: int) -> Batch:
    """Return a batch of texts, every token of which is predicted.

    Raises:
        ValueError: for a batch of nothing.
    """
    if rows < 1 or tokens < 2:
        raise ValueError(f"a batch has a row of 2 tokens at least, got {rows} rows of {tokens}")
    zeros = torch.zeros(rows, tokens, dtype=torch.int64)
    return Batch(zeros, zeros == 0, zeros - 1, torch.zeros(0, dtype=torch.int64))
