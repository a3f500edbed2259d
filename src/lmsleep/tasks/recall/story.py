"""What is read, and what is asked about it."""

from typing import NamedTuple


class Question(NamedTuple):
    """A question, the answer that follows it, and among how many candidates in the text that is."""

    kind: str
    text: str
    answer: str
    candidates: int


class Story(NamedTuple):
    """A text to be read and evicted, and questions about it."""

    text: str
    questions: list[Question]
