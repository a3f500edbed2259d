"""Keep a session as a memory file: fast weights where the window began, and the tokens of the window."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lmsleep import memory
from lmsleep.memory.file import finite, glance
from lmsleep.plugins import in_file
from lmsleep.session.stream import Stream
from lmsleep.sleep import Backbone, Compact, SleepConfig
from lmsleep.sleep.compact import no_keys
from lmsleep.state import Cache, Origin, State, Storage


def write(path: Path, stream: Stream, origin: Origin, sleep: SleepConfig, storage: Storage | None) -> None:
    """Write what `read` needs; see `Session.save`.

    Raises:
        ValueError: without the fingerprint of a model, for NaN or infinity, or for what `read` would refuse.
        OSError: if the file cannot be written.
    """
    if origin.model is None:
        raise ValueError(f"{path} is not written: a model without a state_dict() cannot be told from others")
    # What the window has written so far is not saved: its tokens say it, and are read again by `load`.
    tensors = {"window": stream.window}
    for i, layer in enumerate(stream.start.cache.layers):
        # Where the window began; under hard eviction all of it is empty.
        tensors |= {f"cache.{i}.{j}": t for j, t in enumerate(layer) if t.shape[1]}
    for i, layer in enumerate(stream.start.cache.kept):
        tensors |= {f"kept.{i}.{j}": t for j, t in enumerate(layer)}
    header, origin = {"sleep": sleep.to_dict()}, replace(origin, method=sleep.method)
    try:  # by the rules of `read`; options of the user's own may be anything
        SleepConfig.from_dict(json.loads(json.dumps(header["sleep"], allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not written: its sleep cannot be read again: {error}") from None
    memory.write(path, stream.start.memory, origin, storage=storage, header=header, tensors=tensors)


def read(path: Path, model: Backbone, sleep: SleepConfig | None) -> tuple[State, Origin, SleepConfig, Tensor]:
    """Read the state where the window began, its origin, its sleep (else `sleep`), and the window's tokens.

    Raises:
        ValueError: as `Memory.load`, if the file holds a memory and no session, if `sleep` is of another
            method than what wrote it, or if its sleep names a Python file that `sleep` does not name.
        OSError: if there is no such file.
    """
    saved = memory.read(path, model)
    if saved.memory.batch_size > 1:
        raise ValueError(f"{path} holds {saved.memory.batch_size} rows; a session has one")
    if sleep is not None and "sleep" not in saved.header:
        sleep.check_origin(saved.origin, path)
    given = sleep
    try:
        if "sleep" in saved.header:
            # First, for `from_dict` runs the file that a name is in.
            _check_code(saved.header["sleep"], sleep)
            sleep = SleepConfig.from_dict(saved.header["sleep"])
        empty = model.initial_state(1).cache
        cache = _cache(saved.tensors, empty)
        if any(name.startswith("kept.") for name in saved.tensors):
            by = type(sleep.eviction).__name__ if sleep else "none"
            if sleep is None or not isinstance(sleep.eviction, Compact):
                raise ValueError(f"it has keys that eviction=Compact kept, and its sleep evicts by {by}")
            kept = Cache(no_keys(model, empty))
            cache = replace(cache, kept=_cache(saved.tensors, kept, "kept").layers)
    except (TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{path} holds no session: {error}") from None
    if sleep is None:
        raise ValueError(f"{path} holds a memory alone; pass the sleep to go on with")
    if given is not None:
        _check_method(path, sleep, given)
    window = saved.window
    # A window of more than L tokens would have been slept on. Without L it has any length.
    if len(window) > (sleep.window or len(window)):
        raise ValueError(f"{path} holds no session: its open window has more tokens than a window has")
    assert saved.memory.origin is not None
    # The session keeps the origin, and gives it to the memories that it hands out.
    return State(replace(saved.memory, origin=None), cache), saved.memory.origin, sleep, window


def methods(path: Path) -> dict[str, str]:
    """Return the names of the consolidator and the eviction that a session was read with.

    There are none in another file. Nothing is checked, and no code that the file names runs.
    """
    said = (glance(path) or {}).get("sleep")
    return SleepConfig.names(said) if isinstance(said, Mapping) else {}


def _check_code(said: Mapping[str, Any], sleep: SleepConfig | None) -> None:
    """Refuse a sleep in a file that names code which the caller's `sleep` does not: data runs nothing."""
    known = {} if sleep is None else sleep.to_dict()
    for choice, name in SleepConfig.names(said).items():
        if in_file(name) and name != known.get(choice, {}).get("name"):
            raise ValueError(f"its {choice} is code, {name}; if you trust it, give a sleep that names it too")


def _check_method(path: Path, sleep: SleepConfig, given: SleepConfig) -> None:
    """Refuse the caller's sleep where the file's is of another method."""
    wrote, wanted = sleep.to_dict(), given.to_dict()
    for choice in ("consolidator", "eviction"):
        was, now = wrote[choice]["name"], wanted[choice]["name"]
        if was != now:
            raise ValueError(f"{path} was written with {choice}={was}, and {now} is asked for: choose {was}")


def _cache(tensors: Mapping[str, Tensor], empty: Cache, called: str = "cache") -> Cache:
    """Return what is stored under a name, of the layout of `empty`, which stands where nothing was stored."""
    names = {f"{called}.{i}.{j}" for i, layer in enumerate(empty.layers) for j in range(len(layer))}
    if strange := {name for name in tensors if name.startswith(f"{called}.")} - names:
        raise ValueError(f"{min(strange)!r:.80} belongs to no block")

    def stored(name: str, template: Tensor) -> Tensor:
        t = tensors.get(name, template)
        # Of one row, and of any length in time, which is dimension 1; all else is the model's.
        if t.ndim != template.ndim or (t.shape[0], *t.shape[2:]) != (1, *template.shape[2:]):
            raise ValueError(f"{name} has shape {tuple(t.shape)}")
        t = t.to(template)
        if not finite(t):
            raise ValueError(f"{name} holds NaN or infinity")
        return t

    layers: list[Any] = [
        tuple(stored(f"{called}.{i}.{j}", t) for j, t in enumerate(layer))
        for i, layer in enumerate(empty.layers)
    ]
    return Cache(tuple(layers))
