"""Memory files: tensors and what they are, in one safetensors file that is checked when it is read.

The format is described in docs/sessions.md. Everything here works on names and tensors; what they mean is
up to `state.Memory` and `session`.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self, get_args
from uuid import uuid4
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lmsleep.files import write_atomic

FORMAT, VERSION = "lmsleep-memory", 1
MAX_HEADER = 100_000_000  # bytes; the limit of safetensors
MAX_BLOCKS = 10_000
Storage = Literal["float32", "bfloat16", "int8"]
Layers = tuple[Tensor | None, ...]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a memory is: which model wrote it, from how much, and what it descends from."""

    id: str = field(default_factory=lambda: uuid4().hex)
    """Names a line of reading; only a fork or a merge begins a new one."""
    parents: tuple[str, ...] = ()
    """Ids of what it was forked or merged from."""
    model: str | None = None
    """Fingerprint of the model that wrote it; None: unknown."""
    tokens: int = 0
    """Tokens read."""
    sleeps: int = 0
    """Sleeps."""
    passes: int | None = None
    """Passes N of a sleep."""
    rule: tuple[str | None, ...] = ()
    """Kind of each block with fast weights (gated_delta_net, ...), None for one without; empty: unknown."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Whatever the user wants to remember."""

    def child(self, *others: "Origin") -> Self:
        """The origin of a fork, or of a merge with `others`."""
        return replace(self, id=uuid4().hex, parents=(self.id, *(other.id for other in others)))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, read back by `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`, after a trip through JSON; other keys are left out.

        Raises:
            ValueError: for a field that is missing or of another type.
        """
        try:
            known = {f.name: data[f.name] for f in fields(cls)}
            origin = cls(**{**known, "parents": tuple(known["parents"]), "rule": tuple(known["rule"])})
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"the origin of the memory lacks a field: {error}") from None
        if not isinstance(origin.tags, Mapping):
            raise ValueError("the tags of the memory are of another type")
        texts = [origin.id, *origin.parents, *origin.tags, *origin.tags.values()]
        texts += [text for text in (origin.model, *origin.rule) if text is not None]
        counts = [origin.tokens, origin.sleeps]
        whole = counts if origin.passes is None else [*counts, origin.passes]
        if not all(isinstance(text, str) for text in texts) or not all(type(n) is int for n in whole):
            raise ValueError("the origin of the memory has a field of another type")
        if min(counts) < 0:
            raise ValueError(
                f"the origin of the memory counts {origin.tokens} tokens, {origin.sleeps} sleeps"
            )
        return origin


def fingerprint(model: Any) -> str:
    """SHA-256 over the slow weights and the configuration of a model, as 64 hex digits.

    Sleep leaves it as it is: only the fast weights change. The weights of a model object are read once, and
    again after one of them was written or replaced; a write through `.data`, which PyTorch does not count, is
    not seen.

    Args:
        model: anything with a `state_dict()`; its `config`, if it has one, counts too.

    Raises:
        ValueError: for a model without a `state_dict()`.
    """
    if not hasattr(model, "state_dict"):
        raise ValueError(f"{type(model).__name__} has no state_dict(), so a memory cannot be tied to it")
    config = json.dumps(_settings(getattr(model, "config", None)), sort_keys=True, default=_plain)
    weights = sorted(model.state_dict().items())
    if any(tensor.is_inference() for _, tensor in weights):  # whose writes are not counted
        return _digest_of(config, weights)
    now = (config, tuple((name, t.data_ptr(), t._version, t.dtype, t.shape) for name, t in weights))
    before, digest = _identities.get(model, (None, ""))
    if before != now:
        digest = _digest_of(config, weights)
        _identities[model] = now, digest
    return digest


# Of each model object: its configuration with the storage and version of its weights, and its fingerprint.
_identities: WeakKeyDictionary[Any, tuple[Any, str]] = WeakKeyDictionary()


def _digest_of(config: str, weights: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256(config.encode())
    for name, tensor in weights:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(raw.data)
    return digest.hexdigest()


# Where a model came from and how it is used say nothing of what it is; dtypes are those of its tensors.
UNTOLD = {
    *("_name_or_path", "transformers_version", "architectures", "dtype", "use_cache", "sleep"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}


def _settings(config: Any) -> Any:
    """What a configuration says; defaults of a dataclass left out, so that new options keep old memories."""
    if not is_dataclass(config) or hasattr(config, "to_diff_dict"):  # those of transformers are both
        found = config.to_dict() if hasattr(config, "to_dict") else config
        return {k: v for k, v in found.items() if k not in UNTOLD} if isinstance(found, dict) else found
    found = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if value != (f.default if f.default_factory is MISSING else f.default_factory()):
            found[f.name] = value
    return found


def _plain(value: Any) -> Any:
    """What JSON can say of an object: its attributes, never its address."""
    if hasattr(value, "__qualname__"):  # a class or a function
        return value.__qualname__
    return vars(value) if hasattr(value, "__dict__") else str(value)


def write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON-ready header atomically: a crash leaves the old file or the new one.

    Raises:
        ValueError: if a tensor holds NaN or infinity.
        OSError: if the file cannot be written; an old one is untouched.
    """
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{path} is not written: {name} holds NaN or infinity")
    meta = {
        "format": FORMAT,
        "version": str(VERSION),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **{key: json.dumps(value) for key, value in header.items()},
    }
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = save(stored, meta)
    write_atomic(path, save(stored, {**meta, "sha256": _digest(*_parts(data))}))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a memory file.

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


