"""The command as a process: closed and full outputs, Ctrl-C at any instant, JSON that is JSON."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from importlib import import_module

import pytest

from lmsleep.cli import interrupts, main
from lmsleep.cli.main import one_line
from lmsleep.plain import to_json

LMSLEEP = f"{sys.executable} -m lmsleep"


def shell(command, **environment):
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (f"{LMSLEEP} --help >&-", (0, "", "")),
        (f"{LMSLEEP} --help > /dev/full", (2, "", "lmsleep: [Errno 28] No space left on device\n")),
        (f"{LMSLEEP} nosuch 2>&-", (2, "", "")),
        (f"{LMSLEEP} chat depo-N4 <&- >&-", (0, "", "")),
    ],
)
def test_closed_and_full_streams_are_no_tracebacks(command, expected):
    assert shell(command) == expected


def test_what_a_terminal_cannot_show_is_written_escaped():
    code, out, err = shell(f"{LMSLEEP} chat depo-N4 < /dev/null", PYTHONIOENCODING="ascii")
    assert code == 0 and r"\xb7 0 tokens" in out and not err


def test_a_message_is_one_line_whatever_it_holds():
    assert one_line("a\n  b\x1b[31m\r\nc\td\udcff ‖\n") == r"a b\x1b[31m c\td\udcff ‖"


@pytest.mark.parametrize("after", [0.0, 0.3])
def test_ctrl_c_in_the_imports_leaves_with_130(after):
    # The handler is set as soon as the first modules of this package run; imports of PyTorch take longer.
    code = "import sys; print(flush=True); sys.argv[1:] = ['info', 'depo-N4']; import lmsleep.__main__"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    # However busy the machine is: the handler is there once the module that holds it is.
    time.sleep(0.2 + after)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) in ((130, "lmsleep: interrupted\n"), (0, ""))


def test_an_interrupt_that_an_import_turned_into_another_error_is_one(monkeypatch, capsys):
    def command(argv):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("numpy failed to import") from None

    monkeypatch.setattr(import_module("lmsleep.cli.main"), "_command", lambda name: command)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as leaving:
        main(["info", "depo-N4"])
    assert leaving.value.code == interrupts.CODE and capsys.readouterr().err == "lmsleep: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_numbers_that_json_lacks_are_null():
    text = to_json({"a": [math.nan, 1.5, (math.inf, 2)], "b": {"c": -math.inf}})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, 1.5, [None, 2]], "b": {"c": None}}


def test_json_is_all_that_is_written(capsys):
    for argv in (
        ["eval", "depo-N4", "--batches", "1", "--window", "16", "--after", "999"],
        ["info", "depo-N4"],
    ):
        main([*argv, "--json"])
        out = capsys.readouterr().out
        json.loads(out, parse_constant=pytest.fail)
