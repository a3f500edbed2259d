"""The kinds of backbone by name: two of the library, and those of users, `FILE.py:CLASS` or entry points."""

import json
from collections.abc import Mapping
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lmsleep.backbones.kind import CONFIG, KEY, Kind, Model
from lmsleep.foreign import PEFT
from lmsleep.gguf_file import is_gguf
from lmsleep.plugins import Plugin, absolute

# Name: the class of options, and the kind. They are imported when they are asked for: hf is large.
BACKBONES = {
    "hybrid": ("lmsleep.models.config:HybridConfig", "lmsleep.backbones.hybrid:Hybrid"),
    "hf": ("lmsleep.hf.finetune:FineTune", "lmsleep.hf.kind:Pretrained"),
}
BACKBONE = Plugin(
    what="backbone",
    noun="class",
    group="lmsleep.backbones",
    is_one=lambda x: isinstance(x, type) and is_dataclass(x) and callable(getattr(x, "build", None)),
    must_be="a dataclass (of options) with a method build(), see lmsleep.backbones.Kind",
)


def find_kind(name: str) -> Kind:
    """Find the kind that is listed in `BACKBONES`, called `FILE.py:CLASS`, or that of an entry point.

    Raises:
        ValueError: if there is none.
    """
    if name in BACKBONES:
        options, kind = map(_imported, BACKBONES[name])
        found: Kind = kind(name, options)
        return found
    # An absolute file name, for the name is kept in config.json and read from any folder.
    return Kind(absolute(name), BACKBONE.find(name, BACKBONES))


def kind_of(options: Any) -> Kind:
    """Return the kind of which `options` are.

    Raises:
        ValueError: if they are of none, or of one that no other process could find again.
    """
    cls = type(options)
    for name, (listed, _) in BACKBONES.items():
        # By name and not by class, which would import hf to say that a hybrid is no such model.
        if listed == f"{cls.__module__}:{cls.__qualname__}":
            return find_kind(name)
    if not BACKBONE.is_one(cls):
        raise ValueError(f"model: {cls.__name__} is no backbone: it must be {BACKBONE.must_be}")
    return Kind(BACKBONE.name_of(cls, {}), cls)


def kind_in(folder: Path) -> Kind:
    """Return the kind of the model that is saved in `folder`; a hybrid, where nothing says another.

    A GGUF file stands for the folder of a model of transformers.

    Raises:
        ValueError: if config.json names a kind that there is not.
    """
    found = _config(folder)
    # Of an adapter of `peft` alone the kind says what it lacks.
    if is_gguf(folder) or (not found and (folder / PEFT).is_file()):
        return find_kind("hf")
    # What the folder says of itself goes before what its fields look like.
    if KEY in found:
        return find_kind(str(found[KEY]))
    return next((kind for kind in map(find_kind, BACKBONES) if kind.recognises(found)), find_kind("hybrid"))


def from_dict(data: Mapping[str, Any]) -> Any:
    """Return the options that `Kind.to_dict` made `data` of.

    Raises:
        ValueError: for an unknown kind, or an unknown or invalid field.
    """
    old = "hf" if "folder" in data else "hybrid"  # older runs do not name the kind
    return find_kind(data.get(KEY, old)).from_dict(data)


def build(options: Any, *, bfloat16: bool = False) -> Model:
    """Make a model as it is before training; arguments and errors as for `Kind.build`."""
    return kind_of(options).build(options, bfloat16=bfloat16)


def load(options: Any, folder: Path, device: torch.device | str = "cpu", *, bfloat16: bool = False) -> Model:
    """Return the model that `Kind.save` wrote; errors as for `Kind.load`."""
    return kind_of(options).load(options, folder, device, bfloat16=bfloat16)


def _imported(name: str) -> Any:
    """Import `MODULE:ATTRIBUTE`."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def _config(folder: Path) -> dict[str, Any]:
    """Return what config.json holds; nothing if it is missing or damaged: loading the model says so."""
    try:
        found = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
