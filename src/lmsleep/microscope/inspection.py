"""`inspect`: everything the microscope shows about a session or a run, as one result."""

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lmsleep.files import write_atomic
from lmsleep.memory import model_identity
from lmsleep.microscope.ablation import ablation_rows, reliance_rows
from lmsleep.microscope.heads import head_rows, hypnogram_rows, mean, moment
from lmsleep.microscope.probe import probe_rows, probed
from lmsleep.microscope.readback import readback_rows
from lmsleep.microscope.seen import Row, Seen
from lmsleep.microscope.subject import Subject, from_run, from_session
from lmsleep.microscope.trace import Window, fast_weight_layers, in_passes, watch, way_of
from lmsleep.progress import progress as bar_of
from lmsleep.session import Session
from lmsleep.session.session import Readable
from lmsleep.state import State
from lmsleep.tasks import batch_rng
from lmsleep.training import RunFolder

READ_BACK = 8  # windows at the end of the stream whose tokens are read back
FIT = 8  # times as many contexts to fit a probe as to test it

T = TypeVar("T")


class Inspection(Seen):
    """What the microscope saw, with a page of it."""

    def html(self, path: str | Path) -> None:
        """Write one self-contained HTML page, atomically.

        Raises:
            OSError: if the file cannot be written.
        """
        from lmsleep.microscope.page import page  # matplotlib is slow to import

        write_atomic(Path(path), page(self).encode())


def inspect(
    subject: Session | RunFolder,
    text: Readable | None = None,
    *,
    samples: int = 128,
    progress: bool = False,
) -> Inspection:
    """Look at what sleep does to the fast weights, and at what they are good for.

    Args:
        subject: a session, which stays as it is, or a run: the newest checkpoint and held-out samples.
        text: for a session: text or tokens that it would read next. Its windows are slept on under
            observation, the last one too, though part-filled; its end, from the last eviction on, is what
            the memory is asked for. For a run: None.
        samples: for a run: samples looked at; a probe is fitted on eight times as many, of training.
        progress: show bars on standard error; where there is no terminal, a line every ten seconds.

    Raises:
        ValueError: for a session without a text or a run with one, what never sleeps, or a model without fast
            weights.
        OSError: for a run without a checkpoint.
    """
    if isinstance(subject, RunFolder):
        if text is not None:
            raise ValueError("text is for a session: a run is looked at on samples of its own task")
        seen = from_run(subject, samples)
    else:
        if text is None:
            raise ValueError("text is missing: a session is looked at while it reads one")
        seen = from_session(subject, text)

    def bar(steps: Iterator[T], what: str, total: int | None = None) -> Iterator[T]:
        yield from bar_of(show=progress, iterable=steps, desc=what, total=total, leave=False)

    # Twice, before and after: no sleep may touch the slow weights.
    slow_before = model_identity(seen.model)
    tables, notes = _watched(seen, bar), list[str]()
    if not in_passes(seen.sleep):
        there = "what reading left (pass 1)"
        there += " and what the sleep left (pass 2)" if seen.sleep.passes > 1 else ""
        notes.append(
            "gates, readback and probes are for a sleep in passes that wakes in one, and this is "
            f"{way_of(seen.sleep)}: of each window there is {there}"
        )
    elif not tables["readback"]:
        notes.append("gates and readback need FastWeights layers, which this model does not have")
    why_not = _not_asked(seen)
    if why_not is not None:
        notes.append(why_not)
    about = {
        "subject": seen.name,
        "model": type(seen.model).__name__,
        "window": seen.sleep.window,
        "method": seen.sleep.method,
        "way": way_of(seen.sleep),
        "passes": seen.sleep.passes,
        "eviction": type(seen.sleep.eviction).__name__.lower(),
        "sequences": len(seen.windows),
        "tokens_before": seen.read,
        "tokens": seen.windows.shape[1],
        "asked": int(seen.batch.loss_mask[:, 1:].sum()),
        "floors": {} if seen.task is None else seen.task.floors(),
        "slow_weights_before": slow_before,
    }
    probe = list(bar(_probe(seen, notes), "probes"))
    reliance = list(bar(reliance_rows(seen), "readings")) if why_not is None else []
    ablation = list(bar(ablation_rows(seen), "ablations")) if why_not is None else []
    about["slow_weights_after"] = model_identity(seen.model)
    return Inspection(about=about, probe=probe, reliance=reliance, ablation=ablation, notes=notes, **tables)


