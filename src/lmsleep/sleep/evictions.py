"""The evictions by name; one's own comes as `FILE.py:CLASS` or as an entry point."""

from lmsleep.plugins import Plugin, derives_from
from lmsleep.sleep.compact import Compact
from lmsleep.sleep.eviction import Eviction, Hard, Sliding

EVICTIONS: dict[str, type[Eviction]] = {"hard": Hard, "sliding": Sliding, "compact": Compact}

EVICTION = Plugin(
    what="eviction",
    noun="class",
    group="lmsleep.evictions",
    is_one=derives_from(Eviction),
    must_be="a dataclass (of options) with all methods of lmsleep.Eviction",
)
