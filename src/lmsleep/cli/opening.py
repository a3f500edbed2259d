"""MODEL on the command line: a run (or a shipped one), or a saved model, of lmsleep or of transformers."""

from dataclasses import dataclass, replace
from pathlib import Path

from lmsleep import pretrained
from lmsleep.hf import HFBackbone, adapt
from lmsleep.hf.loading import has_tokenizer, is_pretrained, load_pretrained
from lmsleep.models import HybridLM
from lmsleep.session import Session
from lmsleep.sleep import SleepConfig
from lmsleep.tasks import Task, Text
from lmsleep.tasks.tokenizers import Bytes, HuggingFace, Spelled, Tokenizer, load_tokenizer
from lmsleep.training import RunFolder


@dataclass(frozen=True, kw_only=True)
class SleepOptions:
    """Options of a new session; one that is taken up keeps its own."""

    window: int | None = None
    """L of a new session; default the run's, or 64."""
    passes: int | None = None
    """N of a new session; default the run's, or 4."""
    tokenizer: str = "bytes"
    """Of a model without its own: bytes, or the folder of a Hugging Face tokenizer."""


def new_session(path: Path, options: SleepOptions) -> Session:
    """A session that has read nothing, for the MODEL at `path` or shipped under that name.

    Raises:
        ValueError: for a damaged run or model, or a tokenizer with more tokens than the model.
        FileNotFoundError: if there is neither.
    """
    path = pretrained.find(path)
    folder = RunFolder(path)
    tokenizer: Tokenizer
    model: HybridLM | HFBackbone
    if (path / "config.json").is_file() and folder.config_is_run():
        config = folder.config()
        model, sleep, tokenizer = folder.model(), config.sleep, _tokenizer(config.task)
    elif is_pretrained(path):
        model, sleep = adapt(load_pretrained(path)), SleepConfig(window=64, passes=4)
        own = options.tokenizer == SleepOptions.tokenizer and has_tokenizer(path)
        tokenizer = HuggingFace(path) if own else load_tokenizer(options.tokenizer)
    else:
        model, sleep = HybridLM.from_pretrained(path), SleepConfig(window=64, passes=4)
        tokenizer = load_tokenizer(options.tokenizer)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"tokenizer has {tokenizer.vocab_size} tokens, {path} only {model.config.vocab_size}; "
            "pass the run that trained the model, or its tokenizer"
        )
    given = {name: getattr(options, name) for name in ("window", "passes")}
    given = {name: value for name, value in given.items() if value is not None}
    return Session(model, replace(sleep, **given, backprop_passes=None), tokenizer)


def take_up(path: Path, new: Session, options: SleepOptions) -> Session:
    """The session or memory in a file, on the model of `new`.

    Raises:
        ValueError: as `Session.load`, or for a window or passes that contradict the file.
        OSError: if there is no such file.
    """
    session = Session.load(path, new.model, new.tokenizer, sleep=new.sleep_config)
    for name in ("window", "passes"):
        wanted, has = getattr(options, name), getattr(session.sleep_config, name)
        if wanted not in (None, has):
            raise ValueError(f"{name}={wanted} contradicts {path}, which was read with {name}={has}")
    return session


def _tokenizer(task: Task) -> Tokenizer:
    return Bytes() if isinstance(task, Text) else Spelled(task.spell, task.vocab_size)


def status(session: Session) -> str:
    """One line: window fill, tokens, sleeps, bytes."""
    s, window = session.stats, session.sleep_config.window
    return (
        f"window {s.window_tokens}/{window or '-'} · {s.tokens:,} tokens · {s.sleeps:,} sleeps · "
        f"working {s.working_bytes:,} B · fast weights {s.memory_bytes:,} B"
    )
