"""Dispatch, and errors as one line: bad input leaves with 2, a failed run with 1."""

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from lmsleep.version import __version__

# Where each command is, and what it is for; it is imported when it is called.
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("train:train", "train a model that sleeps, on a task or on your own text"),
    "finetune": (
        "finetune:finetune",
        "teach a pretrained model to sleep: LoRA, memory layers, or every weight",
    ),
    "data": ("data:data", "samples of a task, to read, or as JSON lines or a datasets folder"),
    "eval": ("evaluate:evaluate_run", "evaluate a run at one or several numbers of passes"),
    "read": ("read:read", "read files into a memory, sleeping at window ends; resumable"),
    "ask": ("ask:ask", "ask a memory something"),
    "chat": ("chat:chat", "talk to a model that sleeps"),
    "serve": ("serve:serve", "serve sessions that sleep to any client of the OpenAI API"),
    "memory": ("memory:memory", "show, compare, merge and trace back memory files"),
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
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(usage() + "\n")
        # Help that was asked for is no error; a missing command is.
        sys.exit(0 if args else 2)
    if args[0] == "--version":
        sys.stdout.write(f"lmsleep {__version__}\n")
        return
    if args[0] not in COMMANDS:
        _leave(2, f"unknown command {args[0]!r}; choose one of {', '.join(COMMANDS)}")
    # Imports torch, which --help and --version do without.
    from lmsleep.training import Diverged, Interrupted

    try:
        _command(args[0])(args[1:])
        # Here and not at exit, where a reader that is gone could no longer be caught below.
        sys.stdout.flush()
    # 128 + the signal's number is what a shell says of a process that a signal ended; 130 is Ctrl-C.
    except Interrupted as error:
        _leave(128 + error.signum, str(error))
    except KeyboardInterrupt:
        _leave(130, "interrupted")
    except Diverged as error:
        _leave(1, str(error))
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        # Or the interpreter would flush the rest into the broken pipe when it exits, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    # After BrokenPipeError, which is an OSError; RuntimeError is the parent of Interrupted and Diverged.
    except (ValueError, OSError) as error:
        _leave(2, str(error))
    except RuntimeError as error:
        _leave(1, str(error))


def _command(name: str) -> Callable[[list[str]], None]:
    """Import a command's function."""
    module, _, function = COMMANDS[name][0].partition(":")
    command: Callable[[list[str]], None] = getattr(import_module(f"lmsleep.cli.{module}"), function)
    return command


def _leave(code: int, message: str) -> None:
    """Say an error in one line on standard error, and exit."""
    sys.stderr.write(f"lmsleep: {message}\n")
    sys.exit(code)
