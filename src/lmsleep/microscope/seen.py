"""What the microscope saw, as plain data: the ground that its figures, sentences and pages stand on."""

from dataclasses import asdict, dataclass, field
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Seen:
    """The tables of an inspection. Each is a list of flat rows, ready for a data frame."""

    about: dict[str, Any]
    """What was looked at: model, window, method, passes, tokens, hashes of the slow weights before, after."""
    layers: list[Row]
    """Working, fast and slow memory: bytes of each a sequence, what an eviction keeps, what writes."""
    change: list[Row]
    """What each sleep did to all fast weights together: see `change_row`."""
    heads: list[Row]
    """Figures per window, pass, block and head: see `heads.head_rows`."""
    hypnogram: list[Row]
    """Window fill, pass and norm along the stream: see `heads.hypnogram_rows`."""
    readback: list[Row]
    """What each token of the last windows can still be retrieved by: see `readback.readback_rows`."""
    probe: list[Row]
    """Accuracy of linear probes per window, pass and steps: see `probe.probe_rows`."""
    reliance: list[Row]
    """Answers from the memory, and from other ways to keep the text: see `ablation.reliance_rows`."""
    ablation: list[Row]
    """Answers without a head, or with another sequence's: see `ablation.ablation_rows`."""
    notes: list[str] = field(default_factory=list)
    """What could not be looked at, and why."""

    def to_dict(self) -> dict[str, Any]:
        """Return the tables in a form that JSON takes."""
        return asdict(self)
