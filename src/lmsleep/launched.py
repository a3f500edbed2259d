"""What a launcher such as torchrun says of the process that it started, by the environment."""

import os


def launched() -> bool:
    """Say whether a launcher has started this process, as one of several or alone."""
    return "WORLD_SIZE" in os.environ or "RANK" in os.environ


def rank() -> int:
    """Return the number of this process among those that were started together; 0 if it is alone."""
    # A cluster may number a machine that runs one process: nobody else would speak or write for it.
    return _number("RANK") if several() else 0


def several() -> bool:
    """Say whether more than one process was started."""
    return _number("WORLD_SIZE") > 1


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else 0
