"""What a training step takes, found out without taking it: FLOPs, and bytes of activations.

The cost of one block over one window is counted by PyTorch's own counters on tensors without numbers
(`FakeTensorMode`), once for every block that is not like one before. Then the step itself is played, real
batch, real Algorithm 1 and real backward pass, on a model whose blocks do nothing but ask what they cost.
So windows, passes, truncation and recomputed activations need no formulas, and a model of any size costs
seconds.
"""

import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lmsleep.backbones import Model
from lmsleep.evaluation.cost import on_meta, parameter_names, share
from lmsleep.flops import flop_counter
from lmsleep.sleep import (
    CONSOLIDATOR,
    CONSOLIDATORS,
    GradientSteps,
    InPlace,
    MemoryTokens,
    SleepConfig,
)
from lmsleep.sleep.loss import nll
from lmsleep.state import Cache, Memory, State
from lmsleep.tasks import Batch
from lmsleep.training.config import TrainConfig
from lmsleep.training.device import autocast
from lmsleep.training.held import Alive, kept_bytes
from lmsleep.training.objective import Objective

CPU = torch.device("cpu")  # whose kernels are asked what they keep
ROWS = 32  # so many that what they hold is more than the gradients of the weights
Flags = tuple[bool, bool, bool]  # of h, S and the working memory


@dataclass(frozen=True)
class Simulated:
    """What one process does in a step, its optimizers apart.

    Attributes:
        flops: of the forward and the backward pass over all parts of the batch.
        activations: bytes that autograd keeps for the backward pass, at most at a time.
        room: bytes beside these for what a block, or the loss, holds while it is at work.
    """

    flops: int
    activations: int
    room: int


@dataclass(frozen=True)
class Held:
    """Bytes of a part of the model over one window.

    Attributes:
        row: kept for the backward pass, a row of the batch.
        once: kept whatever the rows: copies of weights in bfloat16.
        room: held beside these at the worst moment, a row.
    """

    row: int
    once: int
    room: int


@dataclass(frozen=True)
class Part:
    """One part of a model as it is called: which block (None: the head, with the loss), on what.

    Attributes:
        block: its number.
        tokens: T.
        past: positions in its working memory.
        span: most positions that a token attends to.
    """

    block: int | None
    tokens: int
    past: int
    span: int | None


