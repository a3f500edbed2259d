"""The `lmsleep` command."""

from lmsleep.cli.main import main

__all__ = ["main"]
