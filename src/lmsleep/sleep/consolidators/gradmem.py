"""GradMem: memory tokens written by gradient descent (Kuratov et al., arXiv 2603.13875)."""

from dataclasses import dataclass

from torch import Tensor

from lmsleep.sleep.backbone import Backbone
from lmsleep.sleep.consolidators.behind import Behind, begins, opened
from lmsleep.sleep.consolidators.gradient import GradientSteps, row_means
from lmsleep.sleep.window import Window
from lmsleep.state import State


@dataclass(frozen=True)
class GradMem(Behind, GradientSteps):
    """N - 1 steps of gradient descent on the m vectors that are read before each window.

    The loss is that of all tokens of the window, read as [M; tokens]: the last of M predicts the first one.
    Each row descends on its own mean, and gradients flow through the steps, as with `GradientSteps`. Then the
    window is forgotten, and the next one is read behind what M has become.
    """

    def lost(self, model: Backbone, window: Window) -> tuple[Tensor, Tensor, State]:
        """Read a whole window; see `GradientSteps.lost`."""
        if not bool(begins(window).all()):
            raise ValueError("gradmem writes whole windows: its working memory must be empty before one")
        h, state = opened(model, window)
        tokens, valid = window.tokens, window.valid
        said = model.head(h[:, h.shape[1] - tokens.shape[1] - 1 :])
        wanted = tokens if valid is None else tokens.masked_fill(~valid, -100)
        # What follows the window is not known.
        loss = row_means(said[:, :-1], wanted).sum()
        return said[:, 1:], loss, state
