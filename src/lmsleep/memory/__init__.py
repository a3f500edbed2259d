"""Memories on disk: which model wrote them, the format of their files, what the files say."""

from lmsleep.memory.identity import fingerprint, model_identity, weights_fingerprint
from lmsleep.memory.saved import Saved, read, write

__all__ = ["Saved", "fingerprint", "model_identity", "read", "weights_fingerprint", "write"]