class Parts:
    """Costs of the parts of a model, each counted when it is first asked for.

    Args:
        model: on any device, which it leaves; nothing is computed on it.
        bfloat16: blocks compute in bfloat16, by autocast.

    Attributes:
        trained: of every block, of the embedding and of the head: if any of its weights are.
        writes: of every block, if it has fast weights.
        flops: of a part in one row; see `_flops`.
        held: by a part; see `_held`.
    """

    def __init__(self, model: Model, *, bfloat16: bool) -> None:
        # FLOPs are counted on the device "meta". Which tensors are kept depends on kernels and autocast, that
        # only tensors that pretend to lie on a device choose; these take much longer. What they meet becomes
        # one of them, so that layers which make tensors of their own can run.
        self.meta, self.mode = on_meta(model), FakeTensorMode(allow_non_fake_inputs=True)
        self.bfloat16 = bfloat16
        self.fakes = _fakes(self.meta, self.mode)
        empty = self.meta.initial_state(1)
        h = self.meta.embed(torch.zeros(1, 1, dtype=torch.int64, device="meta"))
        self.writes = empty.memory.writes
        self.trained = [any(p.requires_grad for p in block.parameters()) for block in self.meta.blocks]
        self.trained += [h.requires_grad, self.meta.head(h.detach()).requires_grad]
        # What a pass carries to the next one: h of a token, S of every block.
        self.h_bytes = h.nbytes
        self.S_bytes = [sum(t.nbytes for t in part) for part in empty.memory.parts]
        shapes = [
            (
                self.meta.kinds[i],
                tuple((name, p.shape, p.requires_grad) for name, p in block.named_parameters()),
                tuple(t.shape for t in (*empty.memory.parts[i], *empty.cache.layers[i])),
            )
            for i, block in enumerate(self.meta.blocks)
        ]
        # Blocks that look alike cost alike: the first of them is counted for all.
        self._first = [shapes.index(shape) for shape in shapes]
        self.flops, self.held = cache(self._flops), cache(self._held)

    def like(self, part: Part) -> Part:
        """Return the part that is counted in place of `part`."""
        return part if part.block is None else replace(part, block=self._first[part.block])

    def _flops(self, part: Part, h: bool, asked: Flags | None) -> int:
        """Count the FLOPs of a part in one row.

        Args:
            part: which.
            h: the hidden states that it is given need a gradient.
            asked: outputs that are given one, for the backward pass; None: the forward pass.
        """
        with _apart():
            given = _given(self.meta, part, 1, h, "meta")
            with flop_counter() as counter:
                outputs = _call(self.meta, part, *given)
            if asked is None:
                return counter.get_total_flops()
            with flop_counter() as counter:
                _backward([t for some, on in zip(outputs, asked, strict=True) if on for t in some])
        self.meta.zero_grad()
        return counter.get_total_flops()

    def _held(self, part: Part, h: bool) -> Held:
        """Count the bytes that a part holds, of some rows and of twice as many, for what a row adds."""
        (some, before), (more, peak) = (self._bytes(part, rows, h) for rows in (ROWS, 2 * ROWS))
        row = (more - some) // ROWS
        return Held(row, max(some - ROWS * row, 0), max((peak - before) // ROWS - row, 0))

    def _bytes(self, part: Part, rows: int, h: bool) -> tuple[int, int]:
        """Return the bytes kept for the backward pass of so many rows, and the most alive until its end."""
        with _apart(), self.mode:
            given = _given(self.fakes, part, rows, h, "cpu")
            with Alive() as alive:
                with kept_bytes(self.fakes.parameters()) as kept, autocast(CPU, self.bfloat16):
                    outputs = _call(self.fakes, part, *given)
                _backward([t for some in outputs for t in some])
        self.fakes.zero_grad()
        return kept.total, alive.most


@contextmanager
def _apart() -> Iterator[None]:
    """Count apart from the step that is played, which may want no gradients, or recompute."""
    whole = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.enable_grad(), whole, warnings.catch_warnings():
        # That a kernel is not fused in these types on a CPU, where it is not to run.
        warnings.simplefilter("ignore")
        yield


def _given(model: Model, part: Part, rows: int, needs_h: bool, device: str) -> tuple[Tensor, State]:
    """Return what a part is called with."""
    tokens = torch.zeros(rows, part.past + part.tokens, dtype=torch.int64, device=device)
    with torch.no_grad():
        h, state = model.embed(tokens), model.initial_state(rows)
        if part.block is not None and part.past:
            _, before = model.run(h[:, : part.past], state, part.block, part.block + 1)
            state = State(state.memory, before.cache.last(part.past))
    # All but the first window of a text is given what needs a gradient; the first counts like the others.
    return _leaf(h[:, part.past :], needs_h), State(state.memory.map(_leaf), state.cache.map(_leaf))


def _call(model: Model, part: Part, h: Tensor, state: State) -> tuple[Sequence[Tensor], ...]:
    """Call a part; return what comes out: h (the loss, of the head), S and working memory."""
    i = part.block
    if i is None:
        targets = torch.zeros(h.shape[:2], dtype=torch.int64, device=h.device)
        return [nll(model.head(h), targets)], (), ()
    out, after = model.run(h, state, i, i + 1, span=part.span)
    return [out], after.memory.parts[i], after.cache.layers[i]


def _backward(outs: Sequence[Tensor]) -> None:
    outs = [t for t in outs if t.requires_grad]
    if outs:
        torch.autograd.backward(outs, [torch.ones_like(t) for t in outs])


def simulate(
    parts: Parts, batches: Sequence[Batch], sleep: SleepConfig, train: TrainConfig, total: int | None = None
) -> Simulated:
    """Play the forward and backward passes of a step.

    Args:
        parts: of the model.
        batches: what is read, one held at a time.
        sleep: how.
        train: `backprop_passes` and `checkpoint`.
        total: as of `Objective.forward`.

    Raises:
        ValueError: for a consolidator of the library other than `Passes`, which does more than run blocks.
    """
    if isinstance(by := sleep.consolidator, GradientSteps | MemoryTokens | InPlace):
        raise ValueError(
            f"{CONSOLIDATOR.name_of(type(by), CONSOLIDATORS)} cannot be played: a step is planned for "
            "sleeps in passes alone"
        )
    stage = _Stage(parts, recomputed=train.checkpoint)
    objective = Objective(cast(Model, stage), train)
    for batch in batches:
        # Token 0 for every token: the head of the stage knows no other.
        plain = replace(
            batch,
            tokens=torch.zeros_like(batch.tokens),
            context=None if batch.context is None else torch.zeros_like(batch.context),
        )
        loss = objective(plain, sleep, total)
        if loss.requires_grad:
            loss.backward()
    once = sum(parts.held(*call).once for call in stage.called)
    room = max((rows * parts.held(*call).room for call, rows in stage.called.items()), default=0)
    return Simulated(stage.flops, stage.most + once, room)


class _Stage(nn.Module):
    """A backbone whose hidden states, fast weights and cached positions are one number each.

    Attributes:
        flops: counted so far.
        most: most bytes that were kept at a time.
        called: most rows of each part that kept something, by the part and if its h needs a gradient.
    """

    def __init__(self, parts: Parts, *, recomputed: bool) -> None:
        super().__init__()
        self.recomputed = recomputed
        self.parts, self.num_blocks = parts, parts.meta.num_blocks
        self.flops = self.now = self.most = 0
        self.called: dict[tuple[Part, bool], int] = {}
        # Stand for the weights of blocks, embedding and head: a gradient flows where a real one would.
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(1), on) for on in parts.trained)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def initial_state(self, batch_size: int) -> State:
        memory = Memory.zeros([(1,) if writes else None for writes in self.parts.writes], batch_size)
        return State(memory, Cache(tuple((torch.zeros(batch_size, 0, 1),) for _ in self.parts.writes)))

    def embed(self, tokens: Tensor) -> Tensor:
        return tokens[..., None] * self.weights[-2]

    def run(
        self,
        h: Tensor,
        state: State,
        start: int,
        stop: int,
        *,
        valid: Tensor | None = None,
        span: int | None = None,
    ) -> tuple[Tensor, State]:
        del valid  # padding is computed like tokens
        new, rows = [], len(h)
        # What is recomputed begins with h and S, which are kept from the forward pass on.
        if self.recomputed and h.requires_grad and torch._C._current_graph_task_id() == -1:
            self.now += rows * (h.shape[1] * self.parts.h_bytes + sum(self.parts.S_bytes[start:stop]))
        for i in range(start, stop):
            (S,) = state.memory.parts[i] or (None,)
            (past,) = state.cache.layers[i]
            part = self.parts.like(Part(i, h.shape[1], past.shape[1], span))
            h, S, past = _played(self, part, h, S, past, self.weights[i])
            new.append((S, (past,)))
        return h, state.replace(start, new)

    def head(self, h: Tensor) -> Tensor:
        part = Part(None, h.shape[1], 0, None)
        return _played(self, part, h, None, h[:, :0], self.weights[-1])[0]

    def hold(self, part: Part, h: bool, rows: int) -> Tensor:
        """Return a tensor without numbers that stands for what a part keeps, and count it while it lives."""
        self.called[part, h] = max(rows, self.called.get((part, h), 0))
        size = rows * self.parts.held(part, h).row
        held = torch.empty(size, dtype=torch.uint8, device="meta")
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(held.untyped_storage(), self._free, size)
        return held

    def _free(self, size: int) -> None:
        self.now -= size