_PLAIN = ("format", "version", "time", "sha256")


def _parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The index (JSON) of a safetensors file, and the bytes that it describes."""
    if not data:
        raise ValueError("is empty")
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else MAX_HEADER
    if length > MAX_HEADER or data[8:9] not in (b"{", b""):
        raise ValueError("is not a memory file of lmsleep")
    if len(data) < 8 + length:
        raise ValueError("is cut short, or not a memory file of lmsleep")
    try:
        index = json.loads(data[8 : 8 + length])
        entries = [entry for name, entry in index.items() if name != "__metadata__"]
        ours = index["__metadata__"]["format"] == FORMAT
        end = max((entry["data_offsets"][1] for entry in entries), default=0)
        short = len(data) < 8 + length + end
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise ValueError("is not a memory file of lmsleep") from None
    if not ours:
        raise ValueError("is not a memory file of lmsleep")
    if short:
        raise ValueError("is cut short")
    return index, data[8 + length :]


def _digest(index: Mapping[str, Any], body: bytes) -> str:
    """SHA-256 of all that a file says, but for the checksum itself."""
    meta = {key: value for key, value in index["__metadata__"].items() if key != "sha256"}
    said = json.dumps({**index, "__metadata__": meta}, sort_keys=True).encode()
    return hashlib.sha256(said + body).hexdigest()


def pack(layers: Layers, storage: Storage | None) -> dict[str, Tensor]:
    """Fast weights as named tensors: `S.3` is block 3, in its own dtype unless `storage` names another.

    int8 keeps `round(127 S / s)`, with `s` (`S.3.scale`, float32) the largest magnitude in the head.
    """
    if storage not in (None, *get_args(Storage)):
        raise ValueError(f"storage must be one of {', '.join(get_args(Storage))} or None, got {storage!r}")
    packed = {}
    for i, S in enumerate(layers):
        if S is None:
            continue
        if storage == "int8":
            scale = S.abs().amax((-1, -2), keepdim=True).float()
            share = S / scale.clamp(min=torch.finfo(scale.dtype).tiny)
            packed[f"S.{i}"] = (127 * share).round().to(torch.int8)
            packed[f"S.{i}.scale"] = scale
        else:
            packed[f"S.{i}"] = S if storage is None else S.to(getattr(torch, storage))
    return packed


def unpack(tensors: Mapping[str, Tensor], blocks: int) -> Layers:
    """Inverse of `pack`, in float32 or float64.

    Raises:
        ValueError: for a number of blocks that no model has, or a tensor of fast weights that is missing its
            scale, is no number or has no heads.
    """
    if type(blocks) is not int or not 0 <= blocks <= MAX_BLOCKS:
        raise ValueError(f"blocks must lie in 0 ... {MAX_BLOCKS}, got {blocks!r}")
    layers: list[Tensor | None] = []
    for i in range(blocks):
        S = tensors.get(f"S.{i}")
        if S is not None and S.dtype == torch.int8:
            if f"S.{i}.scale" not in tensors:
                raise ValueError(f"S.{i}.scale is missing")
            scale = tensors[f"S.{i}.scale"]
            if scale.shape != (*S.shape[:2], 1, 1):
                raise ValueError(f"S.{i}.scale has shape {tuple(scale.shape)}, not [B, H, 1, 1]")
            S = S.float() * (scale / 127)
        elif S is not None:
            S = S.to(torch.promote_types(S.dtype, torch.float32))
        real = S is None or (S.ndim == 4 and S.numel() and not S.is_complex() and bool(S.isfinite().all()))
        if not real:
            raise ValueError(f"S.{i} holds no fast weights [B, H, K, V] of finite numbers")
        layers.append(S)
    if len({len(S) for S in layers if S is not None}) > 1:
        raise ValueError("its fast weights differ in their number of rows")
    return tuple(layers)


def log(path: Path) -> Iterator[tuple[Path | None, Origin]]:
    """A memory and, as far as they lie in its folder, all that it descends from; the youngest first.

    Files that are no memories, or hidden (as what a killed write leaves), are passed over; an ancestor that
    is not there comes with no path.

    Raises:
        ValueError: as `read`.
        OSError: as `read`.
    """
    begin = Origin.from_dict(read(path)[1])
    found: dict[str, tuple[Path | None, Origin]] = {begin.id: (path, begin)}
    siblings = sorted(p for p in path.parent.iterdir() if p.is_file() and not p.name.startswith("."))
    for other in siblings if begin.parents else ():
        origin = _glance(other)
        if origin is not None:
            found.setdefault(origin.id, (other, origin))
    queue, seen = [begin.id], set[str]()
    while queue:
        name = queue.pop(0)
        if name not in seen:
            seen.add(name)
            where, what = found.get(name, (None, Origin(id=name)))
            queue += what.parents
            yield where, what


def _glance(path: Path) -> Origin | None:
    """The origin from the first bytes of a file, unchecked; None if it is no memory."""
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            meta = json.loads(file.read(length) if length <= MAX_HEADER else b"")["__metadata__"]
        return Origin.from_dict({k: json.loads(v) for k, v in meta.items() if k not in _PLAIN})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error):
        return None
