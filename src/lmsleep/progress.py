"""Progress bars; where no bar can be drawn, as lines at intervals."""

import os
import sys
from typing import Any, TextIO

from tqdm import tqdm

from lmsleep.launched import rank

EVERY = 10.0  # seconds between lines


class _Lines:
    """A stream that makes a line of every drawing of a bar, which otherwise overwrite each other."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, drawing: str) -> None:
        """Write what is seen of it."""
        # tqdm writes a carriage return before each drawing, and blanks to wipe one out.
        if seen := drawing.strip():
            self._stream.write(f"{seen}\n")

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()


def progress(*, show: bool = True, **options: Any) -> Any:
    """Make a bar of tqdm on standard error, with tqdm's options; without `show` one that is never seen.

    Where standard error is a file or a pipe, or a terminal on which nothing can be drawn over, it is a line
    every `EVERY` seconds, and none before. Of several processes the first alone draws.
    """
    show = show and not rank()
    if not show or _draws(sys.stderr):
        return tqdm(**options, disable=not show)
    # miniters=1: tqdm would adapt it to the speed and skip lines. leave=False: no last line said twice.
    lines = {"mininterval": EVERY, "delay": EVERY, "miniters": 1, "ncols": 100, "leave": False, "position": 0}
    # ASCII, for a log may be read in any encoding.
    return tqdm(**{**options, **lines}, file=_Lines(sys.stderr), ascii=True)


def _draws(stream: TextIO) -> bool:
    """Say whether a stream is a terminal that has a width and can move its cursor back."""
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return False
    # Pseudo-terminals of CI systems and of `script` have no size: tqdm would draw bars of no character.
    return os.get_terminal_size(stream.fileno()).columns > 0
