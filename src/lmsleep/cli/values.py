"""KEY=VALUE on the command line."""

import ast
import json
import re
from collections.abc import Sequence
from typing import Any


def pairs(flag: str, words: Sequence[str]) -> dict[str, Any]:
    """Read `KEY=VALUE`, also several with commas between them, or JSON objects.

    Raises:
        ValueError: naming the flag, for what is neither.
    """
    found: dict[str, Any] = {}
    for word in words:
        if word.lstrip().startswith("{"):
            try:
                found.update(json.loads(word))
            except ValueError as error:
                raise ValueError(f"{flag}={word}: no JSON ({error})") from None
            continue
        # A comma within a list has no KEY= after it.
        for pair in re.split(r",(?=\w+=)", word):
            name, sign, text = pair.partition("=")
            if not (name and sign):
                raise ValueError(f"{flag}={pair!r} is neither KEY=VALUE nor a JSON object")
            if name in found:
                raise ValueError(f"{flag}: {name} is given twice; give it once")
            found[name] = _value(text)
    return found


def _value(text: str) -> Any:
    """Read a value as JSON or Python has it; what is neither is a text."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return text
