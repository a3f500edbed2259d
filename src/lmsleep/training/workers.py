"""What every worker process does first."""

import multiprocessing
import os
import threading
from multiprocessing.connection import wait


def leave_with_parent() -> None:
    """Exit when the parent process is gone: a parent that was killed cannot stop its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "for worker processes"

    def watch() -> None:
        # The sentinel is readable once the parent has ended, however it did.
        wait([parent.sentinel])
        # sys.exit in a thread would end the thread alone.
        os._exit(1)

    # A daemon, so that it does not keep a worker that is done.
    threading.Thread(target=watch, daemon=True).start()
