"""Adaptive sleep, measured before it is built: stop passing over a window where S has settled.

A row stops after the first pass that changes its fast weights by less than a share of their norm. The model
is the shipped one, trained with N = 4; beside it every fixed N, and the best that any rule can do that
decides from the graph (a learned halting score, say): an oracle that knows the answers of its questions and
takes for each graph the fewest passes that answer them as well as can be. Result: docs/performance.md.
"""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from lmsleep.backbones import Model
from lmsleep.evaluation import EVAL_SEED, Score
from lmsleep.shipped import find
from lmsleep.sleep import SleepConfig, read_window, sleep_forward
from lmsleep.state import Memory, State
from lmsleep.tasks import Batch, batch_rng
from lmsleep.training import RunFolder

BATCHES, SIZE = 16, 64
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
Slept = tuple[Memory, Tensor]  # memories after all windows, and passes `[B]` over all of them


def norm(memory: Memory) -> Tensor:
    """Return the norm of each row's fast weights, `[B]`: over all blocks and heads."""
    return torch.stack([t.flatten(1).norm(dim=1) for t in memory.tensors()]).norm(dim=0)


def choose(memories: list[Memory], which: Tensor) -> Memory:
    """Choose for every row its own of several memories."""
    layers = zip(*(m.S for m in memories), strict=True)  # of the shipped models, all that a block keeps
    row = torch.arange(len(which))
    return Memory(tuple(None if S[0] is None else torch.stack(S)[which, row] for S in layers))


def settled(model: Model, batch: Batch, sleep: SleepConfig, share: float, fewest: int) -> Slept:
    """Make `fewest` to N passes a window, and none after one that changes less than `share`."""
    context = some(batch.context)
    empty = model.initial_state(len(context))
    memory, spent = empty.memory, torch.zeros(len(context))
    for window in context.split(sleep.window or 1, dim=1):
        # Hard eviction: S alone crosses.
        began = State(memory, empty.cache)
        # Each from the start of the window: plain rather than fast.
        after = [
            read_window(model, window, began, sleep, passes=n, logits=False)[1].memory
            for n in range(1, sleep.passes + 1)
        ]
        last = torch.full((len(context),), sleep.passes)
        # From most to fewest, so that the first pass that settles has the last word.
        for n in range(sleep.passes - 1, fewest - 1, -1):
            before = memory if n == 1 else after[n - 2]
            last[norm(after[n - 1].diff(before)) < share * norm(after[n - 1])] = n
        # after[n - 1] is what n passes left.
        memory = choose(after, last - 1)
        spent += last
    return memory, spent


def oracle(model: Model, batch: Batch, sleep: SleepConfig) -> Slept:
    """Make the fewest passes that answer as many of a graph's questions as any number up to N does."""
    context, row = some(batch.context), some(batch.context_row)
    windows = context.split(sleep.window or 1, dim=1)
    empty, tried = model.initial_state(len(context)), list[tuple[Memory, Tensor, int]]()
    # Every number of passes in every window: 16 ways with N = 4 and two windows.
    for passes in product(range(1, sleep.passes + 1), repeat=len(windows)):
        state = empty
        for window, n in zip(windows, passes, strict=True):
            _, state = read_window(model, window, state, sleep, passes=n, logits=False)
            state = State(state.memory, empty.cache)
        right = (ask(model, batch, state.memory, sleep).argmax(-1) == batch.tokens[:, 1:]) | (
            batch.answers[:, 1:] < 0
        )
        # Questions of one graph are rows of their own; each that is right in all its answers counts.
        hits = torch.zeros(len(context)).index_add(0, row, right.all(1).float())
        tried.append((state.memory, hits, sum(passes)))
    # Passes only break ties: at most 8 of them weigh less than one question.
    worth = torch.stack([hits - passes / 1e3 for _, hits, passes in tried])
    best = worth.argmax(0)
    return choose([m for m, _, _ in tried], best), torch.tensor([p for _, _, p in tried])[best].float()


def ask(model: Model, batch: Batch, memory: Memory, sleep: SleepConfig) -> Tensor:
    """Return the logits of the questions, each asked of the memory of its graph."""
    # Questions fork the memory of their graph and begin with an empty cache.
    state = State(memory, model.initial_state(SIZE).cache).rows(some(batch.context_row))
    logits = sleep_forward(model, batch.tokens, None, sleep, state=state, read_last=False).logits
    return some(logits)


def some(x: Tensor | None) -> Tensor:
    """Return a tensor that must be there."""
    assert x is not None
    return x


@torch.no_grad()
def main() -> None:
    """Print one line per rule: mean passes a window, accuracy per hop, accuracy."""
    run = RunFolder.open(find("depo-N4"))
    config, model = run.config(), run.model()
    rules: dict[str, Callable[[Batch], Slept]] = {}
    for n in (1, 2, 3, 4):
        fixed = SleepConfig(window=config.sleep.window, passes=n)
        # Defaults bind this round's values; a lambda looks them up when all rounds are over. With share 0
        # nothing ever settles.
        rules[f"N = {n}"] = lambda batch, sleep=fixed, n=n: settled(model, batch, sleep, 0.0, n)  # type: ignore[misc]
    for share in SHARES:
        rules[f"settled to {share}"] = lambda batch, share=share: settled(  # type: ignore[misc]
            model, batch, config.sleep, share, 2
        )
    rules["oracle"] = lambda batch: oracle(model, batch, config.sleep)
    for name, rule in rules.items():
        score, passes = Score(), 0.0
        for i in range(BATCHES):
            batch = config.task.batch(batch_rng(EVAL_SEED, "test", i), SIZE, "test")
            windows = some(batch.context).shape[1] / (config.sleep.window or 1)
            memory, spent = rule(batch)
            score.add(batch, ask(model, batch, memory, config.sleep))
            passes += spent.mean().item() / windows / BATCHES
        hops = "  ".join(f"k={k} {accuracy:.3f}" for k, accuracy in score.per_difficulty.items())
        print(f"{name:16} mean passes {passes:.2f}  {hops}  all {score.accuracy:.3f}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
