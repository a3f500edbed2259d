"""What training, opening and the commands ask of a kind of backbone, and the answers that fit most."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Protocol, Self, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lmsleep.files import write_atomic
from lmsleep.models.hybrid import load_weights
from lmsleep.plain import from_plain, to_plain
from lmsleep.sleep import Backbone, SleepConfig

WEIGHTS, CONFIG, KEY = "model.safetensors", "config.json", "backbone"
# A saved model does not say how it sleeps; this is the default of every command.
SLEEP = SleepConfig(window=64, passes=4)


class Model(Backbone, Protocol):
    """A backbone with weights that can be trained: a `torch.nn.Module` that offers `Backbone`."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks; Muon trains the matrices of linear layers inside them, AdamW all else."""
        ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """As of `torch.nn.Module`, like all below."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...  # noqa: D102

    def state_dict(self) -> dict[str, Tensor]: ...  # noqa: D102

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any: ...  # noqa: D102

    def train(self, mode: bool = True) -> Self: ...  # noqa: D102

    def eval(self) -> Self: ...  # noqa: D102

    def to(self, device: torch.device | str) -> Self: ...  # noqa: D102

    def requires_grad_(self, requires_grad: bool = True) -> Self: ...  # noqa: D102

    def zero_grad(self, set_to_none: bool = True) -> None: ...  # noqa: D102


class Kind:
    """A kind of backbone: a class of options, and what becomes of them.

    As it stands it serves a backbone of one's own, `FILE.py:CLASS`: a frozen dataclass of plain values whose
    method `build()` makes a `Model`. If it has a field `vocab_size`, the task decides it.

    Attributes:
        name: by which `find_kind` finds it again; it stands in config.json.
        options: the class of options.
    """

    def __init__(self, name: str, options: type[Any]) -> None:
        self.name, self.options = name, options

    def to_dict(self, options: Any) -> dict[str, Any]:
        """Return the options in JSON-ready form, with the name of the kind."""
        return {KEY: self.name, **to_plain(options)}

    def from_dict(self, data: Mapping[str, Any]) -> Any:
        """Return the options that `to_dict` made `data` of.

        Raises:
            ValueError: for an unknown or invalid field.
        """
        return from_plain(self.options, {k: v for k, v in data.items() if k != KEY})

    def fitted(self, options: Any, vocab_size: int) -> Any:
        """Return the options of a model for a task with so many tokens."""
        if not any(f.name == "vocab_size" for f in fields(options)) or options.vocab_size == vocab_size:
            return options
        return replace(options, vocab_size=vocab_size)

    def check(self, options: Any, sleep: SleepConfig) -> None:
        """Refuse a sleep that does not fit, before anything is built; most are refused by the model.

        Raises:
            ValueError: if it does not fit.
        """

    def check_start(self, options: Any, inserted: tuple[int, ...]) -> None:
        """Refuse to begin with the weights of another run or model.

        Raises:
            ValueError: if the kind cannot, or not with the `inserted` blocks.
        """
        raise ValueError(self._no_start())

    def check_keep(self, options: Any, sleep: SleepConfig) -> None:
        """Refuse to keep hidden states (`TrainConfig.keep`).

        Raises:
            ValueError: if some of them would change in training, or the kind cannot.
        """
        raise ValueError(self._no_keep())

    def keep(self, model: Model, folder: Path, *, bfloat16: bool) -> Model:
        """Return the same model, which keeps hidden states in `folder`.

        Raises:
            ValueError: if some of them would change, or the kind cannot.
        """
        raise ValueError(self._no_keep())

    def _no_keep(self) -> str:
        return f"keep is for memory layers of pretrained models, not for {self.name}"

    def _no_start(self) -> str:
        return f"start is for hybrid models, not for {self.name}"

    def build(self, options: Any, *, bfloat16: bool = False) -> Model:
        """Make a model as it is before training.

        Args:
            options: an instance of the class of options.
            bfloat16: it will run under autocast to bfloat16.

        Raises:
            FileNotFoundError: if it is made from a model that is not there.
            ValueError: if it cannot be made, or lacks something.
        """
        # What is built here is in float32, under any autocast.
        del bfloat16
        model: Any = options.build()
        # Asked for by name before the first use, so that a class of a user's hears of all it lacks at once.
        wanted = {name for cls in (Backbone, Model) for name in vars(cls) if not name.startswith("_")}
        missing = sorted(name for name in wanted if not hasattr(model, name))
        if not isinstance(model, nn.Module) or missing:
            lacks = f"it lacks {', '.join(missing)}" if missing else "it is no torch.nn.Module"
            raise ValueError(f"{self.name} builds no backbone: {lacks}, see lmsleep.backbones.Model")
        return model  # type: ignore[return-value]  # a module with all of that

    def take_weights(self, model: Model, source: Model, inserted: tuple[int, ...]) -> None:
        """Begin with the weights of `source`.

        Raises:
            ValueError: if they do not fit, or the kind cannot.
        """
        raise ValueError(self._no_start())

    def weights(self, model: Model) -> dict[str, Tensor]:
        """Return what a checkpoint must hold of the model, by name: tensors in the model's own memory."""
        return dict(model.state_dict())

    def save(self, model: Model, options: Any, folder: Path) -> None:
        """Write the weights that training changes into `folder`, made if missing, each file atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        # safetensors takes no views with strides, and a file should not say on which device it was trained.
        tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        write_atomic(folder / WEIGHTS, save(tensors, {"format": "pt"}))
        # Last: a folder with a config.json is one that can be loaded.
        write_atomic(folder / CONFIG, json.dumps(self.to_dict(options), indent=2).encode())

    def load(
        self, options: Any, folder: Path, device: torch.device | str = "cpu", *, bfloat16: bool = False
    ) -> Model:
        """Return the model that `save` wrote.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is damaged or of other options.
        """
        file = folder / WEIGHTS
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds no model: {WEIGHTS} is missing")
        model = self.build(options, bfloat16=bfloat16)
        try:
            weights = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or foreign: {error}") from error
        # A `Model` that can be built is a module.
        load_weights(cast(nn.Module, model), weights, f"{folder} holds weights of another configuration")
        return model.to(device)

    def recognises(self, found: Mapping[str, Any]) -> bool:
        """Say whether a folder whose config.json holds `found` and names no kind is one of a saved model."""
        return False

    def check_place(self, folder: Path) -> None:
        """Refuse a folder whose model cannot sleep, where that can be seen before its weights are read.

        Raises:
            ValueError: with the reason, and what can be done.
        """

    def open(self, folder: Path, device: torch.device | str) -> tuple[Model, SleepConfig]:
        """Return the model in a folder that is no run, and how it sleeps.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is damaged.
        """
        options = self.from_dict(json.loads((folder / CONFIG).read_text()))
        return self.load(options, folder, device), SLEEP

    def outline(self, folder: Path) -> tuple[Model, SleepConfig]:
        """Return what `open` does, for its shapes: on the device "meta", and of config.json alone.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is damaged.
        """
        file = folder / CONFIG
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds no model: {CONFIG} is missing")
        try:
            options = self.from_dict(json.loads(file.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} is not a lmsleep model: {error}") from error
        return self.shapes(options), SLEEP

    def shapes(self, options: Any) -> Model:
        """Return the model that `build` makes, on the device "meta", where it is made in no time.

        Raises:
            FileNotFoundError: if it is made from a model that is not there.
            ValueError: if it cannot be made, or lacks something.
        """
        with torch.device("meta"):
            return self.build(options)

    def tokenizer(self, folder: Path) -> str:
        """Return what `load_tokenizer` takes for the model in a folder that is no run.

        Raises:
            ValueError: if it has none.
        """
        return "bytes"

    def source(self, options: Any) -> Path | None:
        """Return the folder of the model that this one is made from; None for random weights."""
        return None

    def export(
        self, model: Model, options: Any, sleep: SleepConfig, folder: Path, about: Mapping[str, str]
    ) -> None:
        """Write a trained model in the format of others, where there is one; `about`: rows for its card."""
