"""Open a model by one name: a run (or a shipped one), a saved model, or a Hugging Face model."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lmsleep import shipped
from lmsleep.backbones import Model, kind_in, kind_of
from lmsleep.sleep import SleepConfig
from lmsleep.tasks import Text
from lmsleep.text.tokenizers import HuggingFace, Spelled, Tokenizer, load_tokenizer
from lmsleep.training import RunConfig, RunFolder, choose_device


class Opened(NamedTuple):
    """A model with how it sleeps and what it reads."""

    model: Model
    sleep: SleepConfig
    tokenizer: Tokenizer


def open_model(
    path: str | Path,
    tokenizer: str | None = None,
    device: str = "auto",
    *,
    trust: bool = False,
    attention_alone: bool = False,
) -> Opened:
    """Open a model to read, sleep and answer with: `model, sleep, tokenizer = lmsleep.open("depo-N4")`.

    Args:
        path: folder of a run, of a saved model (of `HybridLM.save_pretrained`, or of a backbone of one's own)
            or in the format of transformers, an adapter, a GGUF file, or the name of one that is shipped
            (`lmsleep.shipped.names()`).
        tokenizer: "bytes", or the folder of a Hugging Face tokenizer; default that of the folder, or bytes.
            A run has its own.
        device: auto (CUDA where present), cpu, cuda, ...
        trust: run the Python files that the run or model names, though you have trained no run with them.
        attention_alone: open a model of transformers without fast weights too, for an eviction that keeps
            something (`Compact`).

    Returns:
        The model in evaluation mode, the sleep that it was made with, without what only training needs, and
        its tokenizer. A saved model does not say how it slept: it gets L = 64 and N = 4, one of transformers
        L = 512, N = 4 and a loop over the middle half of its blocks.

    Raises:
        ValueError: for a damaged run or model, one that cannot sleep, or a tokenizer with more tokens.
        PermissionError: if it names code that may not run.
        FileNotFoundError: if there is none.
    """
    place = find(path, trust=trust, attention_alone=attention_alone)
    read = place.tokenizer(tokenizer)  # before the weights: a wrong name should fail at once
    model, sleep = place.backbone(device)
    # Fewer tokens than the model has are fine. Published tokenizers may have more: such as no text holds, or
    # as a session refuses when it meets them.
    if not isinstance(read, HuggingFace) and read.vocab_size > model.vocab_size:
        raise ValueError(
            f"tokenizer has {read.vocab_size} tokens, {place.path} only {model.vocab_size}; "
            "pass the run that trained the model, or its tokenizer"
        )
    return Opened(model, sleep, read)


def open_backbone(
    path: str | Path, device: str = "auto", *, trust: bool = False
) -> tuple[Model, SleepConfig]:
    """Open a model as `open_model` does, without a tokenizer."""
    return find(path, trust=trust).backbone(device)


@dataclass(frozen=True)
class Place:
    """A folder with a model.

    Attributes:
        path: the folder.
        run: what it was trained by, if it is a run.
        trust: the Python files that it names may run.
    """

    path: Path
    run: RunConfig | None
    trust: bool = False

    def outline(self) -> tuple[Model, SleepConfig]:
        """Return the model, for its shapes, and how it sleeps; no checkpoint is needed.

        It lies on the device "meta", or where its kind can do no better, on the CPU.

        Raises:
            ValueError: for a damaged model, or one that cannot sleep.
            FileNotFoundError: if there is none.
        """
        if self.run is not None:
            return kind_of(self.run.model).shapes(self.run.model).eval(), self.run.sleep
        with self.folder.naming_code():
            model, sleep = kind_in(self.path).outline(self.path)
        return model.eval(), sleep

    def backbone(self, device: str = "auto") -> tuple[Model, SleepConfig]:
        """Return the model in evaluation mode, and how it sleeps.

        Args:
            device: auto (CUDA where present), cpu, cuda, ...

        Raises:
            ValueError: for a damaged model, or one that cannot sleep.
            FileNotFoundError: if there is none.
        """
        where = choose_device(device)
        if self.run is None:
            with self.folder.naming_code():
                model, sleep = kind_in(self.path).open(self.path, where)
            return model.eval(), sleep
        return self.folder.model(where, self.run), self.run.sleep

    @property
    def folder(self) -> RunFolder:
        """The folder as that of a run."""
        return RunFolder(self.path, trust=self.trust)

    def tokenizer(self, given: str | None = None) -> Tokenizer:
        """Return the tokenizer of the run, or of the folder unless another one is `given`.

        Raises:
            ValueError: if there is none, or another one is given for a run.
        """
        if self.run is None:
            return load_tokenizer(given or self.tokenizer_name(), self.path)
        name = getattr(self.run.task, "tokenizer", None)
        if given not in (None, name):
            raise ValueError(
                f"tokenizer={given!r}: the run {self.path} has its own, {name or 'its task'}; leave it out"
            )
        if isinstance(self.run.task, Text) or name not in (None, "bytes", "words"):
            return load_tokenizer(str(name))
        return Spelled(self.run.task.spell, self.run.task.vocab_size)

    def tokenizer_name(self) -> str:
        """Return the tokenizer of a folder that is no run, as `load_tokenizer` takes it."""
        with self.folder.naming_code():
            return kind_in(self.path).tokenizer(self.path)


def find(path: str | Path, *, trust: bool = False, attention_alone: bool = False) -> Place:
    """Find the run or model at `path`, or the one that is shipped under that name; options: see `open_model`.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: for a damaged run, or a model that is seen to have no fast weights.
        PermissionError: if it names code that may not run.
    """
    path = shipped.find(path)
    folder = RunFolder(path, trust=trust)
    if folder.is_run():
        return Place(path, folder.config(), trust)
    if not attention_alone:
        with folder.naming_code():
            kind_in(path).check_place(path)
    return Place(path, None, trust)
