"""Interpret memory files: fast weights by name, who wrote them, and their ancestors in the same folder."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import count, takewhile
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from lmsleep.memory import file
from lmsleep.memory.identity import fingerprint
from lmsleep.state import Memory, Origin, Starts, Storage

MAX_BLOCKS = 10_000


@dataclass(frozen=True, eq=False)
class Saved:
    """The contents of a memory file.

    Attributes:
        memory: the fast weights; their origin counts the tokens before the open window.
        origin: that of the stream, which counts the tokens of the open window as well.
        header: everything else that the file says, by name.
        tensors: everything else that it holds, by name.
    """

    memory: Memory
    origin: Origin
    header: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def window(self) -> Tensor:
        """Return `[n]` int64: the tokens of the open window of a session, which are not in the memory yet."""
        return self.tensors.get("window", torch.empty(0, dtype=torch.int64))


def read(path: str | Path, model: Starts | None = None) -> Saved:
    """Read a memory file, for `model`, or without one only to look at it.

    Raises:
        ValueError: as `Memory.load`.
        OSError: if there is no such file.
    """
    tensors, header = file.read(Path(path))
    try:
        origin = origin_from(header)
        memory = Memory(unpack(tensors, header["blocks"]))
        saved = Saved(memory, origin, header, {k: t for k, t in tensors.items() if not k.startswith("S.")})
        if saved.window.ndim != 1 or saved.window.dtype != torch.int64:
            raise ValueError("its open window is no row of tokens")
        unread = len(saved.window)
        if unread > origin.tokens:
            raise ValueError(f"its open window has {unread} tokens, and it read {origin.tokens}")
    # The checksum shows that nobody edited the file, not that what wrote it made sense.
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{path} is no memory: {error}") from None
    if model is not None:
        if origin.model != fingerprint(model):
            raise ValueError(f"{path} is the memory of another model (or of other weights of this one)")
        # Only the layout and where tensors lie are asked of the one row; the memory may have any number.
        memory = memory.like(model.initial_state(1).memory, path)
        if not all(map(file.finite, memory.tensors())):
            raise ValueError(f"{path} holds numbers that are too large for the model's dtype")
    # `S` is that of the beginning of the window, so its origin leaves out the tokens of the window.
    return replace(saved, memory=replace(memory, origin=replace(origin, tokens=origin.tokens - unread)))


def write(
    path: str | Path,
    memory: Memory,
    origin: Origin,
    *,
    storage: Storage | None = None,
    header: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write what `read` returns; header and tensors default to nothing else.

    Raises:
        ValueError: for an unknown storage, a tensor with NaN or infinity, or what else `read` would refuse.
        OSError: if the file cannot be written; an old one is untouched.
    """
    said = {**asdict(origin), "blocks": len(memory.layers)}
    try:  # by the rules of `read`, before anything is replaced
        packed = pack(memory, storage)
        origin_from(said)
        for block in _names(packed, said["blocks"]):
            for name in block:
                _unpacked(packed, name)
    except ValueError as error:
        raise ValueError(f"{path} is not written: {error}") from None
    file.write(Path(path), {**packed, **(tensors or {})}, {**said, **(header or {})})


def load(path: str | Path, model: Starts | None = None) -> Memory:
    """Do what `Memory.load` says."""
    return read(path, model).memory


