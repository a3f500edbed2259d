"""Passages of documentation, and questions that are made from them by rule.

The Python reference comes with every CPython (`pydoc_data`); pages of a manual (roff, as Debian has them in
/usr/share/man) and plain text are read where they are named. A document becomes passages of one form:

entries     a function or method with its description: which one is described so, what is its first argument
options     options of a command: which one is described so, what does it take
paragraphs  of prose: which marked word is missing in a sentence

or, without questions, is read from a paragraph on (`prose`).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random
from textwrap import dedent
from typing import NamedTuple, TypeVar
from zlib import crc32

from lmsleep.tasks.recall.story import Question, Story
from lmsleep.text import Split
from lmsleep.text.files import read_text

HELD_OUT = 8  # one document in 8 is for testing
KINDS = ("definition", "argument", "option", "cloze")
SHORTEST, LONGEST = 4, 60  # words of what is quoted in a question, and of a paragraph
BLANK = "____"
DESCRIBED = 'What is described by "{}"? It is'
TAKES = "What is the first argument of {}? It is"
VALUE = "What does the option {} take? It takes"
MISSING = 'Which word is missing in "{}"? It is'
MARKED = re.compile(r'\*{1,2}(\w[\w -]*\w)\*{1,2}|"(\w[\w.]*\w)(?:\(\))?"')  # *a term* or "code"
ENTRY = re.compile(r"(?:\w+\.)+(\w+)\((.*)\)")  # str.count(sub[, start[, end]])
OPTION = re.compile(r"--[a-z][a-z-]*[a-z]")
OPTION_VALUE = re.compile(r"\[?=([A-Za-z]+)")
Piece = TypeVar("Piece")


class Unit(NamedTuple):
    """A piece of a document that questions are made of: what it says, and what each asks and expects."""

    text: str
    asked: tuple[tuple[str, str, str], ...]
    """Kind, question, answer."""


def topics_of_python() -> Iterator[tuple[str, str]]:
    """Yield name and text of each topic of the Python reference.

    Raises:
        ValueError: if this Python comes without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError(
            "kinds: documents are of Python's reference, and this Python has no pydoc_data"
        ) from None
    yield from topics.items()


def entries(text: str) -> Iterator[Unit]:
    """Find what a topic of the Python reference defines: a line `name(arguments)`, then a description."""
    for head, body in re.findall(r"^([\w.]+\(.*\))\n\n((?:   .*\n|\n)+)", text, flags=re.MULTILINE):
        named, described = ENTRY.fullmatch(head), _begun(dedent(body))
        if named is None or not described:
            continue
        asked = [("definition", DESCRIBED.format(_sentences(described)[0]), named[1])]
        if argument := _argument(named[2]):
            asked.append(("argument", TAKES.format(named[1]), argument))
        yield Unit(f"{head}\n{described}", tuple(asked))


def options(text: str) -> Iterator[Unit]:
    """Find the options in a page of a manual: `.TP`, the option in all its forms, then what it does."""
    for block in re.findall(r"^\.TP.*\n((?:(?!\.(?:[TPILSR][PHSE]|P)\s).*\n)+)", text, flags=re.MULTILINE):
        head, *body = map(_plain, block.splitlines())
        described = _begun(" ".join(body))
        name = OPTION.search(head)
        if name is None or not described or OPTION.search(described):
            continue
        asked = [("option", DESCRIBED.format(_sentences(described)[0]), name[0])]
        if value := OPTION_VALUE.match(head[name.end() :]):
            asked.append(("argument", VALUE.format(name[0]), value[1]))
        yield Unit(f"{head}\n{described}", tuple(asked))


def paragraphs(text: str) -> Iterator[Unit]:
    """Find paragraphs of prose with a marked word, *a term* or "code", which a question leaves out."""
    for paragraph in re.split(r"\n\s*\n", dedent(text)):
        # What is indented further is code, grammar or a table.
        if re.search(r"::|>>>|\n {2}|[|]|[*=-]{4}|^\s*[*-] ", paragraph):
            continue
        words = " ".join(paragraph.split())
        asked = []
        for sentence in _sentences(words):
            for found in MARKED.finditer(sentence):
                blanked = f"{sentence[: found.start()]}{BLANK}{sentence[found.end() :]}"
                asked.append(("cloze", MISSING.format(blanked), found[1] or found[2]))
        if asked and SHORTEST <= len(words.split()) <= LONGEST:
            yield Unit(words, tuple(asked))


def _sentences(text: str) -> list[str]:
    return re.split(r'(?<=[.!?]) (?=[A-Z"*])', text)


def _begun(text: str) -> str:
    """Return the first sentences of the first paragraph, up to `LONGEST` words; empty if that says little."""
    words = " ".join(text.strip().split("\n\n")[0].split())
    first, *rest = _sentences(words)
    if not SHORTEST <= len(first.split()) <= LONGEST:
        return ""
    for sentence in rest:
        if len(f"{first} {sentence}".split()) > LONGEST:
            break
        first = f"{first} {sentence}"
    return first


def _plain(line: str) -> str:
    """Return a line of roff without fonts and escapes."""
    if font := re.match(r"\.([BIR]{1,2}) ", line):
        # A macro of two fonts puts its words together, set in both by turns.
        words = [quoted or word for quoted, word in re.findall(r'"([^"]*)"|(\S+)', line[font.end() :])]
        line = ("" if len(font[1]) == 2 else " ").join(words)
    return re.sub(r"\\f(\[\w*\]|.)|\\[,/&]", "", line).replace(r"\-", "-").replace(r"\(aq", "'").strip()


