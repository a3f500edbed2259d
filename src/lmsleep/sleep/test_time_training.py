"""Test-time training, the neighbour of sleep: gradient descent on a window before it is evicted."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmsleep.sleep.backbone import Backbone
from lmsleep.sleep.config import SleepConfig
from lmsleep.sleep.loss import next_tokens, nll
from lmsleep.state import Memory, State


def train_on_window(
    model: Backbone, tokens: Tensor, state: State, sleep: SleepConfig, *, passes: int, valid: Tensor | None
) -> tuple[Tensor, State]:
    """`read_window` of test-time training: N - 1 gradient steps on `S`; the wake pass serves the first.

    Each row descends on the mean next-token loss of its own tokens, so rows do not meet. Gradients with
    respect to all else flow through the steps (Finn et al., arXiv 1703.03400), if they are wanted at all.
    """
    meta, rate = torch.is_grad_enabled(), sleep.inner_rate
    targets = next_tokens(tokens, torch.ones_like(tokens, dtype=torch.bool), valid)
    assert targets is not None and rate is not None
    per_row = (targets >= 0).sum(dim=1, keepdim=True).clamp(min=1)
    awake = None
    # The fused attention kernels have no second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        memory = Memory(state.memory.layers)  # without its origin: what is learned here is no copy
        memory = memory if meta else memory.detach()
        memory = memory.map(lambda S: S if S.requires_grad else _trainable(S))
        for _ in range(1, passes):
            before = State(memory, state.cache)
            h, after = model.run(
                model.embed(tokens), before, 0, model.num_blocks, valid=valid, span=sleep.span
            )
            logits = model.head(h)
            awake = logits if awake is None else awake
            losses = nll(logits, targets, "none").view_as(targets)
            memory = _descend((losses / per_row).sum(), memory, rate, meta)
    assert awake is not None
    learned = State(memory, after.cache).counted(state.cache, tokens.shape[1], valid)
    return (awake, learned) if meta else (awake.detach(), learned.detach())


def _trainable(S: Tensor) -> Tensor:
    # A view, for PyTorch's FLOP counter cannot follow a gradient to a leaf.
    return S.detach().requires_grad_().view_as(S)


def _descend(loss: Tensor, memory: Memory, rate: float, create_graph: bool) -> Memory:
    """One step of gradient descent."""
    trained = [S for S in memory.layers if S is not None]
    if not trained:
        raise ValueError("inner_rate needs a model with something to train: set its option trained_mlp")
    gradient = iter(torch.autograd.grad(loss, trained, create_graph=create_graph))
    return memory.map(lambda S: S - rate * next(gradient))