def save(
    memory: Memory,
    path: str | Path,
    model: Starts | None = None,
    *,
    storage: Storage | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Do what `Memory.save` says."""
    origin = memory.origin or Origin()
    if model is not None:
        origin = replace(origin, model=fingerprint(model))
    elif origin.model is None:
        raise ValueError("this memory does not know its model; pass model=")
    write(path, memory, replace(origin, tags={**origin.tags, **(tags or {})}), storage=storage)


def log(path: str | Path) -> Iterator[tuple[Path | None, Origin]]:
    """Yield a memory and, as far as they lie in its folder, all that it descends from; the youngest first.

    Files that are no memories, or hidden (as what a killed write leaves), are passed over; an ancestor that
    is not there comes with no path.

    Raises:
        ValueError: as `read`.
        OSError: as `read`.
    """
    path = Path(path)
    begin = read(path).origin
    found: dict[str, tuple[Path | None, Origin]] = {begin.id: (path, begin)}
    siblings = sorted(p for p in path.parent.iterdir() if p.is_file() and not p.name.startswith("."))
    for other in siblings if begin.parents else ():
        header = file.glance(other)
        try:
            origin = None if header is None else origin_from(header)
        except ValueError:
            continue
        if origin is not None:
            found.setdefault(origin.id, (other, origin))  # of copies with one id the first, or `path`
    # Breadth first. Merges may share ancestors, and headers unchecked may go in circles: each id once.
    queue, seen = [begin.id], set[str]()
    while queue:
        name = queue.pop(0)
        if name not in seen:
            seen.add(name)
            where, what = found.get(name, (None, Origin(id=name)))
            queue += what.parents
            yield where, what


def origin_from(header: Mapping[str, Any]) -> Origin:
    """Return the origin that a header names, after a trip through JSON; other keys are left out.

    Raises:
        ValueError: for a field that is missing or of another type.
    """
    try:
        # Files were once written without a method.
        known = {f.name: {"method": None, **header}[f.name] for f in fields(Origin)}
        # JSON made lists of the tuples.
        lists = {name: tuple(known[name]) for name in ("parents", "rule")}
    except (KeyError, TypeError) as error:
        raise ValueError(f"the origin of the memory lacks a field: {error}") from None
    return Origin(**{**known, **lists})


def _name(block: int, part: int) -> str:
    """Return the name of a tensor in the file."""
    # A block's only tensor, or its first, has the name that all files had when a block kept one.
    return f"S.{block}" if part == 0 else f"S.{block}.{part}"


def pack(memory: Memory, storage: Storage | None) -> dict[str, Tensor]:
    """Return fast weights as named tensors, in their own dtype unless `storage` names another.

    `S.3` is the first tensor of block 3, `S.3.1` the next one. int8 keeps `round(127 S / s)`, with `s`
    (`S.3.scale`, float32) the largest magnitude in the head: in all numbers of the tensor that share row and
    head, its first two dimensions (its row alone, where there are no more than two).
    """
    if storage not in (None, *get_args(Storage)):
        raise ValueError(f"storage must be one of {', '.join(get_args(Storage))} or None, got {storage!r}")
    packed = {}
    for block, tensors in enumerate(memory.parts):
        for part, S in enumerate(tensors):
            name = _name(block, part)
            _check(name, S)
            if storage == "int8":
                S = S.to(torch.promote_types(S.dtype, torch.float32))
                scale = S.abs().reshape(*_heads(S), -1).amax(-1).view(_scale_shape(S)).float()
                # A head that is zero has the scale 0; its shares are to be 0, not NaN.
                share = S / scale.clamp(min=torch.finfo(scale.dtype).tiny)
                packed[name] = (127 * share).round().to(torch.int8)
                packed[f"{name}.scale"] = scale
            else:
                packed[name] = S if storage is None else S.to(getattr(torch, storage))
    return packed


def _check(name: str, S: Tensor) -> None:
    """Refuse what are no fast weights: numbers of a kind that files have, in one row or more."""
    if not S.ndim or not S.numel() or S.dtype not in file.DTYPES.values():
        raise ValueError(f"{name} holds no fast weights [B, ...], but {[*S.shape]} of {S.dtype}")


def _heads(S: Tensor) -> tuple[int, ...]:
    """Return the dimensions that share a scale: row and head, or the row alone."""
    return tuple(S.shape[:2] if S.ndim > 2 else S.shape[:1])


def _scale_shape(S: Tensor) -> tuple[int, ...]:
    """Return the shape of the scales of `S`, with ones at the end so that they multiply it."""
    return (*_heads(S), *[1] * (S.ndim - len(_heads(S))))


def unpack(tensors: Mapping[str, Tensor], blocks: int) -> tuple[tuple[Tensor, ...], ...]:
    """Return the tensors of each block, out of what `pack` made of them, in float32 or float64.

    Raises:
        ValueError: for a number of blocks that no model has, or a tensor of fast weights that is missing its
            scale, is no number or has no rows.
    """
    return tuple(tuple(_unpacked(tensors, name) for name in block) for block in _names(tensors, blocks))


def _names(tensors: Mapping[str, Tensor], blocks: int) -> list[list[str]]:
    """Return the names of each block's tensors; errors are those of `unpack`."""
    # The number comes from the file, and the loop below must end soon whatever it says.
    if type(blocks) is not int or not 0 <= blocks <= MAX_BLOCKS:
        raise ValueError(f"blocks must lie in 0 ... {MAX_BLOCKS}, got {blocks!r:.80}")
    names = [[*takewhile(tensors.__contains__, (_name(i, part) for part in count()))] for i in range(blocks)]
    known = {name for block in names for name in block}
    # Names in a row only: behind a gap (`S.3`, `S.3.2`) a tensor would be lost without a word.
    strange = {name.removesuffix(".scale") for name in tensors if name.startswith("S.")} - known
    if strange:
        raise ValueError(f"{min(strange)!r:.80} is the tensor of no block")
    if len({tensors[name].shape[:1] for name in known}) > 1:
        raise ValueError("its fast weights differ in their number of rows")
    return names


def _unpacked(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the fast weights called `name`, checked and, out of int8, scaled."""
    S = tensors[name]
    _check(name, S)
    if not file.finite(S):
        raise ValueError(f"{name} holds NaN or infinity")
    if S.dtype != torch.int8:
        return S.to(torch.promote_types(S.dtype, torch.float32))  # `S` lives in float32 or better
    if f"{name}.scale" not in tensors:
        raise ValueError(f"{name}.scale is missing")
    scale = tensors[f"{name}.scale"]
    if scale.shape != _scale_shape(S):
        raise ValueError(f"{name}.scale has shape {tuple(scale.shape)}, not {_scale_shape(S)}")
    S = S.float() * (scale / 127)
    # Of the product: it tells of the scale as well, and of one so large that it overflows.
    if not file.finite(S):
        raise ValueError(f"{name}.scale holds NaN or infinity")
    return S
