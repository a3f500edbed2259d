"""What commands have in common: how options become flags, and tasks are listed."""

import itertools
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from io import StringIO
from typing import Any, Literal

import tyro

from lmsleep.backbones import Kind
from lmsleep.cli.methods import BY, KEPT, remedy
from lmsleep.environment import changed
from lmsleep.models import HybridConfig
from lmsleep.sleep import SleepConfig
from lmsleep.tasks import TASKS, Task, Text, find_task

NARROWEST, ENDLESS = 60, 100_000  # columns: of help, and of errors, which are one line
# No prefixes: flags are --window, not --windows.window. Fixed fields are not in --help, for none can be set.
FLAT = (tyro.conf.OmitArgPrefixes, tyro.conf.SuppressFixed)


def parse(options: Any, argv: Sequence[str], prog: str, description: str | None = None) -> Any:
    """Read the fields of the dataclass `options` from flags; leave with 0 after --help.

    Raises:
        ValueError: for flags that do not fit, in one line.
    """
    _check_not_empty(argv)
    asked = bool({"-h", "--help"} & set(argv))
    said = StringIO()
    try:
        # tyro prints a box of many lines and exits; the command line says every error in one.
        with redirect_stderr(said), _terminal(for_help=asked):
            found = tyro.cli(options, args=list(argv), config=FLAT, prog=prog, description=description)
    except SystemExit as leaving:
        # --help: tyro has printed it and leaves with 0.
        if not leaving.code:
            raise
        # `from None`: the box that tyro printed is all in the message.
        wrong = _one_line(said.getvalue(), argv)
        if {"sleep", "windows"} & {f.name for f in fields(options)}:
            wrong += remedy(wrong)
        raise ValueError(f"{wrong} (see {prog} --help)") from None
    _check_numbers(found)
    return found


@contextmanager
def _terminal(*, for_help: bool) -> Iterator[None]:
    """Tell tyro how to write: help for the terminal there is, errors in lines as long as they are.

    It asks the environment alone, and would write columns of a letter each on narrow terminals, and colours
    where NO_COLOR forbids them.
    """
    width = max(shutil.get_terminal_size().columns, NARROWEST) if for_help else ENDLESS
    plain = {"TERM": "dumb"} if os.environ.get("NO_COLOR") or not for_help else {}
    with changed({"COLUMNS": str(width), **plain}):
        yield


def _check_not_empty(argv: Sequence[str]) -> None:
    """Raise ValueError for an option without a value, `--out ''`: as a path it would be this folder."""
    for before, word in itertools.pairwise(["", *argv]):
        flag = before if not word and before.startswith("--") else word.removesuffix("=")
        if flag.startswith("--") and (not word or flag != word):
            raise ValueError(f"{flag} is empty; give it a value, or leave it out")


def _check_numbers(options: Any) -> None:
    """Raise ValueError for numbers that are none, or that no tensor could be indexed by."""
    for f in fields(options):
        value = getattr(options, f.name)
        if is_dataclass(value):
            _check_numbers(value)
        for number in value if isinstance(value, tuple) else (value,):
            flag = "--" + f.name.replace("_", "-")
            if isinstance(number, float) and math.isnan(number):
                raise ValueError(f"{flag} must be a number, got {number}")
            if isinstance(number, int) and not -(2**63) <= number < 2**63:
                raise ValueError(f"{flag} must lie within 64 bits, got {number}")


def _one_line(box: str, argv: Sequence[str]) -> str:
    """Shorten tyro's box of paragraphs to what is wrong, and to which flag may have been meant."""
    lines = [line.strip("│╰╯ ") for line in box.splitlines()]
    if lines[0].startswith("╭"):
        lines[0] = "─────"  # the title, which stands in the frame
    paragraphs = re.split(r"\n?^[─-]{5,}$\n", "\n".join(lines), flags=re.MULTILINE)[1:]  # before: the title
    # A box of another make is said whole rather than not at all.
    told = [" ".join(paragraph.split()) for paragraph in paragraphs or [box]]
    # What is missing is often what was mistyped, and then named last.
    unknown = next((words for words in told if words.startswith("Unrecognized options: ")), None)
    first = re.sub(r"^Error parsing \w+: ", "", unknown or told[0])
    # The types that a union was tried with, one by one.
    first = first.partition(" Got errors: ")[0]
    if unknown:
        first += _after_which(unknown.removeprefix("Unrecognized options: "), argv)
        first += "".join(f"; {words}" for words in told[:1] if words.startswith("Missing "))
    first = first.rstrip(".")
    meant = re.search(r"Perhaps you meant:?\n(--[\w-]+)", "\n".join(paragraphs))
    return f"{first}; perhaps you meant {meant[1]}" if meant else first


def _after_which(unknown: str, argv: Sequence[str]) -> str:
    """Name the flag that a value too many stands behind."""
    if unknown.startswith("-"):
        return ""
    words = _words(argv)
    pairs = [(flag, " ".join(value.split())) for flag, value in itertools.pairwise(words)]
    flags = [flag for flag, value in pairs if flag.startswith("--") and unknown.startswith(value)]
    return f" (after {flags[0]})" if flags else ""


