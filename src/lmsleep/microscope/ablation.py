"""Taking fast weights away: what happens to the answer without a head's S, or with another sequence's."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch

from lmsleep.evaluation import Score
from lmsleep.microscope.seen import Row
from lmsleep.microscope.subject import Subject
from lmsleep.microscope.trace import in_passes, way_of
from lmsleep.sleep import Hard, SleepConfig
from lmsleep.state import Memory
from lmsleep.tasks.reading import read_batch

How = Literal["zero", "swap"]
Head = tuple[int, int]


def ablated(memory: Memory, heads: Collection[Head], how: How) -> Memory:
    """Copy the memory with some (block, head) set to zero, or to those of the next row of the batch.

    In a block of several tensors this is the head's part of each `[B, H, ...]`.
    """
    layers = [tuple(t.clone() for t in tensors) for tensors in memory.parts]  # what was handed in stays
    for block, head in heads:
        for t in layers[block]:
            if t.ndim > 2:
                t[:, head] = 0 if how == "zero" else t[:, head].roll(1, 0)
    return Memory(tuple(layers))


def all_heads(memory: Memory) -> list[Head]:
    """List every (block, head) with fast weights."""
    return [(i, head) for i, S in enumerate(memory.S) if S is not None for head in range(S.shape[1])]


def ablation_rows(subject: Subject) -> Iterator[Row]:
    """Answer with the fast weights intact (`how` None), with one head's ablated, and with all ablated.

    The fast weights are changed where the rows are asked: after the last sleep before them. `block` and
    `head` are None for all heads. `accuracy` is the share of right answers (of tokens, where every token
    counts), `nats` the mean log-likelihood of a predicted token; `accuracy_lost` and `nats_lost` compare with
    the intact memory. A batch of one has no other sequence to swap with.
    """
    heads = all_heads(subject.state.memory)
    intact = _answered(subject, None)
    yield {"block": None, "head": None, "how": None, **intact, "accuracy_lost": 0.0, "nats_lost": 0.0}
    # In a batch of one the next row is the row itself.
    hows: tuple[How, ...] = ("zero", "swap") if subject.state.memory.batch_size > 1 else ("zero",)
    for how in hows:
        for block, head in ((None, None), *heads):
            cut = heads if block is None or head is None else [(block, head)]
            figures = _answered(subject, partial(ablated, heads=cut, how=how))
            lost = {f"{name}_lost": intact[name] - figures[name] for name in intact}
            yield {"block": block, "head": head, "how": how, **figures, **lost}


def reliance_rows(subject: Subject) -> Iterator[Row]:
    """Answer from the memory, and as if it had been made or kept in another way.

    `nothing evicted` leaves all tokens in attention and never sleeps, which the model was not trained for.
    """
    sleep, way = subject.sleep, f"N = {subject.sleep.passes} passes"
    if not in_passes(sleep):
        way = f"{way_of(sleep)}, N = {sleep.passes}"
    yield {"reading": f"evicted after {way}", **_answered(subject, None)}
    if sleep.passes > 1:
        once = "1 pass" if in_passes(sleep) else "reading"
        yield {"reading": f"evicted after {once}, no sleep", **_answered(subject, None, sleep.with_passes(1))}
    # Without a window nothing is ever full, so no sleep comes and all stays in attention.
    kept = replace(sleep, window=None, eviction=Hard())
    yield {"reading": "nothing evicted", **_answered(subject, None, kept)}
    yield {"reading": "memory erased", **_answered(subject, lambda memory: memory.map(torch.zeros_like))}


@torch.no_grad()
def _answered(
    subject: Subject, between: Callable[[Memory], Memory] | None, sleep: SleepConfig | None = None
) -> dict[str, Any]:
    out = read_batch(
        subject.model,
        subject.batch,
        sleep or subject.sleep,
        state=subject.state,
        between=between,
        return_logits=True,
    )
    assert out.logits is not None
    score = Score()
    score.add(subject.batch, out.logits)
    return {"accuracy": score.accuracy, "nats": -score.nll["all"] / max(score.tokens["all"], 1)}
