"""The microscope: what a sleep writes, what of it can be read, and what depends on it."""

from lmsleep.microscope.inspection import Inspection, inspect
from lmsleep.microscope.trace import Pass, Window, watch

__all__ = ["Inspection", "Pass", "Window", "inspect", "watch"]