class Document(NamedTuple):
    """A document, and the forms in which it is read."""

    name: str
    text: str
    forms: tuple[Callable[[str], Iterator[Unit]], ...]


@cache
def passages(paths: tuple[Path, ...]) -> dict[Split, list[list[Unit]]]:
    """Return the units of each document, one list for each form; one in `HELD_OUT` documents is for testing.

    Raises:
        ValueError: for a file that cannot be read, or if nothing can be asked about all of them.
    """
    documents = _documents(paths)
    units = {document: [list(find(document.text)) for find in document.forms] for document in documents}
    if paths and not any(some for document in documents[-len(paths) :] for some in units[document]):
        raise ValueError("documents: nothing can be asked about these files: no option, no *term*")
    return _divided(units, lambda unit: unit.text)


@cache
def _paragraphs(paths: tuple[Path, ...]) -> dict[Split, list[list[str]]]:
    """Return the paragraphs of each document but pages of manuals, which are no plain text.

    They are divided as `passages` are; errors of `_documents`.
    """
    split = {
        document: [re.split(r"\n\s*\n", document.text.strip())]
        for document in _documents(paths)
        if options not in document.forms
    }
    return _divided(split, str.strip)


def _documents(paths: tuple[Path, ...]) -> list[Document]:
    """Return the topics of the Python reference, then the files.

    Raises:
        ValueError: if this Python comes without its reference, or for a file that cannot be read.
    """
    found = [Document(name, text, (entries, paragraphs)) for name, text in topics_of_python()]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"documents: {path} is not a file; name manual pages or text")
        text = read_text(path).decode(errors="replace")
        page = re.search(r"^\.(?:TH|SH)\s", text, flags=re.MULTILINE)
        found.append(Document(path.name, text, (options if page else paragraphs,)))
    return found


def _divided(
    pieces: Mapping[Document, list[list[Piece]]], said: Callable[[Piece], str]
) -> dict[Split, list[list[Piece]]]:
    """Divide the lists of pieces of documents into training and test.

    Topics of the reference hold others, and manuals have options in common: what stands in several documents
    belongs to the shortest, so that nothing of the test is trained on.
    """
    of: dict[Split, list[list[Piece]]] = {"train": [], "test": []}
    known: set[str] = set()
    for document in sorted(pieces, key=lambda document: (len(document.text), document.name)):
        for some in pieces[document]:
            own = [piece for piece in some if said(piece) not in known]
            known |= {said(piece) for piece in own}
            if own:
                of["test" if _held_out(document.name) else "train"].append(own)
    return of


def _held_out(name: str) -> bool:
    return crc32(f"document {name}".encode()) % HELD_OUT == 0


def prose(random: Random, split: Split, paths: tuple[Path, ...]) -> str:
    """Draw a document, and return it from one of its paragraphs on."""
    documents = _paragraphs(paths)[split]
    some = random.choices(documents, [sum(map(len, document)) for document in documents])[0]
    return "\n\n".join(some[random.randrange(len(some)) :])


def draw(random: Random, split: Split, paths: tuple[Path, ...], number: int) -> Story:
    """Draw a passage of a number of units in a row, and all questions that it answers in one way."""
    documents = passages(paths)[split]
    units = random.choices(documents, [len(units) for units in documents])[0]
    start = random.randrange(max(len(units) - number, 0) + 1)
    some = units[start : start + number]
    text = "\n".join(unit.text for unit in some)
    # Of each unit one question of each kind, if the text has one answer alone.
    asked = [
        random.choice([one for one in unit.asked if one[0] == kind])
        for unit in some
        for kind in KINDS
        if any(one[0] == kind for one in unit.asked)
    ]
    asked = [one for one in asked if solutions(text, one[1]) == {one[2]}]
    answers = {kind: {answer for k, _, answer in asked if k == kind} for kind in KINDS}
    answers["cloze"] = {found[1] or found[2] for found in MARKED.finditer(text)}
    random.shuffle(asked)
    return Story(text, [Question(kind, ask, answer, len(answers[kind])) for kind, ask, answer in asked])


def _argument(listed: str) -> str:
    """Return the first argument of a list, but for that which is the object; empty if there is none."""
    found = re.findall(r"(?<!\w)[a-z_]\w*(?![\w'\"])", listed)
    return next((name for name in found if name not in ("self", "cls")), "")


def _named(head: str) -> str:
    """Return what the first line of a unit names."""
    entry, option = ENTRY.fullmatch(head), OPTION.search(head)
    return entry[1] if entry else option[0] if option else ""


def _between(question: str, form: str) -> str:
    """Return what stands in a question of that form; empty if it is of another."""
    before, after = form.split("{}")
    if question.startswith(before) and question.endswith(after):
        return question[len(before) : len(question) - len(after)]
    return ""


def solutions(text: str, question: str) -> set[str]:
    """Return all answers that a text has to a question: one, where the question was made of it."""
    lines = text.split("\n")
    if quoted := _between(question, MISSING):
        before, _, after = quoted.partition(BLANK)
        pattern = re.escape(before) + MARKED.pattern + re.escape(after)
        return {found[1] or found[2] for found in re.finditer(pattern, text)}
    if quoted := _between(question, DESCRIBED):
        heads = [head for head, body in pairwise(lines) if body.startswith(quoted)]
        return {_named(head) for head in heads}
    if name := _between(question, TAKES):
        found = (ENTRY.fullmatch(line) for line in lines)
        return {_argument(entry[2]) for entry in found if entry and entry[1] == name}
    if name := _between(question, VALUE):
        rest = (line.partition(name)[2] for line in lines if name in line)
        return {value[1] for after in rest if (value := OPTION_VALUE.match(after))}
    return set()
