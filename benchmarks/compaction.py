"""What a model that was not trained for it still knows when its keys and values are compacted."""

from collections.abc import Callable
from pathlib import Path

from benchmarks.models import language_model
from benchmarks.table import Cell, Table
from lmsleep import Compact, SleepConfig, adapt
from lmsleep.evaluation.facts import CHOICES, DROPPED, KEPT, zero_shot
from lmsleep.ops.matching import METHODS

TEXT = Path(__file__).parents[1] / "docs/tasks.md"
WINDOWS = 3


def tables(repeats: int, tiny: bool) -> dict[str, Callable[[], Table]]:
    """Return one table; `repeats` pieces of a text are read."""
    return {"attention-alone": lambda: compacted(repeats, tiny)}


def compacted(pieces: int, tiny: bool) -> Table:
    """Read pieces of a text with so many times fewer keys than it has tokens; ask for planted facts."""
    model, tokenizer, name = language_model(tiny=tiny)
    L, fewer = (256, (4,)) if tiny else (128, (2, 4, 10, 50))
    kept = {f"1/{times}": round(WINDOWS * L / times) for times in fewer}
    found = {
        reading.way: reading
        for reading in zero_shot(
            adapt(model, attention_alone=True),
            tokenizer,
            tokenizer.encode(TEXT.read_text()),
            SleepConfig(window=L),
            (),
            others={
                f"{share} {method}": SleepConfig(window=L, eviction=Compact(keys=keys, method=method))
                for share, keys in kept.items()
                for method in METHODS
            },
            samples=pieces,
            windows=WINDOWS,
        )
    }

    def said(way: str) -> str:
        share, low, high = found[way].recall
        return f"{found[way].perplexity:.4g} · {share:.2f} [{low:.2f}, {high:.2f}]"

    rows: list[dict[str, Cell]] = [
        {"keys kept": f"{share}, {keys} of {WINDOWS * L}", **{m: said(f"{share} {m}") for m in METHODS}}
        for share, keys in kept.items()
    ]
    return Table(
        rows=rows,
        note=f"{name} in float32; {pieces} pieces of "
        f"{TEXT.name}, of {WINDOWS} windows of {L} tokens. Perplexity after an eviction · share of "
        f"{found[KEPT].questions} planted facts recalled (95 % interval, Wilson), of which chance gives "
        f"{1 / CHOICES:.3f}. Nothing evicted: {said(KEPT)}; all evicted: {said(DROPPED)}.",
    )
