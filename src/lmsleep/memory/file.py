"""Read and write memory files: named tensors and a header in one safetensors file, checked when read.

docs/sessions.md describes it. What the names mean is up to `memory.saved` and `session.saving`. Both ways go
tensor by tensor, so neither needs much more main memory than the tensors do.
"""

import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from lmsleep.files import replacing

FORMAT, VERSION = "lmsleep-memory", 1
MAX_HEADER = 100_000_000  # bytes; the limit of safetensors
MAX_DIMENSIONS = 64  # of a tensor, in PyTorch
CHUNK = 1 << 24  # bytes read at once
DTYPES = {  # of safetensors, those that a memory may have
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
_PLAIN = ("format", "version", "time", "sha256")  # values of the metadata that are no JSON


def finite(tensor: Tensor) -> bool:
    """Say whether a tensor holds neither NaN nor infinity."""
    # Its extremes tell, since NaN passes for both of them, and take a tenth of the time of looking at every
    # number.
    return not tensor.numel() or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON-ready header atomically: a crash leaves the old file or the new one.

    A new file can be read by its owner alone; one that is replaced hands its permissions on.

    Raises:
        ValueError: if a tensor holds NaN or infinity or is of another kind than memories have, or the header
            is no JSON.
        OSError: if the file cannot be written; an old one is untouched.
    """
    try:
        index = _described(tensors, header)
        begin = _framed(index)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not written: {error}") from None
    with replacing(path, mode=0o600) as file:
        file.write(begin)
        digest = _digest(index)
        for name in _layout(index):
            data = _bytes(tensors[name].detach().cpu().contiguous())
            digest.update(data)
            file.write(data)
        # The checksum covers what comes behind it, so its place was held by zeros.
        index["__metadata__"]["sha256"] = digest.hexdigest()
        file.seek(0)
        file.write(_framed(index))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the header of a memory file.

    Nothing is read of what cannot be one: of a foreign file nine bytes, of a pipe or a device none.

    Raises:
        ValueError: for a foreign, truncated or edited file, or a newer version of the format.
        OSError: if there is no such file or it cannot be read.
    """
    try:
        with _opened(path) as file:
            index = _index(file)
            meta = index["__metadata__"]
            # Before all else, which another version may say in another way.
            if meta.get("version") != str(VERSION):
                raise ValueError(
                    f"has format version {meta.get('version')!r:.40}; this lmsleep reads {VERSION}"
                )
            layout, digest = _layout(index), _digest(index)
            tensors = {name: _filled(file, *of, digest) for name, of in layout.items()}
            if meta.get("sha256") != digest.hexdigest():
                raise ValueError("was edited or damaged: it does not match its own checksum")
            return tensors, _header(meta)
    except RecursionError:
        raise ValueError(f"{path} is not a memory file of lmsleep: its index is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None


def glance(path: Path) -> dict[str, Any] | None:
    """Read the header of a file, unchecked; None if the file is no memory."""
    try:
        with _opened(path) as file:
            return _header(_index(file)["__metadata__"])
    except (OSError, ValueError):
        return None


def _described(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> dict[str, Any]:
    """Return the index of a file: its metadata, and of each tensor what and where it is, in this order."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, t in tensors.items():
        if t.dtype not in names:
            raise ValueError(f"{name} is of {t.dtype}; a memory has {', '.join(map(str, names))}")
        if not finite(t):
            raise ValueError(f"{name} holds NaN or infinity")
    meta = {
        "format": FORMAT,
        "version": str(VERSION),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **{key: json.dumps(value, allow_nan=False) for key, value in header.items()},
        "sha256": "0" * 64,
    }
    index: dict[str, Any] = {"__metadata__": meta}
    end = 0
    # The widest first, so that every number lies at a multiple of its size.
    for name, t in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        offsets = [end, end := end + t.nbytes]
        index[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": offsets}
    return index


def _framed(index: Mapping[str, Any]) -> bytes:
    """Return how a file begins: the length of the index, and the index."""
    raw = json.dumps(index).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER:
        raise ValueError(f"its tags and names take {len(raw):,} bytes; {MAX_HEADER:,} are the most")
    return struct.pack("<Q", len(raw)) + raw


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """Open a file to read, and nothing that is no file."""
    flags = getattr(os, "O_NONBLOCK", 0)  # or a pipe would wait for somebody to write into it
    with open(path, "rb", opener=lambda name, mode: os.open(name, mode | flags)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("is not a memory file of lmsleep: it is a pipe or a device")
        yield file


def _index(file: BufferedReader) -> dict[str, Any]:
    """Read the index, JSON with the metadata of a memory, and leave `file` behind it.

    Raises:
        ValueError: for a foreign file, or one that is shorter than it says.
    """
    size = os.fstat(file.fileno()).st_size
    if not size:
        raise ValueError("is empty")
    begin = file.read(9)
    # Eight bytes say how long the index is. A file without them counts as cut short, as does one that ends
    # right after them; any other index begins with a brace.
    length = struct.unpack("<Q", begin[:8])[0] if len(begin) >= 8 else MAX_HEADER
    if length > MAX_HEADER or begin[8:] not in (b"{", b""):
        raise ValueError("is not a memory file of lmsleep")
    if size < 8 + length:
        raise ValueError("is cut short, or not a memory file of lmsleep")
    file.seek(8)
    try:
        index: dict[str, Any] = json.loads(file.read(length), parse_constant=_no_constant)
        ours = index["__metadata__"]["format"] == FORMAT
        ends = [entry["data_offsets"][1] for name, entry in index.items() if name != "__metadata__"]
        behind = size - 8 - length - max(ends, default=0)
    # Any JSON may stand there: no mapping, no such keys, or nested too deep to be parsed.
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise ValueError("is not a memory file of lmsleep") from None
    if not ours:
        raise ValueError("is not a memory file of lmsleep")
    # Asked here although the checksum would not match either: the error should say what happened.
    if behind:
        raise ValueError("is cut short" if behind < 0 else "was edited or damaged: it has more than it says")
    return index


def _layout(index: Mapping[str, Any]) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Return dtype and shape of each tensor, in the order in which they lie in the file, without gaps.

    Raises:
        ValueError: for an index that describes no such file.
    """
    entries = {name: entry for name, entry in index.items() if name != "__metadata__"}
    layout, at = {}, 0
    try:
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            # Before they are multiplied: numbers of JSON may have thousands of digits.
            if len(shape) > MAX_DIMENSIONS or not all(
                type(n) is int and 0 <= n < 2**63 for n in (begin, end, *shape)
            ):
                raise ValueError(name)
            if begin != at or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(name)
            layout[name], at = (dtype, shape), end
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"was edited or damaged: {error!r:.80} in its index") from None
    return layout


def _filled(file: BufferedReader, dtype: torch.dtype, shape: list[int], digest: Any) -> Tensor:
    """Read the next tensor, and let `digest` see its bytes."""
    try:
        tensor = torch.empty(shape, dtype=dtype)
    except (RuntimeError, TypeError, OverflowError):
        raise ValueError(f"does not fit into main memory: a tensor of {shape}") from None
    data = _bytes(tensor)
    for begin in range(0, len(data), CHUNK):
        piece = data[begin : begin + CHUNK]
        if file.readinto(piece) < len(piece):
            raise ValueError("is cut short")
        digest.update(piece)
    return tensor


def _bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU; they are its own, not a copy."""
    # As bytes, for numpy has no bfloat16; flattened, for a scalar cannot be viewed in another size.
    return tensor.flatten().view(torch.uint8).numpy().data


def _header(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the metadata says, out of JSON."""
    try:
        said = {k: json.loads(v, parse_constant=_no_constant) for k, v in meta.items() if k not in _PLAIN}
        return {**said, "time": meta.get("time")}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"is damaged: {error!r:.80}") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _digest(index: Mapping[str, Any]) -> Any:
    """Begin the SHA-256 of all that a file says, but for the checksum itself, with its index."""
    meta = {key: value for key, value in index["__metadata__"].items() if key != "sha256"}
    # The index as JSON with sorted keys, not its bytes: the order of keys and blanks says nothing.
    return hashlib.sha256(json.dumps({**index, "__metadata__": meta}, sort_keys=True).encode())
