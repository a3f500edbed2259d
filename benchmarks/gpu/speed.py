"""Speed: tables of the other benchmarks, at the sizes that a GPU is for."""

from collections.abc import Callable

from benchmarks import floors, processes, step, window
from benchmarks import recurrence as rule
from benchmarks.gpu.part import Try
from benchmarks.processor import Processor
from benchmarks.sessions import generate
from benchmarks.table import Table

WIDTH, BLOCKS = 2048, 24  # of the size of a Qwen3.5 of 2 billion parameters
Tables = Callable[[int, bool, Processor], dict[str, Callable[[], Table]]]


def _one(tables: Tables, name: str, run: Try, repeats: int) -> Table:
    """Measure one table of a benchmark."""
    return tables(1 if run.tiny else repeats, run.tiny, run.processor)[name]()


def limits(run: Try) -> Table:
    """Measure matrix products and copies."""
    return _one(floors.tables, "limits", run, repeats=20)


def automaton(run: Try) -> Table:
    """Time steps of Rule 110 with the paper's model and batch."""
    return _one(step.tables, "automaton", run, repeats=10)


def depo(run: Try) -> Table:
    """Time steps of Depo with the paper's model."""
    return _one(step.tables, "depo", run, repeats=5)


def windows(run: Try) -> Table:
    """Time the paper's figure 6."""
    return _one(window.tables, "length", run, repeats=3)


def recurrence(run: Try) -> Table:
    """Time the recurrence, ours and fla's."""
    return _one(rule.tables, "delta", run, repeats=10)


def decoding(run: Try) -> Table:
    """Time tokens of answers after texts of three lengths, which leave a window half open."""
    if run.tiny:
        return generate.decoding(run.processor, 64, 16, (8, 24), tokens=2, repeats=1)
    lengths = (256, 2304, 16_640)
    return generate.decoding(run.processor, WIDTH, 512, lengths, tokens=32, repeats=5, blocks=BLOCKS)


def sleeping(run: Try) -> Table:
    """Time sleeps on windows of two sizes."""
    if run.tiny:
        return generate.sleeping(run.processor, 64, (8,), repeats=1)
    return generate.sleeping(run.processor, WIDTH, (512, 2000), repeats=10, blocks=BLOCKS)


def joined(run: Try) -> Table:
    """Time what the path of several processes costs one."""
    setting, repeats = (step.TINY, 1) if run.tiny else (step.ON_A_GPU[0], 20)
    return processes.joined(run.processor, setting, repeats)
