"""Tasks: seeded streams of batches with answers that can be checked.

A task is one file and one line of `TASKS`; those of users are found by `lmsleep.tasks.own`.
"""

from typing import Any

from lmsleep.tasks.base import Batch, Task, batch_rng, hide_answers
from lmsleep.tasks.depo import Depo
from lmsleep.tasks.drift import Drift
from lmsleep.tasks.gsm_infinite import GSMInfinite
from lmsleep.tasks.gsm_symbolic import GSMSymbolic
from lmsleep.tasks.mqar import MQAR
from lmsleep.tasks.own import TASK, task_class
from lmsleep.tasks.recall import Recall
from lmsleep.tasks.rule110 import Rule110
from lmsleep.tasks.text import Text
from lmsleep.tasks.variables import Variables
from lmsleep.tasks.word_problem import WordProblem
from lmsleep.text import Split

TASKS: dict[str, type[Any]] = {
    "depo": Depo,
    "rule110": Rule110,
    "mqar": MQAR,
    "word-problem": WordProblem,
    "variables": Variables,
    "drift": Drift,
    "gsm-infinite": GSMInfinite,
    "gsm-symbolic": GSMSymbolic,
    "recall": Recall,
    "text": Text,
}


def find_task(name: str) -> type[Any]:
    """Find the class of a task: listed in `TASKS`, `FILE.py:CLASS`, or an entry point.

    Raises:
        ValueError: if there is none of that name.
    """
    return task_class(name, TASKS)


def task_name(task: Task) -> str:
    """Return the name by which `find_task` finds the class of a task."""
    return TASK.name_of(type(task), TASKS)


__all__ = [
    "MQAR",
    "TASKS",
    "Batch",
    "Depo",
    "Drift",
    "GSMInfinite",
    "GSMSymbolic",
    "Recall",
    "Rule110",
    "Split",
    "Task",
    "Text",
    "Variables",
    "WordProblem",
    "batch_rng",
    "find_task",
    "hide_answers",
    "task_name",
]
