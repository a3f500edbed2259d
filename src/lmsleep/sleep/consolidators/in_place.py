"""In-Place TTT: existing feed-forward layers as fast weights (Feng et al., arXiv 2604.06169)."""

from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor

from lmsleep.sleep.backbone import Backbone, Learns
from lmsleep.sleep.consolidators.base import Consolidator
from lmsleep.sleep.window import Window
from lmsleep.state import State


@dataclass(frozen=True)
class InPlace(Consolidator):
    """N - 1 readings of a window in chunks, after each of which feed-forward layers learn what follows what.

    `S` of a block is what a sequence adds to the last matrix of its feed-forward layer (model option
    `in_place_mlp`). A chunk is read with `S` as it is, then `S` becomes `S + rate Z^T V`: `Z` is what enters
    that matrix, `V` a learned map of the embeddings of the tokens around, at first that of the next one. What
    is read awake leaves `S` as it is.
    """

    rate: float = 1.0
    """Step size (eta of the paper)."""
    chunk: int | None = None
    """Tokens between two changes of `S`; None: the window, whose wake pass is then the first reading."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.rate < float("inf"):  # so written, it refuses NaN as well
            raise ValueError(f"rate must be finite and not negative, got {self.rate}")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk must be at least 1 token, got {self.chunk}")

    def sleep_on(
        self, model: Backbone, window: Window, *, logits: bool = True
    ) -> tuple[Tensor | None, State]:
        """Read the window N - 1 times, each time from the working memory that it began with."""
        learner, L = cast(Learns, model), window.tokens.shape[1]
        chunks = window.tokens.split(self.chunk or max(L, 1), dim=1)
        awake, memory = None, window.began.memory
        if logits and len(chunks) > 1:  # in which nothing has learned from the window
            awake, _ = self.read(model, window)
        for _ in range(1, self.passes):
            state, start = State(memory, window.began.cache), 0
            for tokens in chunks:
                stop = start + tokens.shape[1]
                valid = None if window.valid is None else window.valid[:, start:stop]
                part = replace(window, tokens=tokens, began=state, valid=valid)
                h, state = part.learn(learner, model.embed(tokens), state, self.rate)
                state, start = part.counted(state), stop
            if logits and awake is None:
                awake = window.said(model, h)
            memory = state.memory
        return awake, state

    def check_backward(self, backprop_passes: int | None, checkpoint: bool) -> None:
        """Refuse truncated backpropagation."""
        if backprop_passes is not None:
            raise ValueError("in-place learns in chunks, not in passes: leave out backprop_passes")

    def check_model(self, model: object) -> None:
        """Refuse a model without layers that learn."""
        super().check_model(model)
        if not getattr(model, "learns", False):
            raise ValueError(
                "in-place is for models with feed-forward layers that learn, HybridConfig(in_place_mlp=True) "
                "or --in-place-mlp; models of transformers have none"
            )
