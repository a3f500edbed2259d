"""Folders in the format of `transformers`, which others wrote: read in silence, and refused in one line."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

PEFT = "adapter_config.json"  # in the folder of an adapter of `peft`
LONGEST = 300  # characters of a reason; transformers lists all it knows in some
# What the user or the machine does, and no file: it is handed on as it is.
NOT_OF_FILES = (KeyboardInterrupt, SystemExit, GeneratorExit, torch.OutOfMemoryError)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Let `transformers` read a folder, without its warnings: what is wrong ends in an error.

    Args:
        what: is read: the beginning of the error.

    Raises:
        ValueError: for whatever is raised within, in one line.
    """
    with _quiet():
        try:
            yield
        except NOT_OF_FILES:
            raise
        except BaseException as error:  # a panic within `tokenizers` is no Exception
            raise ValueError(f"{what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Say an error in one line of bounded length, with its class where the text alone may say little."""
    text = " ".join(str(error).split())
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    return text if text and isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"


def read_json(file: Path) -> dict[str, Any]:
    """Read the fields of a JSON object.

    Raises:
        ValueError: naming the file, if it holds none.
        OSError: if there is no such file.
    """
    try:
        fields = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON ({reason(error)}); copy it again") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{file} is no JSON object; copy it again")
    return fields


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence `transformers`; show its bars only on a terminal."""
    from transformers.utils import logging

    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()
