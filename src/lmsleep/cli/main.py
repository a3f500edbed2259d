"""Dispatch, and errors as one line: bad input leaves with 2, a failed run with 1."""

import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module

from lmsleep.cli import interrupts, several
from lmsleep.version import __version__

# Where each command is, and what it is for; it is imported when it is called.
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("train:train", "train a model that sleeps, on a task or on your own text"),
    "finetune": (
        "finetune:finetune",
        "teach a pretrained model to sleep: LoRA, memory layers, or every weight",
    ),
    "convert": ("convert:convert", "a GGUF file or a model as a folder, with memory layers if asked"),
    "data": ("data:data", "samples of a task, to read, or as JSON lines or a datasets folder"),
    "eval": ("evaluate:evaluate_run", "evaluate a run at one or several numbers of passes"),
    "read": ("read:read", "read files into a memory, sleeping at window ends; resumable"),
    "ask": ("ask:ask", "ask a memory something"),
    "chat": ("chat:chat", "talk to a model that sleeps"),
    "serve": ("serve:serve", "serve sessions that sleep to any client of the OpenAI API"),
    "memory": (
        "memory:memory",
        "show, compare, merge and trace back memory files; slow weights of them",
    ),
    "inspect": ("inspect:inspect_command", "what sleep writes, what can be read of it, what depends on it"),
    "probe": ("probe:probe", "what sleep does to a model that was never trained with it"),
    "lm-eval": ("harness:harness", "tasks of EleutherAI's evaluation harness, read with sleep"),
    "plot": ("plot:plot", "draw the curves of runs"),
    "info": ("info:info", "parameters, bytes, break-even length and FLOPs of a run or model"),
    "reproduce": ("reproduce:reproduce", "train the runs behind a figure; write its data, table and picture"),
    "bench": (
        "bench:bench",
        "speed of this machine: recurrences, training steps, sessions, against other libraries",
    ),
    "demo": ("demo:demo", "what longer sleep buys: shipped models answer, then two are trained"),
}


def usage() -> str:
    """Return the help of the bare command."""
    lines = [f"  {name:<9} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lmsleep COMMAND [OPTIONS]",
            "",
            "Language models that sleep: when the context window is full, N passes over it write what",
            "matters into fast weights; then the window is forgotten.",
            "",
            *lines,
            "",
            "lmsleep COMMAND --help explains each. Start with: lmsleep demo",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv` (default: the process's own)."""
    if argv is None:
        interrupts.own_process()
    _open_closed_streams()
    code, message = 0, ""
    try:
        with several.quiet():
            _run(list(sys.argv[1:] if argv is None else argv))
    except BaseException as error:
        code, message = _outcome(error)
    try:
        # Here and not at exit, where what is wrong with it could no longer be said.
        sys.stdout.flush()
    except OSError as error:
        # Or the interpreter would try again when it exits, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not code:
            code, message = _outcome(error)
    if message and several.first_to_say(message):
        sys.stderr.write(f"lmsleep: {one_line(message)}\n")
    if code:
        sys.exit(code)


def _run(args: list[str]) -> None:
    """Run a command, or say which there are."""
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(usage() + "\n")
        # Help that was asked for is no error; a missing command is.
        sys.exit(0 if args else 2)
    if args[0] == "--version":
        sys.stdout.write(f"lmsleep {__version__}\n")
        return
    if args[0] not in COMMANDS:
        raise ValueError(f"unknown command {args[0]!r}; choose one of {', '.join(COMMANDS)}")
    several.check(args[0])
    # Imports torch, which --help and --version do without.
    command = _command(args[0])
    _silence_libraries()
    with interrupts.noted() as caught:
        try:
            command(args[1:])
            several.leave()
        except Exception as error:
            # What Ctrl-C broke off may have become any error.
            if caught:
                raise KeyboardInterrupt from error
            raise


def _command(name: str) -> Callable[[list[str]], None]:
    """Import a command's function."""
    module, _, function = COMMANDS[name][0].partition(":")
    command: Callable[[list[str]], None] = getattr(import_module(f"lmsleep.cli.{module}"), function)
    return command


def _silence_libraries() -> None:
    """Keep to our own lines: what libraries warn of is for programmers, who can ask for it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:  # of python -W and PYTHONWARNINGS
        # Not a filter, by which tests could no longer make errors of them.
        warnings.showwarning = lambda *_, **__: None


def _outcome(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the words of an error; raise it again if it is none that users make."""
    match error:
        case SystemExit():  # after --help
            return int(error.code or 0), ""
        case KeyboardInterrupt():
            return interrupts.CODE, interrupts.SAID
        case BrokenPipeError():  # the reader of our output (head, less) has seen enough
            return 1, ""
        case MemoryError():
            return 2, _too_large(error)
        case RuntimeError():
            # torch, which is there by now
            from lmsleep.training import Interrupted
            from lmsleep.training.device import is_out_of_memory

            if is_out_of_memory(error):
                return 2, _too_large(error)
            # 128 and its number is what a shell says of a process that a signal ended.
            return 128 + error.signum if isinstance(error, Interrupted) else 1, str(error)
        case ValueError() | OSError() | OverflowError() | ImportError():
            return 2, str(error)
    raise error


def _too_large(error: Exception) -> str:
    """Say that something does not fit; PyTorch adds where in its sources it was found out."""
    lines = str(error).splitlines() or ["the machine has no more"]
    return f"not enough memory ({lines[0]}): fewer samples, a smaller batch, window or model need less"


def one_line(message: str) -> str:
    """Return a message as one line that no terminal acts on."""
    import re  # not before Ctrl-C is handled: the less stands at the top, the sooner it is

    flat = re.sub(r"\s*[\n\r\v\f]\s*", " ", message.strip())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in flat)


def _open_closed_streams() -> None:
    """Give standard streams that were closed (`<&-`) an end, or the next file that opens would be one.

    Names of files need not be text, and a terminal need not know every character: both are written escaped.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # Output that goes nowhere by the user's will is no error, as with > /dev/null.
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115 - as long as the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
