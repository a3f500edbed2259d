"""Folders of adapters: what a model has beyond its base model, which stays where it is.

`config.json` names the base model and what is added to it, `adapter.safetensors` holds the numbers. A tensor
lies there as it is, or as two factors whose product is added to a tensor of the base: its own where the base
has one of that name (LoRA), or the one that it `inherits` (a memory layer that began as a copy of its
block's attention).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from lmsleep import shipped
from lmsleep.files import write_atomic
from lmsleep.foreign import read_json, reason
from lmsleep.hf import insertion
from lmsleep.memory import weights_fingerprint
from lmsleep.plain import check_values, from_plain

WEIGHTS, CONFIG = "adapter.safetensors", "config.json"
MARK, VERSION = "adapter", 1  # the field of config.json that says what it is, and of which form
LINK = "base"  # a link to the base model, or its folder, in that of the adapter: goes before its name
# Of the configuration of a base model, what an adapter changes.
SETTINGS = (insertion.FIELD, "total_ut_steps")
UP, DOWN = ".up", ".down"


@dataclass(frozen=True)
class BaseModel:
    """The model that an adapter belongs to.

    Attributes:
        name: of one that a package brings ("smollm2"), or the absolute path of a folder or file.
        model_type: its architecture.
        parameters: how many numbers its weights are.
        fingerprint: of its weights, as `weights_fingerprint` takes it.
    """

    name: str
    model_type: str
    parameters: int
    fingerprint: str

    @classmethod
    def of(cls, model: Any, name: str) -> "BaseModel":
        """Describe a model of `transformers`."""
        return cls(
            name, model.config.model_type, model.num_parameters(), weights_fingerprint(model.state_dict())
        )

    def __str__(self) -> str:
        return f"{self.name} ({self.model_type}, {self.parameters:,} parameters)"


@dataclass(frozen=True)
class Adapter:
    """What a model has beyond its base.

    Attributes:
        base: the model that it belongs to.
        settings: fields of the configuration that differ from the base's, those of `SETTINGS`.
        sleep: how the model sleeps, as `SleepConfig.to_dict` says it.
        eos_token_id: the token, or tokens, that end a text of the base, where sessions look for it.
        inherits: which tensor of the base a new one is a change of, by its name.
        tensors: by name, whole or as factors (`NAME.up` `[out, r]`, `NAME.down` `[r, in]`).
    """

    base: BaseModel
    settings: dict[str, Any]
    sleep: dict[str, Any]
    eos_token_id: int | list[int] | None
    inherits: dict[str, str]
    tensors: Mapping[str, Tensor]

    def write(self, folder: Path) -> None:
        """Write the two files into a folder that is there."""
        write_atomic(folder / WEIGHTS, save(dict(self.tensors), {"format": "pt"}))
        said = {
            "backbone": "hf",
            MARK: VERSION,
            "base": vars(self.base),
            **self.settings,
            "sleep": self.sleep,
            "eos_token_id": self.eos_token_id,
            "inherits": self.inherits,
        }
        write_atomic(folder / CONFIG, json.dumps(said, indent=2).encode())

    def check_base(self, model: Any, path: Path, folder: Path) -> None:
        """Refuse to be put on another model than the base.

        Args:
            model: that the adapter is to be put on.
            path: where it was loaded from.
            folder: of the adapter.

        Raises:
            ValueError: naming both.
        """
        found = BaseModel.of(model, str(path))
        if found.fingerprint == self.base.fingerprint:
            return
        alike = (found.model_type, found.parameters) == (self.base.model_type, self.base.parameters)
        raise ValueError(
            f"{folder} is an adapter of {self.base}, and {found} is another model"
            + (" with other weights" if alike else "")
        )

    @torch.no_grad()
    def put_on(self, model: Any, folder: Path) -> None:
        """Change the base model into the model that the adapter was saved from.

        Args:
            model: the base, changed in place.
            folder: of the adapter, for errors.

        Raises:
            ValueError: for an adapter that does not fit, naming the file.
        """
        file, config, before = folder / WEIGHTS, model.config.get_text_config(), set(model.state_dict())
        try:
            if memory := self.settings.get(insertion.FIELD):
                insertion.attach(model, memory)
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG}: {error}") from None
        for name, value in self.settings.items():
            setattr(config, name, value)
        model.config.sleep = self.sleep
        own = model.state_dict()  # which shares the model's memory
        held = {name.removesuffix(UP).removesuffix(DOWN) for name in self.tensors}
        if lost := sorted(own.keys() - before - held):
            raise ValueError(f"{file} lacks {lost[0]}, which {CONFIG} asks for")
        if strange := sorted(held - own.keys()):
            raise ValueError(f"{file} holds {strange[0]}, for which the model has no place")
        # What is new comes first: it is made of tensors as the base has them.
        for name in sorted(held, key=lambda name: (name in before, name)):
            origin = own.get(self.inherits.get(name, name))
            try:
                made = self._made(name, origin)
            except (RuntimeError, KeyError) as error:
                raise ValueError(f"{file}: {name} cannot be made ({reason(error)})") from None
            if made.shape != own[name].shape:
                shapes = f"{tuple(made.shape)} instead of {tuple(own[name].shape)}"
                raise ValueError(f"{file}: {name} has the shape {shapes}")
            own[name].copy_(made)

    def _made(self, name: str, origin: Tensor | None) -> Tensor:
        """Return a tensor: as it lies in the file, or `origin` changed by two factors."""
        if name in self.tensors:
            return self.tensors[name]
        if origin is None:
            raise KeyError(self.inherits[name])
        return changed(origin, self.tensors[name + UP], self.tensors[name + DOWN])


def changed(origin: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Return `origin + up @ down` in float32 or better."""
    wide = torch.promote_types(origin.dtype, torch.float32)
    return origin.to(wide) + up.to(origin.device, wide) @ down.to(origin.device, wide)


