"""Recall: read real English, sleep on it, forget the text, and answer questions about it.

words    names, things, colors, cities, jobs     filler   sentences that tell nothing
planted  facts in several wordings, and questions about one or two of them
task     options and batches
"""

from lmsleep.tasks.recall.task import Recall

__all__ = ["Recall"]
