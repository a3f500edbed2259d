"""Watching a stream sleep: what every pass over every window, or the whole sleep, left behind."""

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
    """One pass over one window; of a sleep that makes no passes, what reading left or what the sleep left.

    Attributes:
        h: `[B, L, d]`, what came out of the looped blocks; None where there is no pass.
        memory: the fast weights after it. Blocks before the loop have theirs from pass 1 on, blocks after it
            only in the last pass.
        writes: what the tokens wrote, by block; of a backbone without `FastWeights` layers nothing is known.
    """

    h: Tensor | None
    memory: Memory
    writes: dict[int, Writes]


@dataclass(frozen=True, eq=False)
class Window:
    """One window that was slept on.

    Attributes:
        tokens: `[B, L]`.
        before: the state it began with.
        passes: in order; the first is the wake pass, the last is how the sleep ended.
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
    """
    state = model.initial_state(len(tokens)) if state is None else state
    heard = dict[int, Writes]()
    if in_passes(sleep):
        model = _listening(model, heard)
    for window in tokens.split(sleep.window or max(tokens.shape[1], 1), dim=1):
        if in_passes(sleep):
            passes, after = _pass_by_pass(model, window, state, sleep, heard)
        else:
            passes, after = _at_its_ends(model, window, state, sleep)
        working_bytes = after.cache.nbytes
        if sleep.window is not None:
            after = evict(sleep.eviction, model, window, after, sleep.window)
        heard.clear()  # also of what an eviction read
        yield Window(window, state, passes, working_bytes, after)
        state = after


def in_passes(sleep: SleepConfig) -> bool:
    """Say whether each pass of a sleep can be watched; of any other only how it begins and ends."""
    # Not of a class derived from it, which may sleep as it likes.
    return type(sleep.consolidator) is Passes and sleep.wake_passes == 1


def way_of(sleep: SleepConfig) -> str:
    """Name a way to sleep."""
    return sleep.method if sleep.wake_passes == 1 else f"looped, W = {sleep.wake_passes}"


def _pass_by_pass(
    model: Backbone, window: Tensor, state: State, sleep: SleepConfig, heard: dict[int, Writes]
) -> tuple[list[Pass], State]:
    """Sleep on a window in passes; return them and the state after, before eviction."""
    by: Any = sleep.consolidator
    # What is only read goes through all blocks in one run.
    loop = by.loop_range(model.num_blocks) if by.passes > 1 else (0, model.num_blocks)
    watched = _Watched(model, loop, heard)
    _, after = read_window(watched, window, state, sleep, logits=False)
    *first, last = watched.passes
    # Blocks after the loop write in the last pass only, and after `run` has recorded it.
    return [*first, replace(last, memory=after.memory, writes={**last.writes, **heard})], after


def _at_its_ends(
    model: Backbone, window: Tensor, state: State, sleep: SleepConfig
) -> tuple[list[Pass], State]:
    """Sleep on a window in any way; return what reading leaves and what the sleep leaves, and the state."""
    ends = [
        read_window(model, window, state, sleep, passes=n, logits=False)[1] for n in sorted({1, sleep.passes})
    ]
    return [Pass(None, end.memory, {}) for end in ends], ends[-1]


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
