"""What every worker process does first, and what it may hear meanwhile."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.resource_tracker import ensure_running


@contextmanager
def begun_deaf() -> Iterator[None]:
    """Begin processes here: Ctrl-C, which a terminal sends to all, must not break off their imports.

    They inherit what is blocked, until `leave_with_parent`; this process hears of it afterwards.
    """
    # The first process would start it, and it unblocks the signal.
    ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_with_parent(*ignored: int) -> None:
    """Ignore signals, and exit when the parent is gone: one that was killed cannot stop its workers."""
    for signum in ignored:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    assert parent is not None, "for worker processes"

    def watch() -> None:
        # The sentinel is readable once the parent has ended, however it did.
        wait([parent.sentinel])
        # sys.exit in a thread would end the thread alone.
        os._exit(1)

    # A daemon, so that it does not keep a worker that is done.
    threading.Thread(target=watch, daemon=True).start()
