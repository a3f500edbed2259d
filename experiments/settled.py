"""Adaptive sleep, measured before it is built: stop passing over a window where S has settled.

A row stops after the first pass that changes its fast weights by less than a share of their norm. The model
is the shipped one, trained with N = 4; beside it every fixed N. Result: docs/performance.md.
"""

import torch
from torch import Tensor

from lmsleep.evaluation import EVAL_SEED, Score
from lmsleep.memory import Memory
from lmsleep.pretrained import find
from lmsleep.sleep import SleepConfig, read_window, sleep_forward
from lmsleep.state import State
from lmsleep.tasks import stream
from lmsleep.training import RunFolder
from lmsleep.training.models import Model

BATCHES, SIZE = 16, 64
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def norm(memory: Memory) -> Tensor:
    """`[B]`: over all blocks and heads."""
    return torch.stack([S.flatten(1).norm(dim=1) for S in memory.layers if S is not None]).norm(dim=0)


def slept(
    model: Model, context: Tensor, sleep: SleepConfig, share: float, fewest: int
) -> tuple[Memory, float]:
    """Memories after all windows, and mean passes a window, at least `fewest` and at most N."""
    empty, row = model.initial_state(len(context)), torch.arange(len(context))
    memory, spent = empty.memory, []
    for window in context.split(sleep.window or 1, dim=1):
        began = State(memory, empty.cache)
        after = [
            read_window(model, window, began, sleep, passes=n, logits=False)[1].memory
            for n in range(1, sleep.passes + 1)
        ]
        last = torch.full_like(row, sleep.passes)
        for n in range(sleep.passes - 1, fewest - 1, -1):
            before = memory if n == 1 else after[n - 2]
            last[norm(after[n - 1].diff(before)) < share * norm(after[n - 1])] = n
        layers = zip(*(m.layers for m in after), strict=True)
        memory = Memory(tuple(None if S[0] is None else torch.stack(S)[last - 1, row] for S in layers))
        spent.append(last.float().mean().item())
    return memory, sum(spent) / len(spent)


@torch.no_grad()
def main() -> None:
    """Print one line per rule: mean passes, accuracy per hop, accuracy."""
    run = RunFolder.open(find("depo-N4"))
    config, model = run.config(), run.model()
    rules = [(f"N = {n}", SleepConfig(window=config.sleep.window, passes=n), 0.0, n) for n in (1, 2, 3, 4)]
    rules += [(f"settled to {share}", config.sleep, share, 2) for share in SHARES]
    for name, sleep, share, fewest in rules:
        score, passes = Score(), 0.0
        for i in range(BATCHES):
            batch = config.task.batch(stream(EVAL_SEED, "test", i), SIZE, "test")
            assert batch.context is not None and batch.context_row is not None
            memory, mean = slept(model, batch.context, sleep, share, fewest)
            state = State(memory, model.initial_state(SIZE).cache).rows(batch.context_row)
            read = sleep_forward(model, batch.tokens, None, sleep, state=state, read_last=False)
            assert read.logits is not None
            score.add(batch, read.logits)
            passes += mean / BATCHES
        hops = "  ".join(f"k={k} {accuracy:.3f}" for k, accuracy in score.per_difficulty.items())
        print(f"{name:16} mean passes {passes:.2f}  {hops}  all {score.accuracy:.3f}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