def listed(docstrings: dict[str, str | None]) -> str:
    """List names with the first line of what is said about them."""
    return "\n".join(f"  {name:<20} {(text or '').splitlines()[0]}" for name, text in docstrings.items())


def listed_tasks() -> str:
    """List the tasks with the first lines of their docstrings, and say how to name one's own."""
    tasks = {name: task.__doc__ for name, task in TASKS.items()}
    return listed({**tasks, "FILE.py:CLASS": "A task of your own (docs/carry-on.md), or an entry point."})


def task_field(task: str, sections: dict[str, Any]) -> Any:
    """Return the field of an options class that holds the task, with the preset's as default."""
    return ("task", find_task(task), *([sections["task"]] if "task" in sections else []))


@dataclass(frozen=True, kw_only=True)
class HybridOptions(HybridConfig):
    """The hybrid decoder: attention and fast-weight blocks in any order."""

    vocab_size: tyro.conf.Suppress[int] = 256  # the task decides


def model_field(kind: Kind, sections: dict[str, Any]) -> Any:
    """Return the field of an options class that holds the model; presets have defaults for hybrids alone."""
    if kind.options is HybridConfig:
        return ("model", HybridOptions, as_type(HybridOptions, sections["model"]))
    if not any(f.name == "vocab_size" for f in fields(kind.options)):
        return ("model", kind.options)
    # A variable of type Any, because mypy takes no annotation that is made at run time.
    suppressed: Any = tyro.conf.Suppress[int]
    decided = [("vocab_size", suppressed, field(default=256, kw_only=True))]  # by the task
    return ("model", make_dataclass("ModelOptions", decided, bases=(kind.options,), frozen=True))


def given_options(argv: Sequence[str]) -> dict[str, str]:
    """Return options with one value as they stand on the command line: --preset NAME, --preset=NAME."""
    # The last one of a name wins.
    pairs = itertools.pairwise(_words(argv))
    return {a.removeprefix("--").replace("_", "-"): b for a, b in pairs if a.startswith("--")}


def _words(argv: Sequence[str]) -> list[str]:
    """Return the words of a command line, --flag=VALUE as two, as --flag VALUE is already."""
    return [word for a in argv for word in (a.split("=", 1) if a.startswith("--") else [a])]


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """When the model sleeps, who writes what the window holds, and what stays in attention."""

    window: int | None = None
    """L: tokens of attention context; a sleep happens every L tokens. None: nothing is ever evicted."""
    passes: int = 1
    """N: how long a sleep is. 1 is the plain model, whose windows are only read."""
    sleep: str = "passes"
    """What a sleep does with a window: passes (the paper), gradient-steps (test-time training), memory-tokens
    (RMT), gradmem (GradMem), in-place (In-Place TTT), or FILE.py:CLASS, one of your own; its options behind
    commas: in-place,rate=0.1,chunk=16 (lmsleep train --help lists them)."""
    loop: tuple[int, int] | Literal["middle"] | None = None
    """Blocks first ... last - 1 that the passes loop, or the middle half; those before and after run once.
    None: all blocks."""
    eviction: str = "hard"
    """What stays in attention after a sleep: nothing of the window (hard), its last L - 1 tokens (sliding),
    few keys a head of all windows (compact,keys=64,method=attention), or what FILE.py:CLASS keeps."""
    sleep_on_loss: bool = True
    """Sleep on windows that carry loss too. False: Algorithm 1's rule, they get one ordinary pass."""


def sleep_field(default: SleepConfig, argv: Sequence[str]) -> Any:
    """Return the field of an options class that holds a sleep.

    Raises:
        ValueError: for a sleep that is not known.
    """
    # Decided before parsing: a loop is the default of the method that has it alone.
    name = given_options(argv).get("sleep", "--")
    by = BY.over(None if name.startswith("--") else name, default.consolidator)
    windows = WindowOptions(
        window=default.window,
        passes=default.passes,
        sleep=BY.spelled(by),
        loop=getattr(by, "loop", None) if type(by) is type(default.consolidator) else None,
        eviction=KEPT.spelled(default.eviction),
        sleep_on_loss=default.sleep_on_loss,
    )
    return ("windows", WindowOptions, windows)


def chosen_sleep(options: Any, default: SleepConfig) -> SleepConfig:
    """Return the sleep in options that have the field of `sleep_field`."""
    windows = options.windows
    by = BY.over(windows.sleep, default.consolidator)
    # None is a value of it too, of those that have it.
    loop = {"loop": windows.loop} if windows.loop is not None or hasattr(by, "loop") else {}
    return SleepConfig(
        window=windows.window,
        consolidator=by,
        eviction=KEPT.over(windows.eviction, default.eviction),
        sleep_on_loss=windows.sleep_on_loss,
        passes=windows.passes,
        **loop,
    )


def as_type(cls: Any, options: Any) -> Any:
    """Convert options to a class with the same fields, or with some of them."""
    return cls(**{f.name: getattr(options, f.name) for f in fields(cls)})


def say_rows(task: Task) -> None:
    """Say on standard error what became of the rows of a set; a file that is one document needs no words."""
    if isinstance(task, Text) and task.summary is not None:
        sys.stderr.write(f"{task.summary}\n")
