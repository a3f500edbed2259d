"""What commands have in common: how options become flags, and tasks are listed."""

import itertools
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, fields, make_dataclass, replace
from io import StringIO
from typing import Any

import tyro

from lmsleep.backbones import Kind
from lmsleep.models import HybridConfig
from lmsleep.sleep import CONSOLIDATOR, CONSOLIDATORS, EVICTION, EVICTIONS, SleepConfig
from lmsleep.tasks import TASKS, Task, Text, find_task

# No prefixes: flags are --window, not --windows.window. Fixed fields are not in --help, for none can be set.
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # colours and weights of a terminal
FLAT = (tyro.conf.OmitArgPrefixes, tyro.conf.SuppressFixed)


def parse(options: Any, argv: Sequence[str], prog: str, description: str | None = None) -> Any:
    """Read the fields of the dataclass `options` from flags; leave with 0 after --help.

    Raises:
        ValueError: for flags that do not fit, in one line.
    """
    said = StringIO()
    try:
        # tyro prints a box of many lines and exits; the command line says every error in one.
        with redirect_stderr(said):
            return tyro.cli(options, args=list(argv), config=FLAT, prog=prog, description=description)
    except SystemExit as leaving:
        # --help: tyro has printed it and leaves with 0.
        if not leaving.code:
            raise
        # `from None`: the box that tyro printed is all in the message.
        raise ValueError(f"{_one_line(said.getvalue())} (see {prog} --help)") from None


def _one_line(box: str) -> str:
    """Shorten tyro's box of paragraphs to the first one, and to which flag may have been meant."""
    # Where standard output is a terminal tyro colours what it writes, wherever that goes.
    box = ESCAPES.sub("", box)
    lines = [line.strip("│╰╯ ") for line in box.splitlines()]
    if lines[0].startswith("╭"):
        lines[0] = "─────"  # the title, which stands in the frame
    paragraphs = re.split(r"\n?^[─-]{5,}$\n", "\n".join(lines), flags=re.MULTILINE)[1:]  # before: the title
    # A box of another make is said whole rather than not at all.
    told = paragraphs[0] if paragraphs else box
    first = re.sub(r"^Error parsing \w+: ", "", " ".join(told.split()))
    meant = re.search(r"Perhaps you meant:?\n(--[\w-]+)", "\n".join(paragraphs))
    return f"{first}; perhaps you meant {meant[1]}" if meant else first


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
    # --preset=NAME becomes two words, as --preset NAME is already.
    words = [word for argument in argv for word in argument.split("=", 1)]
    # The last one of a name wins.
    pairs = itertools.pairwise(words)
    return {a.removeprefix("--").replace("_", "-"): b for a, b in pairs if a.startswith("--")}


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """When the model sleeps, who writes what the window holds, and what stays in attention."""

    window: int | None = None
    """L: tokens of attention context; a sleep happens every L tokens. None: nothing is ever evicted."""
    consolidator: str = "passes"
    """What a sleep does with a window: passes (the paper), gradient-steps (test-time training), or
    FILE.py:CLASS, one of your own; its options stand in a group of their own below."""
    eviction: str = "hard"
    """After a sleep attention keeps nothing of the window (hard), its last L - 1 tokens (sliding), or what
    FILE.py:CLASS keeps."""
    sleep_on_loss: bool = True
    """Sleep on windows that carry loss too. False: Algorithm 1's rule, they get one ordinary pass."""


def sleep_fields(default: SleepConfig, argv: Sequence[str]) -> list[Any]:
    """Return the fields of an options class that hold a sleep: windows, and the consolidator `argv` names.

    Raises:
        ValueError: for a consolidator that is not known.
    """
    own = CONSOLIDATOR.name_of(type(default.consolidator), CONSOLIDATORS)
    name = given_options(argv).get("consolidator", own)
    # Decided before parsing: the flags there are depend on the class.
    by: Any = default.consolidator
    # Another consolidator begins with its own defaults and the default's N; options are those of its class.
    if name != own:
        by = replace(CONSOLIDATOR.find(name, CONSOLIDATORS)(), passes=by.passes)
    windows = WindowOptions(
        window=default.window,
        consolidator=name,
        eviction=EVICTION.name_of(type(default.eviction), EVICTIONS),
        sleep_on_loss=default.sleep_on_loss,
    )
    return [("windows", WindowOptions, windows), ("by", type(by), by)]


def chosen_sleep(options: Any) -> SleepConfig:
    """Return the sleep in options that have the fields of `sleep_fields`."""
    windows = options.windows
    return SleepConfig(
        window=windows.window,
        consolidator=options.by,
        eviction=windows.eviction,
        sleep_on_loss=windows.sleep_on_loss,
    )


def as_type(cls: Any, options: Any) -> Any:
    """Convert options to a class with the same fields, or with some of them."""
    return cls(**{f.name: getattr(options, f.name) for f in fields(cls)})


def say_rows(task: Task) -> None:
    """Say on standard error what became of the rows of a set; a file that is one document needs no words."""
    if isinstance(task, Text) and task.summary is not None:
        sys.stderr.write(f"{task.summary}\n")
