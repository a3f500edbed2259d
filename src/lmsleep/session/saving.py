"""A session as a memory file: fast weights where the window began, and the tokens of the window."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmsleep import memory_file
from lmsleep.memory_file import Origin, Storage
from lmsleep.session.stream import Stream, no_tokens
from lmsleep.sleep import Backbone, SleepConfig
from lmsleep.state import Cache, Memory, State


def write(path: Path, stream: Stream, origin: Origin, sleep: SleepConfig, storage: Storage | None) -> None:
    """Write what `read` needs; see `Session.save`.

    Raises:
        ValueError: without the fingerprint of a model, or for NaN or infinity.
        OSError: if the file cannot be written.
    """
    if origin.model is None:
        raise ValueError(f"{path} is not written: a model without a state_dict() cannot be told from others")
    layers = stream.start.memory.layers
    tensors = {**memory_file.pack(layers, storage), "window": stream.window}
    for i, layer in enumerate(stream.start.cache.layers):
        tensors |= {f"cache.{i}.{j}": t for j, t in enumerate(layer) if t.shape[1]}
    memory_file.write(path, tensors, {**origin.to_dict(), "blocks": len(layers), "sleep": sleep.to_dict()})


def read(path: Path, model: Backbone, sleep: SleepConfig | None) -> tuple[State, Origin, SleepConfig, Tensor]:
    """The state where the window began, what it is, its sleep (else `sleep`), and the tokens of the window.

    Raises:
        ValueError: as `Memory.load`, or if the file holds a memory and no session.
        OSError: if there is no such file.
    """
    tensors, header = memory_file.read(path)
    memory = Memory.unpacked(path, tensors, header, model)
    assert memory.origin is not None
    if memory.batch_size > 1:
        raise ValueError(f"{path} holds {memory.batch_size} rows; a session has one")
    try:
        if "sleep" in header:
            sleep = SleepConfig.from_dict(header["sleep"])
        cache = _cache(tensors, model.initial_state(1).cache)
    except (TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{path} holds no session: {error}") from None
    if sleep is None:
        raise ValueError(f"{path} holds a memory alone; pass the sleep to go on with")
    window = tensors.get("window", no_tokens())
    if window.dtype != torch.int64 or window.ndim != 1 or len(window) > (sleep.window or len(window)):
        raise ValueError(f"{path} holds no session: its open window is none")
    return State(replace(memory, origin=None), cache), memory.origin, sleep, window


def _cache(tensors: Mapping[str, Tensor], empty: Cache) -> Cache:
    def stored(name: str, template: Tensor) -> Tensor:
        t = tensors.get(name, template)
        if t.ndim != template.ndim or (t.shape[0], *t.shape[2:]) != (1, *template.shape[2:]):
            raise ValueError(f"{name} has shape {tuple(t.shape)}")
        return t.to(template)

    layers: list[Any] = [
        tuple(stored(f"cache.{i}.{j}", t) for j, t in enumerate(layer))
        for i, layer in enumerate(empty.layers)
    ]
    return Cache(tuple(layers))
