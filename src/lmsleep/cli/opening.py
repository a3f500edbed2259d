"""MODEL on the command line, with options of a new session."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmsleep.cli.methods import MethodOptions
from lmsleep.opening import Opened, open_model
from lmsleep.session import Session, saving
from lmsleep.sleep import SleepConfig


@dataclass(frozen=True, kw_only=True)
class SleepOptions(MethodOptions):
    """Options of a new session; one that is taken up keeps its own."""

    window: int | None = None
    """L of a new session; default that of the run or folder, or 64 (512 for a Hugging Face model)."""
    passes: int | None = None
    """N of a new session; default that of the run or folder, or 4."""
    tokenizer: str | None = None
    """Of a saved model: bytes, or the folder of a Hugging Face tokenizer; default its own, or bytes. A run
    has its own."""
    device: str = "auto"
    """auto (CUDA where present), cpu, cuda, ..."""
    trust: bool = False
    """Run the Python files that the run or model names, though you have trained no run with them."""


def opened(
    path: Path, options: SleepOptions, *, memory: Path | None = None, attention_alone: bool = False
) -> Opened:
    """Open the MODEL at `path`, or shipped under that name, with the sleep that a new session would have.

    Args:
        path: of the model.
        options: of the session.
        memory: the file that will be taken up, if there is one: what it keeps may need no fast weights.
        attention_alone: fast weights are not needed at all.

    Raises:
        ValueError: as `open_model`, or for options that cannot be.
        FileNotFoundError: if there is none.
    """
    keeps = memory is not None and saving.methods(memory).get("eviction", "hard") != "hard"
    model, sleep, tokenizer = open_model(
        path,
        options.tokenizer,
        options.device,
        trust=options.trust,
        attention_alone=attention_alone or keeps or options.leaves_some,
    )
    return Opened(model, options.over(sleep, options.passes), tokenizer)


def new_session(path: Path, options: SleepOptions) -> Session:
    """Make a session that has read nothing; errors as `open_session`."""
    return Session(*opened(path, options), history=0)


def open_session(
    path: Path,
    options: SleepOptions,
    memory: Path | None,
    *,
    history: int = 0,
    attention_alone: bool = False,
) -> Session:
    """Take up what a memory file holds, or without one make a new session.

    `history` calls can be taken back; a command has no use for it unless it offers to. Errors are those of
    `opened` and `take_up`, and of a sleep that does not fit.
    """
    on = opened(path, options, memory=memory, attention_alone=attention_alone)
    return Session(*on, history=history) if memory is None else take_up(memory, on, options, history=history)


def take_up(path: Path, on: Opened, options: SleepOptions, *, history: int = 0) -> Session:
    """Take up the session or memory in a file, on the model that wrote it.

    Raises:
        ValueError: as `Session.load`, or for options that contradict the file.
        OSError: if there is no such file.
    """
    # A file knows how it was read; options may repeat it, and must not contradict it. The sleep of the model
    # is for a file that does not say it, and names the code that one may run.
    other = saving.methods(path).items() - SleepConfig.names(on.sleep.to_dict()).items()
    sleep = None if other else on.sleep
    session = Session.load(path, on.model, on.tokenizer, sleep=sleep, history=history)
    has = _flat(session.sleep_config)
    for name, wanted in _flat(options.over(session.sleep_config, options.passes)).items():
        if wanted != has.get(name, wanted):
            raise ValueError(
                f"{name}={wanted} contradicts {path}, which was read with {name}={has[name]}; leave it out"
            )
    return session


def _flat(sleep: SleepConfig) -> dict[str, Any]:
    """Return what a sleep is, by the flags and options that say it; the methods first."""
    by, kept = (dict(sleep.to_dict()[choice]) for choice in ("consolidator", "eviction"))
    return {"sleep": by.pop("name"), "eviction": kept.pop("name"), "window": sleep.window, **by, **kept}


def status(session: Session) -> str:
    """Return one line: window fill, tokens, sleeps, bytes."""
    s, window = session.stats, session.sleep_config.window
    return (
        f"window {s.window_tokens}/{window or '-'} · {s.tokens:,} tokens · {s.sleeps:,} sleeps · "
        f"working {s.working_bytes:,} B · fast weights {s.memory_bytes:,} B"
    )
