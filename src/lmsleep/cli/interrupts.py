"""What Ctrl-C does to a command: it leaves at once while modules are imported, then it is an exception."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lmsleep.launched import rank

CODE = 128 + signal.SIGINT  # what a shell says of a process that a signal ended
SAID = "interrupted"


def leave_at_once(*_: object) -> None:
    """Say so and end the process: nothing could be lost, and an exception may be printed or turned."""
    # Ctrl-C reaches all processes that torchrun has started; one says it.
    if not rank():
        os.write(2, f"lmsleep: {SAID}\n".encode())
    os._exit(CODE)


def own_process() -> None:
    """Let Ctrl-C end this process at once, but for what runs in `noted`."""
    if _is_ours():
        signal.signal(signal.SIGINT, leave_at_once)


@contextmanager
def noted() -> Iterator[list[int]]:
    """Let Ctrl-C raise KeyboardInterrupt, and yield a list that says whether it has.

    Imports within a command may turn the exception into another one.
    """
    caught: list[int] = []

    def note(signum: int, _: object) -> None:
        caught.append(signum)
        raise KeyboardInterrupt

    if not _is_ours():
        yield caught
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)


def _is_ours() -> bool:
    """Say whether Ctrl-C may be handled here: it may be ignored (by nohup), or be somebody else's."""
    # Signals are set in the main thread alone.
    if threading.current_thread() is not threading.main_thread():
        return False
    return signal.getsignal(signal.SIGINT) in (signal.default_int_handler, leave_at_once)
