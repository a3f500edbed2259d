"""Text: tokenizers, sets of documents, and the batches that documents are packed into."""

from lmsleep.text.splits import Split

__all__ = ["Split"]
