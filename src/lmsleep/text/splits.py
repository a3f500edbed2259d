"""Which names stand for what is trained on, and which for what is held out."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

Split = Literal["train", "test"]

HELD_OUT = {
    "test", "testing", "validation", "validate", "valid", "val", "dev", "development", "eval", "evaluation",
    "held", "heldout", "hold", "holdout",
}  # fmt: skip
TRAINED = {"train", "training"}


def split_of(name: str) -> Split | None:
    """Return the split that a name speaks of: train, train_sft, trainset; test.clean, val-0000; else None."""
    # Also words that run into each other: testSet. Digits separate: dev2.
    words = {word.lower().removesuffix("set") for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}
    # A name that speaks of both must not be trained on.
    return "test" if words & HELD_OUT else "train" if words & TRAINED else None


def splits_of(names: Iterable[str]) -> dict[str, Split]:
    """Return the splits of the names that speak of one, if among all there are both; or else nothing."""
    found = {name: split for name in names if (split := split_of(name)) is not None}
    return found if len({*found.values()}) == 2 else {}


def splits_of_paths(paths: Sequence[Path]) -> dict[Path, Split]:
    """Do the same for files, by their names or the folders in which they differ: train/a.txt, test/a.txt."""
    absolute = {path: path.absolute() for path in paths}
    common = os.path.commonpath([path.parent for path in absolute.values()])
    found: dict[Path, Split] = {}
    for path, whole in absolute.items():
        # The last part that speaks of a split: the name before its folder.
        for part in reversed(whole.relative_to(common).parts):
            if (split := split_of(part)) is not None:
                found[path] = split
                break
    return found if len({*found.values()}) == 2 else {}