class _Block(torch.autograd.Function):
    """A part that computes nothing, and counts."""

    @staticmethod
    def forward(
        ctx: Any, stage: _Stage, part: Part, h: Tensor, S: Tensor | None, past: Tensor, weight: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)  # None says that nobody asks for a gradient
        ctx.stage, ctx.part, ctx.rows, ctx.needs_h = stage, part, len(h), h.requires_grad
        ctx.inputs = h, S, past
        stage.flops += ctx.rows * stage.parts.flops(part, True, None)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(stage.hold(part, ctx.needs_h, ctx.rows))
        return h.clone(), None if S is None else S.clone(), torch.cat([past, h], dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # where activations are recomputed, now
        asked = tuple(grad is not None for grad in grads)
        ctx.stage.flops += ctx.rows * ctx.stage.parts.flops(ctx.part, ctx.needs_h, asked)
        needed = ctx.needs_input_grad[2:]
        given = zip((*ctx.inputs, torch.zeros(1)), needed, strict=True)
        return None, None, *(torch.zeros_like(x) if on else None for x, on in given)


def _played(*given: Any) -> tuple[Tensor, Tensor | None, Tensor]:
    return cast(tuple[Tensor, Tensor | None, Tensor], _Block.apply(*given))  # type: ignore[no-untyped-call]


def _leaf(x: Tensor, needed: bool = True) -> Tensor:
    """Return the same values, as what a gradient is wanted of."""
    # A view, for PyTorch's FLOP counter cannot follow a gradient to a leaf.
    return x.detach().requires_grad_(needed).view_as(x)


def _fakes(model: Model, mode: FakeTensorMode) -> Model:
    """Return a copy of a model on "meta" with tensors of `mode`, as if on a CPU."""
    module = cast(nn.Module, deepcopy(model))
    with mode:
        for names in parameter_names(module):
            p = module.get_parameter(names[0])
            share(module, names, nn.Parameter(torch.empty_like(p, device="cpu"), p.requires_grad))
        for name, buffer in [*module.named_buffers()]:
            owner, _, own = name.rpartition(".")
            setattr(module.get_submodule(owner), own, torch.empty_like(buffer, device="cpu"))
    return cast(Model, module)
