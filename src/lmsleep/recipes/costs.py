"""What a trained run keeps of a context, and what reading and keeping it costs."""

from collections.abc import Callable
from typing import Any

import torch

from lmsleep.flops import flops_of
from lmsleep.recipes.estimate import fastest
from lmsleep.sleep import Backbone, read_window, sleep_forward
from lmsleep.state import State
from lmsleep.tasks import batch_rng
from lmsleep.training import RunConfig

REPEATS = 100  # the best of them is the least disturbed
# Of a table: how each figure is written.
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "parameters": lambda row: f"{row['parameters']:,}",
    "bytes kept": lambda row: f"{row['bytes']:,}",
    "MFLOP a context": lambda row: f"{row['context_flops'] / 1e6:.3g}",
    "ms a context": lambda row: f"{row['context_seconds'] * 1e3:.3g}",
    "MFLOP a token": lambda row: f"{row['token_flops'] / 1e6:.3g}",
    "ms a token": lambda row: f"{row['token_seconds'] * 1e3:.3g}",
}


def costs(model: Any, run: RunConfig) -> dict[str, Any]:
    """Measure one sequence: its context is read and slept on, window by window, then a token is answered.

    Returns:
        `parameters`; `bytes` that are kept of the context (fast weights, keys and values); `context_flops` of
        matrix products and `context_seconds` for all of its windows; `token_flops` and `token_seconds` of the
        second token after them. Seconds are those of one thread.

    Raises:
        ValueError: for a task without a context.
    """
    batch = run.task.batch(batch_rng(0, "test", 0), 1, "test")
    if batch.context is None:
        raise ValueError(f"{run.task_name} has no context, so nothing is kept of it")
    device = next(model.parameters()).device
    context = torch.tensor([batch.row(0)[0]], device=device)  # without padding
    torch.set_num_threads(1)  # products are small, and the clock is that of this thread

    @torch.no_grad()
    def read() -> State:
        return sleep_forward(model, context, None, run.sleep, evict_last=True, return_logits=False).state

    state = read()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(t.nbytes for t in state.tensors()),
        "context_flops": flops_of(read),
        "context_seconds": fastest(read, context.device, REPEATS),
        **_answering(model, run, state, context.device),
    }


@torch.no_grad()
def _answering(model: Backbone, run: RunConfig, state: State, device: torch.device) -> dict[str, Any]:
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    # The first token may have to read what is kept; those after it are the many.
    _, state = read_window(model, token, state, run.sleep, passes=1)

    def answer() -> None:
        read_window(model, token, state, run.sleep, passes=1)

    return {"token_flops": flops_of(answer), "token_seconds": fastest(answer, device, REPEATS)}
