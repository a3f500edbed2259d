"""Watching a stream sleep: what every pass over every window left behind."""

from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lmsleep.layers import FastWeights, Writes
from lmsleep.sleep import Backbone, Passes, SleepConfig, evict, read_window
from lmsleep.state import Memory, State


@dataclass(frozen=True, eq=False)
class Pass:
    """One pass over one window.

    Attributes:
        h: `[B, L, d]`, what came out of the looped blocks.
        memory: the fast weights after it. Blocks before the loop have theirs from pass 1 on, blocks after it
            only in the last pass.
        writes: what the tokens wrote, by block; of a backbone without `FastWeights` layers nothing is known.
    """

    h: Tensor
    memory: Memory
    writes: dict[int, Writes]


@dataclass(frozen=True, eq=False)
class Window:
    """One window that was slept on.

    Attributes:
        tokens: `[B, L]`.
        before: the state it began with.
        passes: in order; the first is the wake pass.
        working_bytes: of the working memory at its end, before anything was evicted, of all rows.
        after: the state it left, evicted.
    """

    tokens: Tensor
    before: State
    passes: list[Pass]
    working_bytes: int
    after: State


def fast_weight_layers(model: Backbone) -> dict[int, FastWeights]:
    """Find the `FastWeights` layers by block; none unless every block with fast weights has one."""
    modules: Iterable[Any] = getattr(model, "modules", tuple)()
    layers = [module for module in modules if isinstance(module, FastWeights)]
    blocks = [i for i, writes in enumerate(model.initial_state(1).memory.writes) if writes]
    return dict(zip(blocks, layers, strict=True)) if len(layers) == len(blocks) else {}


@torch.no_grad()
def watch(
    model: Backbone, tokens: Tensor, sleep: SleepConfig, state: State | None = None
) -> Iterator[Window]:
    """Read `tokens` `[B, T]` as `sleep_forward(..., evict_last=True)` does, from `state` (default: nothing).

    Yields every window after its sleep; the last may be part-filled.

    Raises:
        ValueError: for a consolidator that makes no passes, or a looped wake pass.
    """
    by = sleep.consolidator
    if not isinstance(by, Passes) or by.wake_passes != 1:
        raise ValueError(
            f"consolidator={by} cannot be watched: only a sleep in passes over a window, awake in one, can"
        )
    state = model.initial_state(len(tokens)) if state is None else state
    heard = dict[int, Writes]()
    model = _listening(model, heard)
    for window in tokens.split(sleep.window or max(tokens.shape[1], 1), dim=1):
        watched = _Watched(model, by.loop_range(model.num_blocks), heard)
        _, after = read_window(watched, window, state, sleep, passes=sleep.passes, logits=False)
        last = watched.passes[-1]
        # Blocks after the loop write in the last pass only, and after `run` has recorded it.
        working_bytes = after.cache.nbytes
        passes = [*watched.passes[:-1], replace(last, memory=after.memory, writes={**last.writes, **heard})]
        if sleep.window is not None:
            after = evict(sleep.eviction, model, window, after, sleep.window)
        heard.clear()  # also of what an eviction read
        yield Window(window, state, passes, working_bytes, after)
        state = after


@dataclass(eq=False)
class _Watched:
    """A backbone that keeps what its passes through the loop leave behind."""

    model: Backbone
    loop: tuple[int, int]
    heard: dict[int, Writes]
    passes: list[Pass] = field(default_factory=list)

    @property
    def num_blocks(self) -> int:
        return self.model.num_blocks

    @property
    def kinds(self) -> tuple[str, ...]:
        return self.model.kinds

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def device(self) -> torch.device:
        return self.model.device

    def initial_state(self, batch_size: int) -> State:
        return self.model.initial_state(batch_size)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.model.embed(tokens)

    def head(self, h: Tensor) -> Tensor:
        return self.model.head(h)

    def run(self, h: Tensor, state: State, start: int, stop: int, **rows: Any) -> tuple[Tensor, State]:
        h, state = self.model.run(h, state, start, stop, **rows)
        # A pass is what runs exactly the looped blocks; what runs before and after them is no pass.
        if (start, stop) == self.loop:
            self.passes.append(Pass(h, state.memory, dict(self.heard)))
            self.heard.clear()
        return h, state


def _listening(model: Backbone, heard: dict[int, Writes]) -> Backbone:
    """Return the model with layers that write into `heard`, by block, what their tokens write.

    It is a copy with the same weights: others may use the model meanwhile, and are neither heard nor slowed.
    """
    if not fast_weight_layers(model):
        return model
    modules: Any = model  # one, since it has layers
    # What the memo holds already is not copied.
    shared = {id(t): t for t in (*modules.parameters(), *modules.buffers())}
    copy: Backbone = deepcopy(model, shared)

    def hook(block: int) -> Any:
        def hear(layer: Any, args: tuple[Any, ...]) -> None:
            x, _, cache, valid, *_ = args
            heard[block] = layer.writes(x, cache, valid)[0]

        return hear

    for block, layer in fast_weight_layers(copy).items():
        layer.register_forward_pre_hook(hook(block))
    return copy
