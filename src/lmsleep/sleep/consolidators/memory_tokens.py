"""Memory tokens, a recurrent memory of a few vectors (RMT; Bulatov et al., arXiv 2207.06881)."""

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from lmsleep.sleep.backbone import Backbone
from lmsleep.sleep.consolidators.behind import Behind, behind, recall
from lmsleep.sleep.window import Window
from lmsleep.state import Memory, State


@dataclass(frozen=True)
class MemoryTokens(Behind):
    """N - 1 writes of the m vectors that are read before each window: the decoder form of RMT.

    A window is read as [M; tokens; M], causally, so the last m positions see all of it; what leaves the model
    there, scaled to unit RMS, is the next M. Gradients flow through all windows. Where N - 1 is more than 1,
    the window is read again with the M of the write before.
    """

    def sleep_on(
        self, model: Backbone, window: Window, *, logits: bool = True
    ) -> tuple[Tensor | None, State]:
        """Read the window N - 1 times, and write after each; the first reading is the wake pass."""
        awake, memory = None, window.began.memory
        for write in range(1, self.passes):
            h, state = behind(model, replace(window, began=State(memory, window.began.cache)))
            if write == 1 and logits:
                awake = window.said(model, h)
            # The tokens' padding lies behind these positions, in the working memory: here all are real.
            places = replace(window, valid=None)
            out, _ = places.run(model, recall(model, memory), state, 0, model.num_blocks)
            memory = _written(memory, F.rms_norm(out, out.shape[-1:]))
        return awake, State(memory, state.cache)

    def check_backward(self, backprop_passes: int | None, checkpoint: bool) -> None:
        """Refuse truncated backpropagation."""
        if backprop_passes is not None:
            raise ValueError(f"{type(self).__name__} writes in no passes: leave out backprop_passes")


def _written(memory: Memory, M: Tensor) -> Memory:
    """Return a memory with other memory tokens `[B, m, d]`, in the dtype of those it has."""
    dtype = next(memory.tensors()).dtype
    return Memory((M[:, None].to(dtype), *memory.layers[1:]))