def _not_asked(seen: Subject) -> str | None:
    """Return why nothing can be asked of the memory; None if something can."""
    assert seen.batch.context is not None
    if not seen.batch.loss_mask[:, 1:].any():
        return "nothing is asked of the memory: no token predicts the only one of the text"
    pairs = zip(seen.state.memory.tensors(), seen.model.initial_state(1).memory.tensors(), strict=True)
    if not seen.batch.context.shape[1] and all(torch.equal(S, began.expand_as(S)) for S, began in pairs):
        return "nothing is asked of the memory: it is empty before the text's only window"
    return None


Bar = Callable[[Iterator[Window], str, int], Iterator[Window]]


def _watched(seen: Subject, bar: Bar) -> dict[str, list[Row]]:
    """Watch the stream window by window, and return the tables that come of it."""
    layers, read = fast_weight_layers(seen.model), seen.read
    change, heads, hypnogram = list[Row](), list[Row](), list[Row]()
    most = 0
    recent: deque[tuple[int, Window]] = deque(maxlen=READ_BACK)
    assert seen.sleep.window is not None
    total = -(-seen.windows.shape[1] // seen.sleep.window)
    windows = watch(seen.model, seen.windows, seen.sleep, seen.state)
    for number, window in enumerate(bar(windows, "windows", total)):
        # Windows are dropped as they come, but for the last READ_BACK: a long stream must fit into memory.
        most = max(most, window.working_bytes)
        change.append(change_row(number, window))
        heads += head_rows(number, window)
        hypnogram += hypnogram_rows(read, window, layers)
        recent.append((number, window))
        read += window.tokens.shape[1]
    end = recent[-1][1].after
    hypnogram.append(moment(read, end))
    readback = list(readback_rows(recent, end.memory, seen.spell))
    return {
        "layers": _layers(seen, most, end),
        "change": change,
        "heads": heads,
        "hypnogram": hypnogram,
        "readback": readback,
    }


def _layers(seen: Subject, working_bytes: int, end: State) -> list[Row]:
    """Say what the layers of memory are, and how many bytes of a sequence each takes."""
    model, rows = seen.model, len(seen.windows)
    # Embeddings that serve as head too stand in memory once.
    weights = [*model.named_parameters(), *model.named_buffers()] if isinstance(model, nn.Module) else []
    kept = end.cache.kept or end.cache.layers
    return [
        {
            "layer": "working",
            "bytes": working_bytes // rows,
            "kept_bytes": end.cache.nbytes // rows,
            "kept": max((t.shape[1] for layer in kept for t in layer), default=0),
        },
        {
            "layer": "fast",
            "bytes": end.memory.nbytes // rows,
            "blocks": [i for i, writes in enumerate(end.memory.writes) if writes],
            "method": seen.sleep.method,
        },
        {
            "layer": "slow",
            "bytes": sum(w.nbytes for _, w in weights),
            # By the names that peft gives to what it adds.
            "adapter_bytes": sum(w.nbytes for name, w in weights if ".lora_" in name),
        },
    ]


def change_row(number: int, window: Window) -> Row:
    """Return norms of all fast weights as one vector, means over the rows of the batch.

    `before`: its norm before the window; `awake`: after one pass; `asleep`: after the last. `moved_awake`
    and `moved_asleep`: norm of what the first pass and what all further passes changed; `cosine`: between
    what one pass leaves and what the last leaves, None where one of them is zero.
    """
    before, awake, asleep = (
        torch.cat([t.flatten(1) for t in memory.tensors()], dim=1).double()
        for memory in (window.before.memory, window.passes[0].memory, window.passes[-1].memory)
    )

    def size(x: Tensor) -> float:
        return float(x.norm(dim=1).mean())

    return {
        "window": number,
        "before": size(before),
        "awake": size(awake),
        "asleep": size(asleep),
        "moved_awake": size(awake - before),
        "moved_asleep": size(asleep - awake),
        "cosine": mean((awake * asleep).sum(1) / (awake.norm(dim=1) * asleep.norm(dim=1))),
    }


def _probe(seen: Subject, notes: list[str]) -> Iterator[Row]:
    if not in_passes(seen.sleep):
        return
    if seen.task is None:
        notes.append("no probe: a session has no task that says what a pass should compute")
        return
    try:
        probed(seen.task)
    except ValueError as error:
        notes.append(f"no probe: {error}")
        return
    device, samples = seen.windows.device, len(seen.windows)
    fit = (
        # training samples, so that what is tested was never fitted, where a task holds samples out
        seen.task.batch(batch_rng(0, "train", index), samples, "train")
        for index in range(FIT)
    )
    yield from probe_rows(
        seen.model,
        seen.task,
        seen.sleep,
        [_context(seen, batch).to(device) for batch in fit],
        seen.windows,
    )


def _context(seen: Subject, batch: Any) -> Tensor:
    context = batch.tokens if batch.context is None else batch.context
    return context[:, : seen.windows.shape[1]]
