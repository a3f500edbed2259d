"""Sessions: read an unbounded stream with bounded memory, sleep, ask, save, go on tomorrow."""

from lmsleep.session.answer import Answer
from lmsleep.session.sampling import Sampling
from lmsleep.session.session import BrokenSleep, Session, SessionBatch, Stats
from lmsleep.session.stream import Stream

__all__ = ["Answer", "BrokenSleep", "Sampling", "Session", "SessionBatch", "Stats", "Stream"]
