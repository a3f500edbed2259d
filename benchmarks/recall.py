"""What the shipped adapter answers of texts that were evicted, beside the model that it is put on."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import log
from pathlib import Path

from benchmarks.models import NAME, SLEEPS, language_model, sleeping_model
from benchmarks.table import Cell, Table, share
from lmsleep import SleepConfig, adapt, shipped
from lmsleep.evaluation import Score, evaluate
from lmsleep.recipes import recall
from lmsleep.sleep import Backbone, Sliding

TEXTS = 16  # in a batch


def tables(repeats: int, tiny: bool) -> dict[str, Callable[[], Table]]:
    """Return one table, of so many batches of texts."""
    return {"kinds": lambda: kinds(repeats, tiny)}


def kinds(batches: int, tiny: bool) -> Table:
    """Ask about texts of all kinds that training never had; with 16 batches, those of the recipe `recall`."""
    task = recall.task(Path("bytes") if tiny else shipped.find(NAME))
    texts = 2 if tiny else TEXTS
    if tiny:
        task = replace(task, kinds=("facts", "hops"), shares=(), length=800)
    rows: list[dict[str, Cell]] = []
    for name, model, sleep in _readings(tiny):
        score = evaluate(model, task, sleep, batches=batches, batch_size=texts)
        answers, tokens = (sum(of.values()) for of in (score.answer_nll, score.answer_tokens))
        bits = answers / tokens / log(2)
        rows.append({"reading": name, **_columns(score), "bits": bits})
    return Table(
        rows=rows,
        note=f"{'A tiny model' if tiny else SLEEPS} in float32; {batches * texts} texts of the test, of up "
        f"to {task.length} tokens, in windows of {sleep.window}. Answers that are right in all their tokens "
        "(95 % interval, Wilson, of answers), by kind of question; facts also with names and wordings that "
        "training never had, and more filler than it had. Bits: of a token of a right answer. Columns are "
        "those of `lmsleep reproduce recall`.",
    )


def _readings(tiny: bool) -> Iterator[tuple[str, Backbone, SleepConfig]]:
    """Yield the name of a row, the model, and how it reads."""
    model, sleep, _ = sleeping_model(tiny=tiny)
    yield "with the adapter, evicted, N = 1", model, sleep
    yield "with the adapter, evicted, N = 2 (trained with N = 1)", model, sleep.with_passes(2)
    plain = adapt(language_model(tiny=tiny)[0], attention_alone=True)
    one = SleepConfig(window=sleep.window)
    yield "plain, everything in attention", plain, replace(one, window=None)
    yield "plain, sliding window", plain, replace(one, eviction=Sliding())
    yield "plain, evicted", plain, one


def _columns(score: Score) -> dict[str, Cell]:
    """Return the share of right answers of each column of the recipe."""
    found: dict[str, Cell] = {}
    for name, every in recall.TOGETHER.items():
        keys = [key for key in every if key in score.total]
        right, asked = (sum(counted[key] for key in keys) for counted in (score.correct, score.total))
        found[name] = share(right, asked) if asked else None
    return found
