"""Turn options, dataclasses of plain values (numbers, strings, paths, tuples), to JSON and back."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints


def to_plain(options: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as JSON holds them; paths become absolute."""
    return {k: _plain(v) for k, v in asdict(options).items()}


def from_plain(cls: type[Any], data: Mapping[str, Any]) -> Any:
    """Return the dataclass that `to_plain` made `data` of: JSON's lists are tuples, and paths paths.

    Raises:
        ValueError: for an unknown field, or one that the dataclass refuses.
        TypeError: for a missing one.
    """
    if unknown := set(data) - {f.name for f in fields(cls)}:
        raise ValueError(f"unknown field {', '.join(sorted(unknown))} of {cls.__name__}")
    # Fields may be annotated by strings, which this resolves. JSON has no paths: only the hint tells them.
    hints = get_type_hints(cls)
    return cls(**{k: _restored(v, _mentions(hints[k], Path)) for k, v in data.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.resolve())  # whoever reads it may stand in another folder
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _restored(value: Any, is_path: bool) -> Any:
    if isinstance(value, list):
        return tuple(_restored(v, is_path) for v in value)
    return Path(value) if is_path and isinstance(value, str) else value


def _mentions(hint: Any, cls: type) -> bool:
    # The class may stand within others: `Path | None`, `tuple[Path, ...]`.
    return hint is cls or any(_mentions(inner, cls) for inner in get_args(hint))
