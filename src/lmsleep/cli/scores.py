"""Scores in words, as `lmsleep train` and `lmsleep eval` print them."""

from lmsleep.tasks import Text
from lmsleep.text import Split


def floor_text(floors: dict[str, float], key: str) -> str:
    """Say the floors of one difficulty, to stand beside its accuracy."""
    own = [
        f"{name.removesuffix(key)}{floor:.3f}" for name, floor in floors.items() if name.endswith(f" {key}")
    ]
    return f" ({', '.join(own)})" if own else ""


def floors_text(floors: dict[str, float]) -> str:
    """Say the floors over all difficulties."""
    return ", ".join(f"{name} {value:.3f}" for name, value in floors.items() if "=" not in name)


def bits_text(task: Text, bits: float, split: Split = "test") -> str:
    """Say bits per token of a task on text, and per byte of what is held out."""
    if task.unit == "byte":
        return f"{bits:.4f} bits per byte"
    if split == "train":  # whose bytes per token were not counted
        return f"{bits:.4f} bits per token"
    # About: bytes per token are an average over the text.
    return f"{bits:.4f} bits per token (about {bits / task.bytes_per_token:.4f} per byte)"
