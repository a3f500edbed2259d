"""Tasks: seeded streams of batches with answers that can be checked.

A task is one file and one line of `TASKS`.
"""

from typing import Any

from lmsleep.tasks.base import Batch, Split, Task, hide_answers, stream
from lmsleep.tasks.depo import Depo
from lmsleep.tasks.gsm_infinite import GSMInfinite
from lmsleep.tasks.gsm_symbolic import GSMSymbolic
from lmsleep.tasks.mqar import MQAR
from lmsleep.tasks.rule110 import Rule110
from lmsleep.tasks.text import Text
from lmsleep.tasks.variables import Variables
from lmsleep.tasks.word_problem import WordProblem

TASKS: dict[str, type[Any]] = {
    "depo": Depo,
    "rule110": Rule110,
    "mqar": MQAR,
    "word-problem": WordProblem,
    "variables": Variables,
    "gsm-infinite": GSMInfinite,
    "gsm-symbolic": GSMSymbolic,
    "text": Text,
}

__all__ = [
    "MQAR",
    "TASKS",
    "Batch",
    "Depo",
    "GSMInfinite",
    "GSMSymbolic",
    "Rule110",
    "Split",
    "Task",
    "Text",
    "Variables",
    "WordProblem",
    "hide_answers",
    "stream",
]
