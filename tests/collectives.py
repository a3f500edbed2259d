"""Counts what processes say to each other."""

from collections import Counter

from benchmarks.processes import Sent


class Collectives(Sent):
    """Counts the collectives that this process takes part in, by name."""

    @property
    def counts(self):
        return Counter(name for name, _ in self.found)
