"""Runs that are shipped with the package, two tiny ones; README.md beside this file is their data card."""

from pathlib import Path

HERE = Path(__file__).parent
# A cycle as shuffled edges, and where three steps lead: what both runs were trained on.
EXAMPLE = "n8 n4 n7 n8 n2 n5 n5 n1 n1 n6 n4 n3 n3 n2 n6 n7 HOP_3 n1"


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
