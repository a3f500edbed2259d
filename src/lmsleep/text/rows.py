"""Files and folders of rows: JSON lines and arrays, CSV, Parquet, Arrow, folders of `datasets`."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from lmsleep.text.files import HEAD, open_text, read_text
from lmsleep.text.splits import Split, split_of, splits_of

PACKED = {".gz", ".bz2", ".xz"}  # endings that hide another one
LONGEST = 2**31 - 1  # characters of a field of CSV


class Row(NamedTuple):
    """One row: where it stands, the split that its source puts it in (if any), and its fields."""

    where: str
    split: Split | None
    values: Mapping[str, Any]


def has_rows(path: Path) -> bool:
    """Return True if the file or folder at `path` holds rows, and is not a document itself.

    The beginning of the file decides, and its ending where that says nothing: .jsonl, .ndjson, .json, .csv,
    .tsv, .parquet, .arrow, in any case and also before .gz, .bz2 or .xz.

    Raises:
        OSError: if there is nothing at `path`.
        ValueError: for a file of a known format that holds neither rows nor text.
    """
    return _reader(path) is not None


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file or folder.

    Raises:
        OSError: if it cannot be read.
        ValueError: naming file and line, for what is no row; or for a folder whose splits are not clear.
    """
    reader = _reader(path)
    assert reader is not None, "has_rows comes first"
    return reader(path)


Reader = Callable[[Path], Iterator[Row]]


def _reader(path: Path) -> Reader | None:
    """Return the function that reads the rows at `path`, None for a document."""
    if path.is_dir():
        return _dataset
    with path.open("rb") as file:
        # Not of a pipe, which cannot be read again.
        magic = file.read(6) if file.seekable() else b""
    if magic.startswith((b"PAR1", b"PARE")):
        return _parquet
    if magic.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return _arrow
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in PACKED:
        endings.pop()
    return READERS.get(endings[-1] if endings else "") or _json_reader(path)


def _json_reader(path: Path) -> Reader | None:
    """Return the reader of what looks like JSON from its beginning, whatever it is called."""
    with open_text(path) as file:
        start = file.read(HEAD).lstrip()
        if re.match(rb"\[\s*\{\s*[\"}]", start):
            return _json
        if not start.startswith(b"{"):
            return None
        line = start.partition(b"\n")[0] if b"\n" in start else start + file.readline()
    return _json_lines if _is_object(line) else None


def _is_object(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(path: Path) -> Iterator[Row]:
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _row(f"{path}, line {number}", _parsed(line, f"{path}, line {number}"))


def _json(path: Path) -> Iterator[Row]:
    text = read_text(path)
    # Under this ending there are JSON lines too.
    if not text.lstrip().startswith(b"[") and _is_object(text.lstrip().partition(b"\n")[0]):
        yield from _json_lines(path)
        return
    values = _parsed(text, str(path))
    if not isinstance(values, list):
        raise ValueError(f"{path}: must be a JSON array of objects, or one object a line")
    for number, value in enumerate(values, start=1):
        yield _row(f"{path}, row {number}", value)


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or too deep
        raise ValueError(f"{where}: not JSON: {error}") from None


def _row(where: str, values: Any) -> Row:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: must be a JSON object, got {type(values).__name__}")
    return Row(where, None, values)


def _csv(path: Path, delimiter: str = ",") -> Iterator[Row]:
    try:
        text = io.StringIO(read_text(path).decode(), newline="")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it in UTF-8") from None
    csv.field_size_limit(LONGEST)  # of the process; texts are longer than its 131,072
    lines = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(lines, [])
        for values in lines:
            if len(values) not in (0, len(header)):
                raise ValueError(
                    f"{path}, line {lines.line_num}: {len(values)} fields, the first line names {len(header)}"
                )
            if values:
                yield Row(f"{path}, line {lines.line_num}", None, dict(zip(header, values, strict=True)))
    except csv.Error as error:
        raise ValueError(f"{path}, line {lines.line_num}: no CSV: {error}") from None


def _tsv(path: Path) -> Iterator[Row]:
    return _csv(path, "\t")


def _parquet(path: Path) -> Iterator[Row]:
    return _arrow_rows(path, lambda arrow: arrow.parquet.ParquetFile(path).iter_batches())


def _arrow(path: Path) -> Iterator[Row]:
    def batches(arrow: Any) -> Iterator[Any]:
        with arrow.memory_map(str(path)) as file:
            if file.read(6) == b"ARROW1":
                file.seek(0)
                opened = arrow.ipc.open_file(file)
                yield from map(opened.get_batch, range(opened.num_record_batches))
            else:
                file.seek(0)
                yield from arrow.ipc.open_stream(file)

    return _arrow_rows(path, batches)


def _arrow_rows(path: Path, batches: Callable[[Any], Iterator[Any]]) -> Iterator[Row]:
    try:
        # Both come with datasets.
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path} needs pyarrow: pip install 'lmsleep[hf]'") from None
    try:
        values = chain.from_iterable(batch.to_pylist() for batch in batches(pyarrow))
        for number, value in enumerate(values, start=1):
            yield Row(f"{path}, row {number}", None, value)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged: {str(error).splitlines()[0]}") from None


def _dataset(folder: Path) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"data={str(folder)!r} needs datasets: pip install 'lmsleep[hf]'") from None
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # it raises whatever its file formats raise
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"data: {folder} is no folder that datasets can load: {reason} (name files, not their folder)"
        ) from None
    if not isinstance(loaded, datasets.DatasetDict):
        loaded = {"rows": loaded}
    splits = splits_of(loaded)
    # Where nothing is held out by name, rows for training are held out by their hash.
    names = [*splits] or [name for name in loaded if split_of(name) == "train"]
    if not names and (len(loaded) > 1 or split_of(*loaded) == "test"):
        raise ValueError(
            f"data: {folder} has the splits {', '.join(loaded)}, of which none is called train; name the "
            f"folder of one, {folder / next(iter(loaded))}, to have its rows held out by their hash"
        )
    for name in names or loaded:
        for number, values in enumerate(loaded[name]):
            yield Row(f"{folder}, {name} {number}", splits.get(name), values)


READERS: dict[str, Reader] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
