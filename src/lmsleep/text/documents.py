"""Sets of documents: rows of text, of prompts with their answers, or of conversations."""

import math
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from lmsleep.text.characters import check_characters
from lmsleep.text.rows import Row, read_rows
from lmsleep.text.splits import Split

CONVERSATION = "messages"
GUESSES = (("question", "answer"), ("prompt", "completion"), ("text",), (CONVERSATION,))
HELD_OUT = 10  # one document in 10 is for testing, by its hash: more documents move none of the old

Chat = Callable[[list[dict[str, Any]]], str]


class Document(NamedTuple):
    """One row: its text, or its prompt and answer, and the split that it belongs to."""

    fields: tuple[str, ...]
    split: Split


def read_set(
    path: Path, names: tuple[str, ...] = (), *, split: Split | None = None, chat: Chat | None = None
) -> Iterator[Document]:
    """Yield the documents of a file of rows or of a folder that `datasets` saved.

    Splits of a folder that are called train and test (validation, dev, train_sft ...) are kept; elsewhere a
    document is held out by the hash of its first field, so that a prompt is never in both.

    Args:
        path: the file or folder (see `lmsleep.text.rows.has_rows`).
        names: the field of the text, or those of prompt and answer; default: the first of `GUESSES` that
            the first row has.
        split: where all rows belong that the folder says nothing else of; default by hash.
        chat: makes one text of a conversation, a list of messages with role and content; such a document
            is held out by the hash of all but its last message. None: conversations are refused.

    Raises:
        ValueError: naming file and line, for a row that is not JSON, lacks a field or holds no text in it.
    """
    for row in read_rows(path):
        names = names or _guess(row)
        values = [_value(row, name) for name in names]
        if len(names) == 2 and not all(isinstance(value, str) for value in values):
            raise ValueError(
                f"{row.where}: a prompt and its answer must be texts; of a conversation name the one field "
                f"that holds all of it, such as {CONVERSATION}"
            )
        fields = tuple(
            value if isinstance(value, str) else _conversation(row, name, value, chat)
            for name, value in zip(names, values, strict=True)
        )
        if len(names) == 2 and not all(fields):
            raise ValueError(f"{row.where}: {names[fields.index('')]} is empty")
        yield Document(fields, row.split or split or _split(values[0]))


def asks(path: Path, names: tuple[str, ...] = ()) -> bool:
    """Return True if the rows at `path` are prompts with answers; only the first row is read.

    Raises:
        ValueError: as `read_set`.
    """
    first = next(read_rows(path), None)
    return len(names or (() if first is None else _guess(first))) == 2


def _split(first: str | list[dict[str, Any]]) -> Split:
    if not isinstance(first, str):
        # As prompts with answers are, by what comes before the last message; and alike in all formats.
        first = "\n".join(f"{message['role']}: {message['content']}" for message in first[:-1] or first)
    # A role, which no template need write, may hold what is no text.
    digest = blake2b(first.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "train" if int.from_bytes(digest, "big") % HELD_OUT else "test"


def _guess(row: Row) -> tuple[str, ...]:
    for names in GUESSES:
        if all(name in row.values for name in names):
            return names
    raise ValueError(
        f"{row.where}: none of {', '.join('/'.join(names) for names in GUESSES)} among its fields "
        f"{', '.join(row.values)}; name the text's, or the prompt's and the answer's, with fields"
    )


def _value(row: Row, name: str) -> str | list[dict[str, Any]]:
    """Return the text in a field, or the messages of a conversation."""
    if name not in row.values:
        raise ValueError(f"{row.where}: no field {name!r}; there are {', '.join(row.values)}")
    value = row.values[name]
    # bool is an int in Python. JSON as Python reads it has NaN and Infinity, which are no answers.
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    if isinstance(value, str):
        check_characters(value, f"{row.where}: field {name!r}")
        return value
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        for message in value:
            if not {"role", "content"} <= message.keys():
                raise ValueError(
                    f"{row.where}: field {name!r}: a message must have role and content, got "
                    f"{', '.join(map(str, message))}"
                )
        return value
    what = value if isinstance(value, float) else type(value).__name__
    raise ValueError(f"{row.where}: field {name!r} must be text or a number, got {what}")


def _conversation(row: Row, name: str, messages: list[dict[str, Any]], chat: Chat | None) -> str:
    if chat is None:
        raise ValueError(
            f"{row.where}: field {name!r} is a conversation, which takes a tokenizer with a chat template"
        )
    # Columns that a message does not use are None in tables, where JSON leaves them out.
    used = [{k: v for k, v in message.items() if v is not None or k == "content"} for message in messages]
    where = f"{row.where}: field {name!r}"
    try:
        text = chat(used)
    except Exception as error:  # templates raise what they like
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{where}: {reason}") from None
    check_characters(text, where)
    return text
