"""Turn options, dataclasses of plain values (numbers, strings, paths, tuples), to JSON and back."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_hints = cache(get_type_hints)  # options are copied, with another number of passes, at every token


def check_types(options: Any) -> None:
    """Refuse a dataclass with a value that is not of the type that its field is annotated with.

    Raises:
        ValueError: naming field, type and value.
    """
    check_values(type(options), {f.name: getattr(options, f.name) for f in fields(options)})


def check_values(cls: type[Any], values: Mapping[str, Any]) -> None:
    """Refuse values for fields of the dataclass `cls` as `check_types` does, before it is made of them."""
    try:
        hints = _hints(cls)  # type: ignore[arg-type]  # classes are hashable
    except NameError:  # a name that only type checkers see: then nobody can tell
        return
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise ValueError(f"{name} must be {_said(hints[name])}, got {value!r:.80}")


def to_json(document: Any, indent: int | None = 2, default: Callable[[Any], Any] | None = None) -> str:
    """Return a document as JSON that every program reads: null where a number is NaN or infinite.

    Args:
        document: of mappings, lists and plain values.
        indent: blanks a level; None: all on one line.
        default: makes such values of all others; without it they are an error.
    """
    return json.dumps(_finite(document), indent=indent, allow_nan=False, default=default)


def to_plain(options: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as JSON holds them; paths become absolute."""
    return {k: _plain(v) for k, v in asdict(options).items()}


def from_plain(cls: type[Any], data: Mapping[str, Any]) -> Any:
    """Return the dataclass that `to_plain` made `data` of: JSON's lists are tuples, and paths paths.

    Raises:
        ValueError: for an unknown field, a value of another type, or one that the dataclass refuses.
        TypeError: for a missing one.
    """
    if unknown := set(data) - {f.name for f in fields(cls)}:
        raise ValueError(f"unknown field {', '.join(sorted(unknown))} of {cls.__name__}")
    # Fields may be annotated by strings, which this resolves. JSON has no paths: only the hint tells them.
    hints = get_type_hints(cls)
    options = {k: _restored(v, _mentions(hints[k], Path)) for k, v in data.items()}
    check_values(cls, options)
    return cls(**options)


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


def _said(hint: Any) -> str:
    """Write an annotation as one writes it in Python, its literals as values."""
    if hint is type(None):
        return "None"
    if get_origin(hint) is Literal:
        return " | ".join(map(repr, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(map(_said, get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def _fits(value: Any, hint: Any) -> bool:
    """Say whether a value is one that an annotation allows."""
    kind, allowed = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if kind is Literal:
        return value in allowed
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in allowed)
    if kind is tuple and isinstance(value, tuple):
        each = allowed[:1] * len(value) if allowed[1:] == (...,) else allowed
        return len(value) == len(each) and all(map(_fits, value, each))
    wanted = kind or hint
    if isinstance(value, bool):  # an int to isinstance
        return wanted is bool
    if wanted is float:
        return isinstance(value, int | float)
    return isinstance(value, wanted) if isinstance(wanted, type) else True


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
