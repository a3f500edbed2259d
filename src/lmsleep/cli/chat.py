"""`lmsleep chat`: a session, line by line."""

import io
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import Positional

from lmsleep.cli.ask import WriteOptions
from lmsleep.cli.memory import table
from lmsleep.cli.opening import SleepOptions, new_session, status, take_up
from lmsleep.cli.options import parse
from lmsleep.files import locked
from lmsleep.session import BrokenSleep, Session
from lmsleep.text.tokenizers import Spelled

HELP = """A line is read and answered. Lines that begin with a slash are commands:
  /read TEXT   read without answering
  /sleep       sleep on the open window now
  /undo        take back the last line, /read or /sleep, with its answer
  /save FILE   write the session to a file
  /load FILE   go on with the session in a file
  /fork        go on with a fork, whose parent this session is
  /memory      norms and ranks of the fast weights
  /help        this text
  /quit        leave (so does the end of the input)
"""


UNDO = 16  # lines, /read and /sleep that can be taken back, each held with its state


@dataclass(frozen=True, kw_only=True)
class ChatOptions(WriteOptions, SleepOptions):
    """Talk to a model that sleeps, line by line; /help lists the commands."""

    model: Positional[Path]
    """Folder of a run, a saved model or a Hugging Face model, or a shipped one: depo-N1, depo-N4."""
    memory: Path | None = None
    """Memory file to begin with; it is written only by /save."""
    stop: tuple[str, ...] = field(default=("\n",))
    """Texts that end an answer."""


def chat(argv: list[str]) -> None:
    """`lmsleep chat MODEL`."""
    options = parse(ChatOptions, argv, "lmsleep chat")
    session = new_session(options.model, options, history=UNDO)
    if options.memory is not None:
        session = take_up(options.memory, session, options)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a stray byte must not cost the session
    sys.stdout.write("Lines are read and answered; /help lists the commands.\n")
    while True:
        sys.stdout.write(f"[{status(session)}]\n> ")
        sys.stdout.flush()
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            sys.stdout.write("" if line else "\n")
            return
        try:
            session = _respond(session, line.rstrip("\n"), options)
        except (ValueError, OSError, BrokenSleep) as error:
            sys.stdout.write(f"{error}\n")
        except KeyboardInterrupt:
            sys.stdout.write("\ninterrupted\n")


def _respond(session: Session, line: str, options: ChatOptions) -> Session:
    command, _, rest = line.partition(" ")
    if command == "/help":
        sys.stdout.write(HELP)
    elif command == "/read":
        session.read(_line(session, rest))
    elif command == "/sleep":
        session.sleep()
    elif command == "/undo":
        session.rewind()
    elif command == "/fork":
        return session.fork()
    elif command == "/memory":
        sys.stdout.write(table(session.memory))
    elif command == "/save":
        path = _file(rest)
        with locked(path):
            session.save(path)
    elif command == "/load":
        return take_up(_file(rest), session, options)
    elif command.startswith("/"):
        raise ValueError(f"unknown command {command!r}; /help lists them")
    elif line.strip():
        _answer(session, line, options)
    return session


def _line(session: Session, text: str) -> str:
    """As it is read: a line of text ends like one."""
    return text if isinstance(session.tokenizer, Spelled) else text + "\n"


def _file(rest: str) -> Path:
    names = shlex.split(rest)
    if len(names) != 1:
        raise ValueError("this command takes one file")
    return Path(names[0])


def _answer(session: Session, line: str, options: ChatOptions) -> None:
    pieces = session.generate(
        _line(session, line),
        options.longest(session),
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop=options.stops(session),
        seed=options.seed,
        stream=True,
    )
    for piece in pieces:
        sys.stdout.write(str(piece))
        sys.stdout.flush()
    sys.stdout.write("\n")
