"""A command in several processes: one of them speaks, and errors are said once."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from lmsleep.launched import launched, rank, several

COMMANDS = ("train", "finetune", "eval", "reproduce")
ASKING = 5  # seconds to ask the launcher who says it


@dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """For several processes: torchrun --standalone --nproc-per-node=K -m lmsleep ...; see docs/scale.md."""

    shard: int = 1
    """Processes that share one copy of parameters, gradients and optimizer states, for models that do not fit
    into one GPU; it must divide their number. 1: each has its own."""
    patience: int = 600
    """Seconds that one waits for another before the run ends, to be resumed."""


def check(command: str) -> None:
    """Refuse a command that would be done once by each of several processes.

    Raises:
        ValueError: if it is one.
    """
    if several() and command not in COMMANDS:
        raise ValueError(
            f"lmsleep {command} runs in one process: leave out torchrun ({', '.join(COMMANDS)} take several)"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Let the first process alone write to the standard streams; entered before torch is imported."""
    if several():
        # Where another process is lost, PyTorch prints dozens of lines of its own stack beside our one.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    if not rank():
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def leave() -> None:
    """Leave the other processes, if there are any, at the end of a command."""
    if launched():
        from lmsleep.training import Processes  # which is there by now

        Processes.leave()


def first_to_say(message: str) -> bool:
    """Say whether nobody else says it: most errors are those of all, and some of one alone."""
    if not several():
        return True
    # Of another attempt of the launcher it is said anew.
    key = hashlib.sha256(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT')} {message}".encode()).hexdigest()
    try:
        # Only now: it takes seconds.
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        # The launcher's, which outlives this process.
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(*where, is_master=False, timeout=timedelta(seconds=ASKING))
        return store.add(f"lmsleep/said/{key}", 1) == 1
    # There is none, or it has gone: better said twice than not at all.
    except Exception:
        return True
