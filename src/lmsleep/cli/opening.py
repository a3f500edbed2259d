"""MODEL on the command line: a run (or a shipped one), a saved model, or a Hugging Face model."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from lmsleep import pretrained
from lmsleep.hf import adapt, load_pretrained
from lmsleep.hf.loading import has_tokenizer, is_pretrained
from lmsleep.models import HybridLM
from lmsleep.session import Session
from lmsleep.sleep import SleepConfig
from lmsleep.tasks import Text
from lmsleep.tasks.tokenizers import HuggingFace, Spelled, Tokenizer, load_tokenizer
from lmsleep.training import RunFolder, choose_device
from lmsleep.training.models import Model

GIVEN = ("window", "passes", "loop")  # options that a session which is taken up may not contradict


@dataclass(frozen=True, kw_only=True)
class SleepOptions:
    """Options of a new session; one that is taken up keeps its own."""

    window: int | None = None
    """L of a new session; default that of the run or folder, or 64 (512 for a Hugging Face model)."""
    passes: int | None = None
    """N of a new session; default that of the run or folder, or 4."""
    loop: tuple[int, int] | Literal["middle"] | None = None
    """Blocks first ... last - 1 that a new session loops, or the middle half; default that of the run or
    folder, or all (the middle half of a Hugging Face model)."""
    tokenizer: str | None = None
    """Of a saved model: bytes, or the folder of a Hugging Face tokenizer; default its own, or bytes."""
    device: str = "auto"
    """auto (CUDA where present), cpu, cuda, ..."""


class Opened(NamedTuple):
    """A model with how it sleeps and what it reads."""

    model: Model
    sleep: SleepConfig
    tokenizer: Tokenizer


def open_model(path: Path, tokenizer: str | None = None, device: str = "auto") -> Opened:
    """The MODEL at `path` or shipped under that name, with the sleep and the words that it was made with.

    Raises:
        ValueError: for a damaged run or model, one that cannot sleep, or a tokenizer with more tokens.
        FileNotFoundError: if there is none.
    """
    path = pretrained.find(path)
    read = _tokenizer(path, tokenizer)
    model, sleep = open_backbone(path, device)
    size = model.config.vocab_size
    if read.vocab_size > size:
        raise ValueError(
            f"tokenizer has {read.vocab_size} tokens, {path} only {size}; "
            "pass the run that trained the model, or its tokenizer"
        )
    return Opened(model, sleep, read)


def open_backbone(path: Path, device: str = "auto") -> tuple[Model, SleepConfig]:
    """`open_model` for who needs no words."""
    path, where = pretrained.find(path), choose_device(device)
    folder = RunFolder(path)
    if folder.is_run():
        return folder.model(where), folder.config().sleep
    if is_pretrained(path):
        model = load_pretrained(path).to(where)
        from lmsleep.hf.sleeping import saved_sleep  # which imports transformers

        told = saved_sleep(model.config, path)
        return adapt(model), told or SleepConfig(window=512, passes=4, loop="middle")
    return HybridLM.from_pretrained(path, where), SleepConfig(window=64, passes=4)


def _tokenizer(path: Path, given: str | None) -> Tokenizer:
    if (run := RunFolder(path)).is_run():
        task = run.config().task
        name = getattr(task, "tokenizer", None)
        if isinstance(task, Text) or name not in (None, "bytes", "words"):
            return load_tokenizer(str(name))
        return Spelled(task.spell, task.vocab_size)
    if is_pretrained(path) and given is None:
        if not has_tokenizer(path):
            raise ValueError(f"{path} holds no tokenizer; pass --tokenizer FOLDER (or bytes)")
        return HuggingFace(path)
    return load_tokenizer(given or "bytes")


def new_session(path: Path, options: SleepOptions) -> Session:
    """A session that has read nothing, for the MODEL at `path` or shipped under that name.

    Raises:
        ValueError: as `open_model`, or for a sleep that does not fit the model.
        FileNotFoundError: if there is none.
    """
    model, sleep, tokenizer = open_model(path, options.tokenizer, options.device)
    given = {name: getattr(options, name) for name in GIVEN}
    given = {name: value for name, value in given.items() if value is not None}
    return Session(model, replace(sleep, **given, backprop_passes=None), tokenizer)


def take_up(path: Path, new: Session, options: SleepOptions) -> Session:
    """The session or memory in a file, on the model of `new`.

    Raises:
        ValueError: as `Session.load`, or for options that contradict the file.
        OSError: if there is no such file.
    """
    session = Session.load(path, new.model, new.tokenizer, sleep=new.sleep_config)
    for name in GIVEN:
        wanted, has = getattr(options, name), getattr(session.sleep_config, name)
        if wanted not in (None, has):
            raise ValueError(f"{name}={wanted} contradicts {path}, which was read with {name}={has}")
    return session


def status(session: Session) -> str:
    """One line: window fill, tokens, sleeps, bytes."""
    s, window = session.stats, session.sleep_config.window
    return (
        f"window {s.window_tokens}/{window or '-'} · {s.tokens:,} tokens · {s.sleeps:,} sleeps · "
        f"working {s.working_bytes:,} B · fast weights {s.memory_bytes:,} B"
    )
