"""`lmsleep chat`: a session, line by line."""

import io
import shlex
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from lmsleep.cli.ask import WriteOptions
from lmsleep.cli.memory import table
from lmsleep.cli.opening import SleepOptions, open_session, status, take_up
from lmsleep.cli.options import parse
from lmsleep.files import locked
from lmsleep.opening import Opened
from lmsleep.session import Session
from lmsleep.text.chat import Chat, Message, Templated, chat_of
from lmsleep.text.tokenizers import Spelled

HELP = """A line is read and answered, as a turn of the chat template if the tokenizer has one.
Lines that begin with a slash are commands:
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
    """A run, saved model, Hugging Face folder, adapter, GGUF file, or a shipped model: depo-N1, depo-N4."""
    memory: Path | None = None
    """Memory file to begin with; it is written only by /save."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, as the ends of a text that the model knows do; default the end of a line,
    unless its tokenizer has a chat template."""
    system: str | None = None
    """What the model is told before a conversation; needs a tokenizer with a chat template."""


@dataclass
class Turns:
    """Writes lines as turns, by the chat template of the tokenizer; without one they are read as they are.

    Attributes:
        chat: of the tokenizer.
        system: message before each conversation.
        answers: last token of each answer, by how many tokens the session had read then. Where the session
            is at the end of none of them (after a /read or a /load), a line begins a conversation.
    """

    chat: Chat
    system: str | None
    answers: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.system is not None and not isinstance(self.chat, Templated):
            raise ValueError(
                "system needs a tokenizer with a chat template; /read TEXT tells this model something"
            )

    def prompt(self, session: Session, line: str) -> str | Sequence[int]:
        """Return what is read of a line, up to where its answer begins."""
        if not isinstance(self.chat, Templated):
            return _line(session, line)
        messages = [Message("user", line)]
        read = session.stats.tokens
        if read in self.answers:
            return self.chat.go_on(messages, self.answers[read])
        if self.system is not None:
            messages.insert(0, Message("system", self.system))
        tokens, begin = self.chat.begin(messages), [*self.chat.tokenizer.begin]
        # What a stream begins with stands at its beginning alone.
        return tokens[len(begin) :] if read and tokens[: len(begin)] == begin else tokens

    def answered(self, session: Session) -> None:
        """Remember that the session stands at the end of an answer."""
        if len(window := session.stream.window):
            self.answers[session.stats.tokens] = int(window[-1])


def chat(argv: list[str]) -> None:
    """Run `lmsleep chat MODEL`."""
    options = parse(ChatOptions, argv, "lmsleep chat")
    # With a history: /undo goes back through it.
    session = open_session(options.model, options, options.memory, history=UNDO)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a stray byte must not cost the session
    assert session.tokenizer is not None
    turns = Turns(chat_of(session.tokenizer), options.system)
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
            session = _respond(session, line.rstrip("\n"), turns, options)
        # A conversation outlives a bad command and a broken sleep.
        except (ValueError, OSError, RuntimeError) as error:
            sys.stdout.write(f"{error}\n")
        # Ctrl-C in an answer ends the answer alone; at the prompt, outside of this, it leaves the program.
        except KeyboardInterrupt:
            sys.stdout.write("\ninterrupted\n")


def _respond(session: Session, line: str, turns: Turns, options: ChatOptions) -> Session:
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
        assert session.tokenizer is not None
        model: Any = session.model  # of an opened one
        on = Opened(model, session.sleep_config, session.tokenizer)
        loaded = take_up(_file(rest), on, options, history=UNDO)
        turns.answers.clear()
        return loaded
    # A mistyped command must not be read as text: the memory would keep it.
    elif command.startswith("/"):
        raise ValueError(f"unknown command {command!r}; /help lists them")
    elif line.strip():
        _answer(session, line, turns, options)
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


def _answer(session: Session, line: str, turns: Turns, options: ChatOptions) -> None:
    """Read a line and write the answer, piece by piece."""
    read = session.stats.tokens
    # Any: what the annotation promises is iterated, and this is closed too.
    pieces: Any = session.generate(
        turns.prompt(session, line),
        options.longest(session),
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop=options.stop or turns.chat.stop,
        seed=options.seed,
        stream=True,
    )
    try:
        with closing(pieces):
            for piece in pieces:
                # Each piece is flushed: one sees the answer as it is written.
                sys.stdout.write(str(piece))
                sys.stdout.flush()
    finally:
        # Also one that Ctrl-C has ended: what was shown of it is read.
        if session.stats.tokens > read:
            turns.answered(session)
    sys.stdout.write("\n")
