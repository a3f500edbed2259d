"""A model by one name: a run (or a shipped one), a saved model, or a Hugging Face model."""

from pathlib import Path
from typing import NamedTuple

from lmsleep import shipped
from lmsleep.hf import adapt, load_pretrained
from lmsleep.hf.loading import has_tokenizer, is_pretrained
from lmsleep.models import HybridLM
from lmsleep.sleep import SleepConfig
from lmsleep.tasks import Text
from lmsleep.text.tokenizers import HuggingFace, Spelled, Tokenizer, load_tokenizer
from lmsleep.training import RunConfig, RunFolder, choose_device
from lmsleep.training.models import Model


class Opened(NamedTuple):
    """A model with how it sleeps and what it reads."""

    model: Model
    sleep: SleepConfig
    tokenizer: Tokenizer


def open_model(path: str | Path, tokenizer: str | None = None, device: str = "auto") -> Opened:
    """Open a model to read, sleep and answer with: `model, sleep, tokenizer = lmsleep.open("depo-N4")`.

    Args:
        path: folder of a run, of `HybridLM.save_pretrained` or in the format of transformers, or the name of
            a model that is shipped (`lmsleep.shipped.names()`).
        tokenizer: "bytes", or the folder of a Hugging Face tokenizer; default that of the run or folder, or
            bytes.
        device: auto (CUDA where present), cpu, cuda, ...

    Returns:
        The model in evaluation mode, the sleep that it was made with, without what only training needs, and
        its tokenizer. A saved model does not say how it slept: it gets L = 64 and N = 4, one of transformers
        L = 512, N = 4 and a loop over the middle half of its blocks.

    Raises:
        ValueError: for a damaged run or model, one that cannot sleep, or a tokenizer with more tokens.
        FileNotFoundError: if there is none.
    """
    path = shipped.find(path)
    run = _run(path)
    read = _tokenizer(path, run, tokenizer)
    model, sleep = _backbone(path, run, device)
    size = model.vocab_size
    if read.vocab_size > size:
        raise ValueError(
            f"tokenizer has {read.vocab_size} tokens, {path} only {size}; "
            "pass the run that trained the model, or its tokenizer"
        )
    return Opened(model, sleep, read)


def open_backbone(path: str | Path, device: str = "auto") -> tuple[Model, SleepConfig]:
    """Open a model as `open_model` does, without a tokenizer."""
    path = shipped.find(path)
    return _backbone(path, _run(path), device)


def _run(path: Path) -> RunConfig | None:
    """The configuration of the run at `path`, if it is one."""
    folder = RunFolder(path)
    return folder.config() if folder.is_run() else None


def _backbone(path: Path, run: RunConfig | None, device: str) -> tuple[Model, SleepConfig]:
    where = choose_device(device)
    if run is not None:
        model = RunFolder(path).model(where, run)
        return model, run.sleep
    if is_pretrained(path):
        loaded = load_pretrained(path).to(where)
        from lmsleep.hf.sleeping import saved_sleep  # which imports transformers

        told = saved_sleep(loaded.config, path)
        return adapt(loaded).eval(), told or SleepConfig(window=512, passes=4, loop="middle")
    return HybridLM.from_pretrained(path, where).eval(), SleepConfig(window=64, passes=4)


def _tokenizer(path: Path, run: RunConfig | None, given: str | None) -> Tokenizer:
    if run is not None:
        name = getattr(run.task, "tokenizer", None)
        if isinstance(run.task, Text) or name not in (None, "bytes", "words"):
            return load_tokenizer(str(name))
        return Spelled(run.task.spell, run.task.vocab_size)
    if is_pretrained(path) and given is None:
        if not has_tokenizer(path):
            raise ValueError(f"{path} holds no tokenizer; pass --tokenizer FOLDER (or bytes)")
        return HuggingFace(path)
    return load_tokenizer(given or "bytes")
