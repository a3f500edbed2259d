"""Tasks of your own: a class in a Python file, or the entry point of an installed package."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from lmsleep.plugins import Plugin

TASK = Plugin(
    what="task",
    noun="class",
    group="lmsleep.tasks",
    is_one=lambda x: isinstance(x, type) and is_dataclass(x),
    must_be="a dataclass (of options), see lmsleep.tasks.Task",
)
MEMBERS = ("vocab_size", "difficulty_name", "batch", "floors", "solve", "spell")


def task_class(name: str, listed: Mapping[str, type[Any]]) -> type[Any]:
    """Find the task class that is `listed`, called `FILE.py:CLASS`, or an entry point of `lmsleep.tasks`.

    Raises:
        ValueError: if there is no such file, class or entry point, or it is no task.
    """
    cls: Any = TASK.find(name, listed)
    members = {*dir(cls), *cls.__dataclass_fields__}
    if missing := [member for member in MEMBERS if member not in members]:
        raise ValueError(f"{name} is no task: it lacks {', '.join(missing)}, see lmsleep.tasks.Task")
    return cls
