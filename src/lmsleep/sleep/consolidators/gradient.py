"""Test-time training, the neighbour of sleep: gradient descent on a window before it is evicted."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmsleep.sleep.backbone import Backbone
from lmsleep.sleep.consolidators.base import Consolidator
from lmsleep.sleep.loss import next_tokens, nll
from lmsleep.sleep.window import Window
from lmsleep.state import Memory, State


@dataclass(frozen=True)
class GradientSteps(Consolidator):
    """N - 1 steps of gradient descent on `S`, for the window's own next-token loss.

    `S` are the weights that a sequence trains for itself (model option `trained_mlp`; a backbone of your own
    that has such says so by an attribute, `trains = True`). The wake pass serves
    the first step. Each row descends on the mean loss of its own tokens, so rows do not meet. Gradients with
    respect to all else flow through the steps (Finn et al., arXiv 1703.03400), where they are wanted at all.
    """

    rate: float = 1.0
    """Step size, in front of the learned one of each weight matrix."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.rate < float("inf"):  # so written, it refuses NaN as well
            raise ValueError(f"rate must be finite and not negative, got {self.rate}")

    def sleep_on(
        self, model: Backbone, window: Window, *, logits: bool = True
    ) -> tuple[Tensor | None, State]:
        """Read the window N - 1 times, and take a step after each; the wake logits come for nothing."""
        del logits
        meta, awake = torch.is_grad_enabled(), None
        # The fused attention kernels have no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            memory = Memory(window.began.memory.layers)  # without its origin: what is learned is no copy
            memory = memory if meta else memory.detach()
            memory = memory.map(lambda S: S if S.requires_grad else _trainable(S))
            for _ in range(1, self.passes):
                reading = replace(window, began=State(memory, window.began.cache))
                said, loss, after = self.lost(model, reading)
                awake = said if awake is None else awake
                memory = _descend(loss, memory, self.rate, meta)
        assert awake is not None
        learned = State(memory, after.cache)
        return (awake, learned) if meta else (awake.detach(), learned.detach())

    def lost(self, model: Backbone, window: Window) -> tuple[Tensor, Tensor, State]:
        """Read a window; return its logits `[B, L, V]`, the sum of the rows' losses, and the next state."""
        tokens = window.tokens
        h, after = window.run(model, model.embed(tokens), window.began, 0, model.num_blocks)
        said = model.head(h)
        targets = next_tokens(tokens, torch.ones_like(tokens, dtype=torch.bool), window.valid)
        assert targets is not None
        return said, row_means(said, targets).sum(), window.counted(after)

    def check_backward(self, backprop_passes: int | None, checkpoint: bool) -> None:
        """Refuse both: what is recomputed has no second derivative."""
        said = {"backprop_passes": backprop_passes is not None, "checkpoint": checkpoint}
        if given := " and ".join(name for name, is_given in said.items() if is_given):
            raise ValueError(
                f"{type(self).__name__} makes steps, through all of which gradients flow: leave out {given}"
            )

    def check_model(self, model: object) -> None:
        """Refuse a model that does not say that it `trains`: it writes nothing, or by recurrences.

        Those have no gradients of gradients, and what they wrote while the window was read would be lost.
        """
        super().check_model(model)
        if not getattr(model, "trains", False):
            raise ValueError(
                "gradient-steps are for models of attention alone with feed-forward layers that each "
                "sequence trains, HybridConfig(trained_mlp=True) or --baseline test-time-training; models "
                "of transformers have none"
            )


def row_means(logits: Tensor, targets: Tensor) -> Tensor:
    """Return each row's mean cross entropy `[B]` over its targets `[B, T]`, of which -100 are none."""
    losses = nll(logits, targets, "none").view_as(targets)
    return (losses / (targets >= 0).sum(dim=1, keepdim=True).clamp(min=1)).sum(dim=1)


def _trainable(S: Tensor) -> Tensor:
    # A view, for PyTorch's FLOP counter cannot follow a gradient to a leaf.
    return S.detach().requires_grad_().view_as(S)


def _descend(loss: Tensor, memory: Memory, rate: float, create_graph: bool) -> Memory:
    """Take one step of gradient descent."""
    gradient = iter(torch.autograd.grad(loss, list(memory.tensors()), create_graph=create_graph))
    return memory.map(lambda S: S - rate * next(gradient))
