"""The recipe for memory layers that a model does not use yet."""

from dataclasses import replace
from pathlib import Path

from lmsleep.backbones import kind_of
from lmsleep.sleep import Hard
from lmsleep.training.config import RunConfig
from lmsleep.training.runs import RunFolder


def two_stages(run: RunConfig, first: Path) -> tuple[RunConfig, RunConfig]:
    """Fine-tune the memory layers alone, under hard eviction if N > 1; then go on as `run` says.

    After section 6.4 of the paper: while attention slides, new memory layers are not needed and stay unused.
    There the first stage takes one epoch and the second two, so here the first has half as many steps.

    Args:
        run: the second stage, of the model that the first begins with.
        first: folder of the run of the first stage, whose exported model the second stage takes.

    Raises:
        ValueError: for a run that does not fine-tune a pretrained model.
    """
    model, sleep, train = run.model, run.sleep, run.train
    if kind_of(model).source(model) is None:
        raise ValueError("model: this is for a pretrained model (FineTune), not for one trained from scratch")
    alone = replace(
        run,
        # targets are for adapters, of which this stage has none.
        model=replace(model, train="memory", targets=()),
        sleep=replace(sleep, eviction=Hard()) if sleep.passes > 1 else sleep,
        train=replace(train, steps=max(train.steps // 2, 1)),
    )
    # insert=0: the exported model has the memory layers already.
    return alone, replace(run, model=replace(model, folder=RunFolder(first).exported.resolve(), insert=0))
