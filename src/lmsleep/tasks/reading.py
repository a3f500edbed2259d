"""How a task is read by a model: by training, which learns from it, and by evaluation, which scores it."""

from collections.abc import Callable
from functools import partial

from lmsleep.sleep import Backbone, SleepConfig, SleepOutput, sleep_forward
from lmsleep.state import Memory, State
from lmsleep.tasks.base import Batch, Task


def check_known(task: Task, name: str, vocab_size: int) -> None:
    """Refuse a task, of that name, whose batches hold tokens that a model of `vocab_size` does not know.

    A tokenizer may have more than its model, as published ones do: what counts is what is read, where the
    task can tell (`largest_token`).

    Raises:
        ValueError: naming the largest.
    """
    if task.vocab_size <= vocab_size:
        return
    largest: int = getattr(task, "largest_token", task.vocab_size - 1)
    if largest >= vocab_size:
        raise ValueError(
            f"{name} holds token {largest} ({task.spell([largest])!r}), and the model "
            f"knows 0 ... {vocab_size - 1} alone; use its own tokenizer"
        )


def read_batch(
    model: Backbone,
    batch: Batch,
    sleep: SleepConfig,
    *,
    return_logits: bool = False,
    state: State | None = None,
    between: Callable[[Memory], Memory] | None = None,
    backprop_passes: int | None = None,
    checkpoint: bool = False,
) -> SleepOutput:
    """Read the context of a batch (if it has one), sleep on all of it, then read its rows.

    Rows that share a context fork the memory that was left of it. The last token of a row is predicted
    and not read: logits are `[R, T - 1, V]`. `state` is what came before, `between` what is done to the
    memories (one row a context) before the rows are read; `backprop_passes` and `checkpoint` are those of
    `sleep_forward`.
    """
    read = partial(sleep_forward, backprop_passes=backprop_passes, checkpoint=checkpoint)
    if batch.context is not None and batch.context_row is not None:
        after = read(
            model,
            batch.context,
            None,
            sleep,
            state=state,
            lengths=batch.context_lengths,
            evict_last=True,
            return_logits=False,
        )
        memory = after.memory if between is None else between(after.memory)
        state = State(memory, after.state.cache).rows(batch.context_row)
    return read(
        model,
        batch.tokens,
        batch.loss_mask,
        sleep,
        state=state,
        lengths=batch.lengths,
        read_last=False,
        return_logits=return_logits,
    )
