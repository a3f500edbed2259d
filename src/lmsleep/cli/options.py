"""What commands that take a task have in common."""

from typing import Any

import tyro

from lmsleep.tasks import TASKS, find_task

FLAT = (tyro.conf.OmitArgPrefixes, tyro.conf.SuppressFixed)


def listed(docstrings: dict[str, str | None]) -> str:
    """Names with the first line of what is said about them."""
    return "\n".join(f"  {name:<20} {(text or '').splitlines()[0]}" for name, text in docstrings.items())


def listed_tasks() -> str:
    """The tasks with the first lines of their docstrings, and how to name one's own."""
    tasks = {name: task.__doc__ for name, task in TASKS.items()}
    return listed({**tasks, "FILE.py:CLASS": "A task of your own (docs/architecture.md), or an entry point."})


def task_field(task: str, sections: dict[str, Any]) -> Any:
    """The field of an options class that holds the task, with the preset's as default."""
    return ("task", find_task(task), *([sections["task"]] if "task" in sections else []))
