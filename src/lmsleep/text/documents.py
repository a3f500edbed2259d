"""Sets of documents: JSON lines and folders of `datasets`, one document a row."""

import json
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

Split = Literal["train", "test"]

GUESSES = (("question", "answer"), ("prompt", "completion"), ("text",))
HELD_OUT = 10  # one document in 10 is for testing, by its hash: more documents move none of the old


class Document(NamedTuple):
    """One row: its text, or its prompt and answer, and the split that it belongs to."""

    fields: tuple[str, ...]
    split: Split


class _Row(NamedTuple):
    where: str
    split: Split | None
    values: Mapping[str, Any]


def is_set(path: Path) -> bool:
    """Return True if `path` holds a set of documents, and is not a document itself."""
    return path.is_dir() or path.suffix == ".jsonl"


def read_set(path: Path, names: tuple[str, ...] = ()) -> Iterator[Document]:
    """Yield the documents of a .jsonl file or of a folder that `datasets` saved.

    A folder with splits "train" and "test" (or "validation") keeps these two; elsewhere a document is held
    out by the hash of its first field, so that a prompt is never in both.

    Args:
        path: the file or folder.
        names: the field of the text, or those of prompt and answer; default: the first of `GUESSES` that
            the first row has.

    Raises:
        ValueError: naming file and line, for a row that is not JSON or lacks a field.
    """
    for row in _dataset(path) if path.is_dir() else _json_lines(path):
        names = names or _guess(row)
        fields = tuple(_text(row, name) for name in names)
        if len(names) == 2 and not all(fields):
            raise ValueError(f"{row.where}: {names[fields.index('')]} is empty")
        yield Document(fields, row.split or _split(fields[0]))


def _split(text: str) -> Split:
    # JSON may hold half of a surrogate pair, which plain UTF-8 refuses.
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "train" if int.from_bytes(digest, "big") % HELD_OUT else "test"


def _guess(row: _Row) -> tuple[str, ...]:
    for names in GUESSES:
        if all(name in row.values for name in names):
            return names
    raise ValueError(
        f"{row.where}: none of {', '.join('/'.join(names) for names in GUESSES)} among its fields "
        f"{', '.join(row.values)}; name the text's, or the prompt's and the answer's, with fields"
    )


def _text(row: _Row, name: str) -> str:
    if name not in row.values:
        raise ValueError(f"{row.where}: no field {name!r}; there are {', '.join(row.values)}")
    value = row.values[name]
    # bool is an int in Python.
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{row.where}: field {name!r} must be text or a number, got {type(value).__name__}")
    return value


def _json_lines(path: Path) -> Iterator[_Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except ValueError as error:  # no JSON, or no UTF-8
                raise ValueError(f"{where}: not JSON: {error}") from None
            if not isinstance(values, dict):
                raise ValueError(f"{where}: must be a JSON object, got {type(values).__name__}")
            yield _Row(where, None, values)


def _dataset(folder: Path) -> Iterator[_Row]:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"data={str(folder)!r} needs datasets: pip install 'lmsleep[hf]'") from None
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # it raises whatever its file formats raise
        reason = str(error).splitlines()[0]
        raise ValueError(f"data: {folder} is no folder that datasets can load: {reason}") from None
    parts: dict[str, Any] = loaded if isinstance(loaded, datasets.DatasetDict) else {"rows": loaded}
    held_out = next((name for name in ("test", "validation") if name in parts), None)
    splits: dict[str, Split] = {}
    if "train" in parts and held_out is not None:
        splits = {"train": "train", held_out: "test"}
    for name, part in parts.items():
        if not splits or name in splits:
            for number, values in enumerate(part):
                yield _Row(f"{folder}, {name} {number}", splits.get(name), values)
