"""Recall: read real English, sleep on it, forget the text, and answer questions about it.

words      names, things, colors, cities, jobs      filler   sentences that tell nothing
planted    facts in several wordings, and questions about one or two of them
documents  passages of documentation, and questions made by rule
task       options and batches; problems are those of `gsm_infinite`
"""

from lmsleep.tasks.recall.task import Recall

__all__ = ["Recall"]
