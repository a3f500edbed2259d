"""Conversations as tokens: by the template of a tokenizer, or a message a line where it has none."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from lmsleep.text.tokenizers import HuggingFace, Spelled, Tokenizer, begun

MARK = "\u2042lmsleep\u2042"  # stands for an answer where only what follows it is wanted


class Message(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str


class Chat(Protocol):
    """Turns messages into what a model reads before it answers."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end an answer, beside the ends that its tokenizer knows."""
        ...

    @property
    def opening(self) -> int:
        """Count the tokens at the end of a prompt that announce the answer and are no message; at least 1."""
        ...

    def begin(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a conversation up to where the next answer begins."""
        ...

    def go_on(self, messages: Sequence[Message], last: int | None) -> list[int]:
        """Return the tokens that follow an answer, up to where the next one begins.

        `last` is the last token that was read of the conversation; None: nothing was.
        """
        ...


class Lines:
    """A message is a line, whoever wrote it, and so is an answer; of a task it is just its words."""

    opening = 1

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.end = "" if isinstance(tokenizer, Spelled) else "\n"
        self.stop = (self.end,) if self.end else ()

    def begin(self, messages: Sequence[Message]) -> list[int]:
        """See `Chat.begin`."""
        return begun(self.tokenizer, self._text(messages))

    def go_on(self, messages: Sequence[Message], last: int | None) -> list[int]:
        """See `Chat.go_on`."""
        # An answer that ended its line did so itself; one that was cut off did not.
        ended = not self.end or last is None or last in self.tokenizer.encode(self.end)
        return self.tokenizer.encode(("" if ended else self.end) + self._text(messages))

    def _text(self, messages: Sequence[Message]) -> str:
        return "".join(f"{message.content}{self.end}" for message in messages)


class Templated:
    """The template that a Hugging Face tokenizer brings."""

    stop = ()

    def __init__(self, tokenizer: HuggingFace) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def opening(self) -> int:
        """See `Chat.opening`."""
        one = [Message("user", MARK)]
        asked, said = (self.tokenizer.encode(self._text(one, opening=o)) for o in (True, False))
        return max(len(asked) - len(said), 1)

    def begin(self, messages: Sequence[Message]) -> list[int]:
        """See `Chat.begin`.

        Raises:
            ValueError: for roles in an order that the template refuses.
        """
        return self.tokenizer.encode(self._text(messages))

    def go_on(self, messages: Sequence[Message], last: int | None) -> list[int]:
        """See `Chat.go_on`; what the template says before the answer is left out.

        Raises:
            ValueError: as `begin`, or if the template does not repeat answers as they are.
        """
        if last is None:
            return self.begin(messages)
        mark = MARK
        while any(mark in message.content for message in messages):
            mark += MARK
        text = self._text([Message("user", mark), Message("assistant", mark), *messages])
        before, _, after = text.rpartition(mark)
        if mark not in before:
            raise ValueError("the chat template does not repeat what was said")
        tokens = self.tokenizer.encode(after)
        # The answer may have written the end of its message itself.
        return tokens[1:] if tokens[:1] == [last] else tokens

    def _text(self, messages: Sequence[Message], *, opening: bool = True) -> str:
        said: list[dict[str, Any]] = [message._asdict() for message in messages]
        try:
            return str(
                self.tokenizer.tokenizer.apply_chat_template(
                    said, tokenize=False, add_generation_prompt=opening
                )
            )
        except Exception as error:  # a template raises what it likes
            reason = str(error).partition("\n")[0]
            raise ValueError(f"the chat template refuses these messages: {reason}") from None


def chat_of(tokenizer: Tokenizer) -> Chat:
    """Return how conversations are written for a tokenizer."""
    if isinstance(tokenizer, HuggingFace) and getattr(tokenizer.tokenizer, "chat_template", None):
        return Templated(tokenizer)
    return Lines(tokenizer)
