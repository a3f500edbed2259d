"""Tasks: seeded streams of batches with answers that can be checked.

A task is one file and one line of `TASKS`.
"""

from lmsleep.tasks.base import Batch, Split, Task, stream
from lmsleep.tasks.depo import Depo
from lmsleep.tasks.rule110 import Rule110
from lmsleep.tasks.text import Text

TASKS: dict[str, type[Depo] | type[Rule110] | type[Text]] = {
    "depo": Depo,
    "rule110": Rule110,
    "text": Text,
}

__all__ = ["TASKS", "Batch", "Depo", "Rule110", "Split", "Task", "Text", "stream"]
