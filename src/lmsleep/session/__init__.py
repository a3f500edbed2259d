"""Sessions: read an unbounded stream with bounded memory, sleep, ask, save, go on tomorrow."""

from lmsleep.session.answer import Answer
from lmsleep.session.batch import SessionBatch
from lmsleep.session.distillation import Distillation, SlowWeights
from lmsleep.session.reading import read_files
from lmsleep.session.rows import BrokenSleep, Row, advance
from lmsleep.session.sampling import Sampling
from lmsleep.session.session import Session, Stats
from lmsleep.session.stream import Stream

__all__ = [
    "Answer",
    "BrokenSleep",
    "Distillation",
    "Row",
    "Sampling",
    "Session",
    "SessionBatch",
    "SlowWeights",
    "Stats",
    "Stream",
    "advance",
    "read_files",
]
