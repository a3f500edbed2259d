"""Runs that are shipped with the package, two tiny ones; README.md beside this file is their data card."""

from pathlib import Path

HERE = Path(__file__).parent


def names() -> list[str]:
    """Of the shipped runs."""
    return sorted(path.parent.name for path in HERE.glob("*/config.json"))


def find(path: str | Path) -> Path:
    """The folder at `path`; where there is none, the shipped run of that name.

    Raises:
        FileNotFoundError: if there is neither.
    """
    path = Path(path)
    if path.exists():
        return path
    if str(path) not in names():
        raise FileNotFoundError(f"there is no folder {path}; models that are shipped: {', '.join(names())}")
    return HERE / path
