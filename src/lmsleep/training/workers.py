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
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
