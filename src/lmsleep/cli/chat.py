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
from lmsleep.session import Session
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
    """Run `lmsleep chat MODEL`."""
    options = parse(ChatOptions, argv, "lmsleep chat")
    # With a history: /undo goes back through it.
    session = new_session(options.model, options, history=UNDO)
    if options.memory is not None:
        session = take_up(options.memory, session, options)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a stray byte must not cost the session
    sys.stdout.write("Lines are read and answered; /help lists the commands.\n")
    while True:
        sys.stdout.write(f"[{status(session)}]\n> ")
        sys.stdout.flush()
        # Not input(): the prompt also has to reach a pipe, and a line end tells an empty line from the end.
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            sys.stdout.write("" if line else "\n")
            return
        try:
            session = _respond(session, line.rstrip("\n"), options)
        # A conversation outlives a bad command and a broken sleep.
        except (ValueError, OSError, RuntimeError) as error:
            sys.stdout.write(f"{error}\n")
        # Ctrl-C in an answer ends the answer alone; at the prompt, outside of this, it leaves the program.
        except KeyboardInterrupt:
            sys.stdout.write("\ninterrupted\n")


def _respond(session: Session, line: str, options: ChatOptions) -> Session:
    """Do what a line says; return the session to go on with, which may be another one."""
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
        # Held only while it is written: between two saves another program may use the file.
        with locked(path):
            session.save(path)
    elif command == "/load":
        return take_up(_file(rest), session, options)
    # A mistyped command must not be read as text: the memory would keep it.
    elif command.startswith("/"):
        raise ValueError(f"unknown command {command!r}; /help lists them")
    elif line.strip():
        _answer(session, line, options)
    return session


def _line(session: Session, text: str) -> str:
    """Return a line as it is read: a line of text ends like one."""
    return text if isinstance(session.tokenizer, Spelled) else text + "\n"


def _file(rest: str) -> Path:
    """Return the one file that a command names; raises ValueError for none or several."""
    # As a shell would, so that names with spaces can be quoted.
    names = shlex.split(rest)
    if len(names) != 1:
        raise ValueError("this command takes one file")
    return Path(names[0])


def _answer(session: Session, line: str, options: ChatOptions) -> None:
    """Read a line and write the answer, piece by piece."""
    pieces = session.generate(
        _line(session, line),
        options.longest(session),
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop=options.stop,
        seed=options.seed,
        stream=True,
    )
    for piece in pieces:
        # Each piece is flushed: one sees the answer as it is written.
        sys.stdout.write(str(piece))
        sys.stdout.flush()
    sys.stdout.write("\n")
