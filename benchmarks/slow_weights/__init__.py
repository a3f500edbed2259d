"""What is left of a text, or of a memory, in an adapter that it was distilled into."""

from collections.abc import Callable

from benchmarks.slow_weights.facts import facts
from benchmarks.slow_weights.memory import memory
from benchmarks.table import Table


def tables(repeats: int, tiny: bool) -> dict[str, Callable[[], Table]]:
    """Return two tables; `repeats` texts are read for each."""
    return {"facts": lambda: facts(repeats, tiny), "memory": lambda: memory(repeats, tiny)}
