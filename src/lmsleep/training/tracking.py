"""Metrics as TensorBoard events, beside metrics.jsonl (the `track` extra)."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self


class Events:
    """Writes scalars into a run's folder; a context manager.

    Args:
        folder: the run's folder.
        step: the step that the run goes on from; events of later steps, about to be repeated, are dropped.
    """

    def __init__(self, folder: Path, step: int) -> None:
        # An extra that may not be installed, and whose import takes long.
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def log(self, record: dict[str, Any]) -> None:
        """Write every number of a line of metrics but its step, nested ones as `eval/accuracy`."""
        for name, value in _scalars(record):
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])


def installed() -> bool:
    """Say whether events can be written."""
    # Found and not imported: the question is asked when a run begins, the import follows when it writes.
    return find_spec("tensorboard") is not None


def _scalars(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield prefix + key, value
