"""What the shipped adapter answers of texts that were evicted, beside the model that it is put on."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

from benchmarks.models import NAME, SLEEPS, language_model, sleeping_model
from benchmarks.table import Cell, Table, share
from lmsleep import SleepConfig, adapt, shipped
from lmsleep.evaluation import Score, evaluate
from lmsleep.sleep import Backbone, Sliding
from lmsleep.tasks import Recall
from lmsleep.tasks.recall.planted import TOLD

TEXTS = 16  # in a batch


def tables(repeats: int, tiny: bool) -> dict[str, Callable[[], Table]]:
    """Return one table, of so many batches of texts."""
    return {"facts": lambda: facts(repeats, tiny)}


def facts(batches: int, tiny: bool) -> Table:
    """Ask for the facts of texts as the adapter was trained on, which training never has."""
    task = Recall(
        kinds=("facts",),
        facts=(2, 6),
        filler=(0, 3),
        length=400 if tiny else 126,
        tokenizer="bytes" if tiny else str(shipped.find(NAME)),
    )
    rows: list[dict[str, Cell]] = []
    texts = 2 if tiny else TEXTS
    for name, model, sleep in _readings(tiny):
        score = evaluate(model, task, sleep, batches=batches, batch_size=texts)
        rows.append({"reading": name, **_columns(score, task.difficulty_labels), "bits": score.bits()})
    return Table(
        rows=rows,
        note=f"{'A tiny model' if tiny else SLEEPS} in float32; {batches * texts} texts of the test of task "
        f"recall, of two to six facts in windows of {sleep.window or task.length} tokens. Answers that are "
        "right in all their tokens (95 % interval, Wilson, of answers), of all texts and by how a text "
        "differs from those of training: new combinations of name and value (as trained), new names, new "
        "wordings, more filler. Bits: of a token of a right answer. Guessing among the answers of its kind "
        f"that a text holds gives {task.floors()['chance']:.3f}.",
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


def _columns(score: Score, labels: list[str]) -> dict[str, Cell]:
    """Return the share of right answers, of all and by how a text differs from training."""
    right, asked = Counter[str](), Counter[str]()
    for key, total in score.total.items():
        for column in ("all", labels[key].partition("+")[2] or TOLD[0]):
            right[column] += score.correct[key]
            asked[column] += total
    return {name: share(right[name], asked[name]) if asked[name] else None for name in ("all", *TOLD)}
