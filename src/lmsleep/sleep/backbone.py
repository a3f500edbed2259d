"""What a model must offer to sleep; nothing else in this package knows a model."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lmsleep.state import Memory, State


class Backbone(Protocol):
    """What a model must offer to sleep."""

    @property
    def num_blocks(self) -> int:
        """Number `D` of blocks."""
        ...

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each block; those with keys and values have "attention" in it."""
        ...

    @property
    def vocab_size(self) -> int:
        """The number `V` of tokens that it reads: 0 ... V - 1."""
        ...

    @property
    def device(self) -> torch.device:
        """The device on which its tokens and states must lie."""
        ...

    def initial_state(self, batch_size: int) -> State:
        """`S = 0` and an empty working memory, for `batch_size` rows."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens `[B, T]` -> hidden states `h` `[B, T, d]`."""
        ...

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
        """Blocks `start ... stop - 1`; see `HybridLM.run`.

        Rows differ in length where `valid` or `state.cache.filled` says so; both must be honoured.
        """
        ...

    def head(self, h: Tensor) -> Tensor:
        """Hidden states -> logits `[B, T, V]`."""
        ...


@runtime_checkable
class Opens(Backbone, Protocol):
    """A backbone whose working memory holds how its window began, which no eviction knows."""

    def opened(self, state: State) -> State:
        """Return the state with which a window begins, of what an eviction has left."""
        ...


class Recalls(Backbone, Protocol):
    """A backbone with memory tokens, for `MemoryTokens` and `GradMem`.

    Memory tokens are the `S` of the first block, `[B, 1, m, d]`.
    """

    @property
    def memory_tokens(self) -> int:
        """Their number m; 0: none."""
        ...

    def recall(self, memory: Memory) -> Tensor:
        """Memory tokens -> hidden states `[B, m, d]`, to be read before the tokens of a window."""
        ...


class Learns(Backbone, Protocol):
    """A backbone whose blocks can learn what they read, for `InPlace`."""

    @property
    def learns(self) -> bool:
        """Whether any block does."""
        ...

    def learn(
        self,
        h: Tensor,
        state: State,
        rate: float,
        *,
        valid: Tensor | None = None,
        span: int | None = None,
    ) -> tuple[Tensor, State]:
        """All blocks over embedded tokens, as `run`; then each that learns adds to its `S`, times `rate`."""
        ...


@runtime_checkable
class Compactable(Backbone, Protocol):
    """What a `Backbone` offers besides, if its attention can read fewer keys than it has read tokens.

    Its `run` shows all tokens what is in `state.cache.kept`; its blocks with attention call
    `torch.nn.functional.scaled_dot_product_attention` once, which is where their queries are seen.
    """

    def kept_sizes(self) -> tuple[tuple[int, int, int] | None, ...]:
        """For each block the heads H and the sizes K and V of keys and values; None without attention.

        Raises:
            ValueError: if attention in this model is not a softmax over keys that stay what they are.
        """
        ...

    def turned_back(self, i: int, keys: Tensor, by: Tensor) -> Tensor:
        """Return keys `[B, t, H, K]` of block i as if they stood `by` `[B, t, H]` positions earlier."""
        ...
