"""Tasks of your own: a class in a Python file, or the entry point of an installed package."""

from collections.abc import Iterable
from dataclasses import is_dataclass
from typing import Any

from lmsleep.plugins import Plugin

TASK = Plugin("task", "class", "lmsleep.tasks", lambda x: isinstance(x, type) and is_dataclass(x))
MEMBERS = ("vocab_size", "difficulty_name", "batch", "floors", "solve", "spell")


def own_task(name: str, listed: Iterable[str] = ()) -> type[Any]:
    """The task class called `FILE.py:CLASS`, or that of the entry point `name` in group `lmsleep.tasks`.

    Errors name the `listed` tasks too.

    Raises:
        ValueError: if there is no such file, class or entry point, or it is no task.
    """
    cls: Any = TASK.find(name, listed)
    if not TASK.is_one(cls):
        raise ValueError(f"{name} is no task: it must be a dataclass (of options), see lmsleep.tasks.Task")
    members = {*dir(cls), *cls.__dataclass_fields__}
    if missing := [member for member in MEMBERS if member not in members]:
        raise ValueError(f"{name} is no task: it lacks {', '.join(missing)}, see lmsleep.tasks.Task")
    return cls