def is_adapter(folder: Path) -> bool:
    """Say whether a folder is that of an adapter."""
    if not (folder / CONFIG).is_file():
        return False
    try:
        return MARK in read_json(folder / CONFIG)
    except ValueError:  # whoever reads it as a model says so
        return False


def read(folder: Path) -> Adapter:
    """Read the adapter in a folder; its base is not looked for.

    Raises:
        FileNotFoundError: if its weights are missing.
        ValueError: naming the file, if it is damaged or of another form.
    """
    said, file = read_json(folder / CONFIG), folder / WEIGHTS
    if said.get(MARK) != VERSION:
        raise ValueError(
            f"{folder / CONFIG}: {MARK}={said.get(MARK)!r} is a form of adapter that this version of lmsleep "
            f"does not read (it reads {VERSION}); update it"
        )
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is an adapter without {WEIGHTS}; copy it again")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); copy it again") from error
    settings = {name: said[name] for name in SETTINGS if name in said}
    try:
        described = {name: said[name] for name in ("sleep", "eos_token_id", "inherits")}
        check_values(Adapter, described)
        return Adapter(from_plain(BaseModel, said["base"]), settings, **described, tensors=tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} is damaged ({reason(error)}); copy it again") from None


def base_of(folder: Path, given: str | Path | None = None) -> Path:
    """Find the base model of the adapter in a folder.

    Args:
        folder: of the adapter.
        given: another place, or the name of a model that a package brings; default the link or folder
            `base` in `folder`, or else what config.json names.

    Raises:
        FileNotFoundError: if it is not there, with a remedy.
        ValueError: if config.json is damaged, or the base is an adapter itself.
    """
    named = read_json(folder / CONFIG).get("base")
    if not isinstance(named, dict) or not isinstance(name := named.get("name"), str):
        raise ValueError(f"{folder / CONFIG} is damaged (it names no base model); copy it again")
    if given is None and (folder / LINK).exists():
        place = (folder / LINK).resolve()  # a file is told by its own name, not by that of a link
    else:
        try:
            place = shipped.find(name if given is None else given)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{folder} is an adapter of the model {name}, and {error}; get it, or link its folder (or "
                f"file) as {folder / LINK}"
            ) from None
    if is_adapter(place):
        raise ValueError(f"base={str(place)!r} is an adapter itself; name a whole model")
    return place


def whole(folder: Path) -> Path:
    """Return the folder of a model, or that of its base if it is an adapter; errors as of `base_of`."""
    return base_of(folder) if is_adapter(folder) else folder
