"""Read and write memory files: named tensors and a header in one safetensors file, checked when read.

docs/sessions.md describes it. What the names mean is up to `memory.saved` and `session.saving`.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lmsleep.files import write_atomic

FORMAT, VERSION = "lmsleep-memory", 1
MAX_HEADER = 100_000_000  # bytes; the limit of safetensors
_PLAIN = ("format", "version", "time", "sha256")  # values of the metadata that are no JSON


def finite(tensor: Tensor) -> bool:
    """Say whether a tensor holds neither NaN nor infinity."""
    # Its extremes tell, since NaN passes for both of them, and take a tenth of the time of looking at every
    # number.
    return not tensor.numel() or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON-ready header atomically: a crash leaves the old file or the new one.

    Raises:
        ValueError: if a tensor holds NaN or infinity.
        OSError: if the file cannot be written; an old one is untouched.
    """
    for name, tensor in tensors.items():
        if not finite(tensor):
            raise ValueError(f"{path} is not written: {name} holds NaN or infinity")
    meta = {
        "format": FORMAT,
        "version": str(VERSION),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **{key: json.dumps(value) for key, value in header.items()},
    }
    # Copies: safetensors refuses tensors that share storage, as two that begin as the same zeros may.
    stored = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()
    }
    # Twice: the checksum covers the index, which safetensors makes, and then goes into it.
    data = save(stored, meta)
    write_atomic(path, save(stored, {**meta, "sha256": _digest(*_parts(data))}))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the header of a memory file.

    Raises:
        ValueError: for a foreign, truncated or edited file, or a newer version of the format.
        OSError: if there is no such file or it cannot be read.
    """
    data = path.read_bytes()
    try:
        index, body = _parts(data)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    meta = index["__metadata__"]
    # Before the checksum, which another version may compute in another way.
    if meta.get("version") != str(VERSION):
        raise ValueError(f"{path} has format version {meta.get('version')}; this lmsleep reads {VERSION}")
    if meta.get("sha256") != _digest(index, body):
        raise ValueError(f"{path} was edited or damaged: it does not match its own checksum")
    try:
        tensors = load(data)
        header = {k: json.loads(v) for k, v in meta.items() if k not in _PLAIN}
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return tensors, {**header, "time": meta.get("time")}


def glance(path: Path) -> dict[str, Any] | None:
    """Read the header from the first bytes of a file, unchecked; None if the file is no memory."""
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            # In a foreign file these bytes may be any number: never read more than a header can have.
            meta = json.loads(file.read(length) if length <= MAX_HEADER else b"")["__metadata__"]
        return {k: json.loads(v) for k, v in meta.items() if k not in _PLAIN}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error):
        return None


def _parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Split a safetensors file into its index (JSON) and the bytes that it describes."""
    if not data:
        raise ValueError("is empty")
    # Eight bytes say how long the index is. A file without them counts as cut short, as does one that ends
    # right after them; any other index begins with a brace.
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else MAX_HEADER
    if length > MAX_HEADER or data[8:9] not in (b"{", b""):
        raise ValueError("is not a memory file of lmsleep")
    if len(data) < 8 + length:
        raise ValueError("is cut short, or not a memory file of lmsleep")
    try:
        index = json.loads(data[8 : 8 + length])
        entries = [entry for name, entry in index.items() if name != "__metadata__"]
        ours = index["__metadata__"]["format"] == FORMAT
        # Asked here although the checksum would not match either: the error should say what happened.
        end = max((entry["data_offsets"][1] for entry in entries), default=0)
        short = len(data) < 8 + length + end
    # Any JSON may stand there: no mapping, no such keys, or nested too deep to be parsed.
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise ValueError("is not a memory file of lmsleep") from None
    if not ours:
        raise ValueError("is not a memory file of lmsleep")
    if short:
        raise ValueError("is cut short")
    return index, data[8 + length :]


def _digest(index: Mapping[str, Any], body: bytes) -> str:
    """Compute the SHA-256 of all that a file says, but for the checksum itself."""
    meta = {key: value for key, value in index["__metadata__"].items() if key != "sha256"}
    # The index as JSON with sorted keys, not its bytes: the order of keys and blanks says nothing.
    digest = hashlib.sha256(json.dumps({**index, "__metadata__": meta}, sort_keys=True).encode())
    digest.update(body)
    return digest.hexdigest()
