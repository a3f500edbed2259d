"""What is put under the microscope: windows that are slept on, and what is asked after them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmsleep.evaluation import EVAL_SEED
from lmsleep.session import Session
from lmsleep.session.session import Readable
from lmsleep.sleep import Backbone, SleepConfig
from lmsleep.state import State
from lmsleep.tasks import Batch, Task, batch_rng
from lmsleep.training import RunFolder


@dataclass(frozen=True, eq=False)
class Subject:
    """A model with something to read.

    Attributes:
        name: what it is.
        model: any `Backbone`.
        sleep: window and passes.
        state: where the first window begins; a row per sequence.
        windows: `[B, T]`, tokens to be read and slept on under observation.
        batch: a context, the windows that are evicted before anything is asked, and rows to be predicted.
        task: None for a session.
        spell: tokens in human-readable form.
        read: tokens read before.
    """

    name: str
    model: Backbone
    sleep: SleepConfig
    state: State
    windows: Tensor
    batch: Batch
    task: Task | None
    spell: Callable[[list[int]], str]
    read: int = 0


def from_run(run: RunFolder, samples: int) -> Subject:
    """Take a run's newest checkpoint and held-out samples of its task.

    Raises:
        ValueError: if the run never sleeps, has no fast weights, its samples end before an eviction, or its
            data have changed.
        OSError: if it has no checkpoint.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    run.check_data("look at a text (--text or --file)")
    config, model = run.config(), run.model()
    _sleeps(model)
    sleep = config.sleep
    if sleep.window is None:
        raise ValueError(f"{run.path} was trained with window=None: it never sleeps")
    batch = cut(config.task.batch(batch_rng(EVAL_SEED, "test", 0), samples, "test"), sleep)
    if batch.context_lengths is not None or batch.lengths is not None:
        raise ValueError(
            f"{run.path}: its samples differ in length; look at one, as a text (--text or --file)"
        )
    assert batch.context is not None
    if not batch.context.shape[1]:
        raise ValueError(f"{run.path}: no window of its samples is slept on before the answers")
    state = model.initial_state(len(batch.context)).detach()  # memory tokens begin as weights
    return Subject(str(run.path), model, sleep, state, batch.context, batch, config.task, config.task.spell)


def from_session(session: Session, text: Readable) -> Subject:
    """Take a session and what it would read next; the session stays as it is.

    Raises:
        ValueError: for an empty text, a session that never sleeps, or a model without fast weights.
    """
    new, sleep, tokenizer = session.tokens(text), session.sleep_config, session.tokenizer
    if sleep.window is None:
        raise ValueError("window=None: this session never sleeps; give its SleepConfig a window")
    if not len(new):
        raise ValueError("text must have at least one token")
    _sleeps(session.model)
    # Tokens that were read and not yet slept on belong to the first window under observation.
    begun, device = session.stream.reopened(), session.model.device
    tokens = torch.cat([session.stream.window, new])[None].to(device)
    asked = torch.arange(tokens.shape[1], device=device)[None] >= max(len(session.stream.window), 1)
    batch = Batch(
        tokens=tokens,
        loss_mask=asked,
        answers=torch.where(asked, asked.cumsum(1) - 1, -1),
        difficulty=torch.zeros(int(asked.sum()), dtype=torch.int64, device=device),
    )
    return Subject(
        name="session",
        model=session.model,
        sleep=sleep,
        state=begun.state,
        windows=tokens,
        batch=cut(batch, sleep),
        task=None,
        spell=(lambda tokens: " ".join(map(str, tokens))) if tokenizer is None else tokenizer.decode,
        read=begun.tokens,
    )


def _sleeps(model: Backbone) -> None:
    """Refuse a model that no sleep could change."""
    if not model.initial_state(1).memory.batch_size:
        raise ValueError(
            "no block of this model has fast weights, which is what the inspector looks at; what an eviction "
            "keeps of such a model, lmsleep probe MODEL --compact measures"
        )


def cut(batch: Batch, sleep: SleepConfig) -> Batch:
    """Make what is slept on before the questions the context of the same sequences, if they have none yet.

    The questions begin with the first window that predicts anything. Where that is the first of all, as in
    text, they are the last window: what is predicted before it, and its first token, counts for nothing.
    """
    if batch.context is not None:
        return batch
    L, read = sleep.window, max(batch.tokens.shape[1] - 2, 0)  # the last token is predicted and not read
    assert L is not None
    wanted = batch.loss_mask[:, 1:].any(0).nonzero()[:, 0]
    # Down to a whole window: what is slept on before the questions are whole windows.
    edge = (int(wanted[0]) if len(wanted) else read) // L * L
    if edge == 0 and sleep.sleep_on_loss:
        edge = read // L * L
    return replace(
        batch,
        tokens=batch.tokens[:, edge:],
        loss_mask=batch.loss_mask[:, edge:],
        answers=batch.answers[:, edge:],
        context=batch.tokens[:, :edge],
        context_row=torch.arange(len(batch.tokens), device=batch.tokens.device),
    )
