"""Bad values for every kind of option of every command: one line, exit 2, and the option is named."""

import contextlib
import io
import itertools
import os
import pty
import re
import shutil
from pathlib import Path

import pytest
from golden.write import HERE

from lmsleep.cli import main

COMMANDS = {
    "train": ["train", "depo"],
    "train text": ["train", "text", "--data", "a.txt"],
    "finetune": ["finetune", ".", "--task", "mqar"],
    "convert": ["convert", "depo-N4", "out"],
    "data": ["data", "depo"],
    "eval": ["eval", "depo-N4"],
    "read": ["read", "depo-N4", "a.txt", "--memory", "m.mem"],
    "ask": ["ask", "depo-N4", "n1", "--memory", "old.mem"],
    "chat": ["chat", "depo-N4"],
    "inspect": ["inspect", "depo-N4"],
    "probe": ["probe", "depo-N4", "--text", "a.txt"],
    "lm-eval": ["lm-eval", "depo-N4", "--tasks", "none"],
    "plot": ["plot", "depo-N4"],
    "info": ["info", "depo-N4"],
    "reproduce": ["reproduce", "3"],
    "demo": ["demo"],
    "memory show": ["memory", "show", "old.mem"],
    "memory diff": ["memory", "diff", "old.mem", "old.mem"],
    "memory merge": ["memory", "merge", "old.mem", "old.mem", "--out", "n.mem"],
    "memory log": ["memory", "log", "old.mem"],
}
MANY = ("train", "train text", "finetune", "data")  # options by the dozen: one of each kind stands for all
HUGE = str(10**30)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("n1 n2 n2 n3 " * 300)
    shutil.copy(HERE / "depo-N4.mem", "old.mem")
    return tmp_path


def run(argv):
    # Without capsys, whose cost a call would be most of a sweep's.
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = outcome(argv)
    return code, out.getvalue(), err.getvalue()


def run_on_terminal(argv):
    parent, child = pty.openpty()
    with os.fdopen(child, "w") as terminal, os.fdopen(parent, "rb", buffering=0) as screen:
        with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
            code = outcome(argv)
            terminal.flush()
        return code, "", screen.read(65536).decode().replace("\r\n", "\n")


def outcome(argv):
    try:
        main(argv)
    except SystemExit as leaving:
        return leaving.code
    return 0


def options(command):
    # Flags with what they take, out of the help; columns of 120 characters hold one box.
    _, said, _ = run([*COMMANDS[command], "--help"])
    found = re.findall(r"^ +(--[a-z][\w-]*)(, --no-[\w-]+| \S.*?)?(?:  |$)", said, flags=re.M)
    assert found
    if command not in MANY:
        return found
    kind = lambda takes: "switch" if takes.startswith(",") else re.sub(r"{\w+,.*}", "{}", takes)  # noqa: E731
    return list({kind(takes): (flag, takes) for flag, takes in found}.values())


def bad_values(flag, takes):
    if takes.startswith(","):
        yield [f"{flag}=3"]
        return
    if not takes:
        yield [f"{flag}", "3"]
        return
    count = max(len(re.findall(r"INT|FLOAT", kind)) for kind in takes.split("|")) or 1
    if "[" not in takes:
        yield [flag]
    for kind, values in {"INT": ("x", "1.5", HUGE, "1\n2"), "FLOAT": ("x", "nan", "1\n2")}.items():
        if kind in takes:
            yield from ([flag, *[value] * count] for value in values)
    if not re.search("INT|FLOAT|STR|PATH", takes):
        yield [flag, "nope"]
    yield [flag, ""]


def says_it_well(result, flag):
    code, out, err = result
    named = flag in err or flag[2:].replace("-", "_") in err
    return code == 2 and not out and named and err.count("\n") == 1 and "\x1b" not in err


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_values_are_one_line_that_names_the_option(command, here, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm-256color")
    most = 1 if command in MANY else None
    cases = [(flag, words) for flag, takes in options(command) for words in [*bad_values(flag, takes)][:most]]
    for flag, words in cases:
        result = run([*COMMANDS[command], *words])
        assert says_it_well(result, flag), (words, result)
    # On a terminal one value of each option: what differs there is how it is written.
    for flag, [(_, words), *_] in itertools.groupby(cases, lambda case: case[0]):
        result = run_on_terminal([*COMMANDS[command], *words])
        assert says_it_well(result, flag), (words, result)


DEVICES = ("xpu", "hpu", "meta", "mps", "vulkan", "cpu:99", "nope", "cuda:99")
WITH_DEVICE = {
    **{name: COMMANDS[name] for name in ("train", "eval", "read", "ask", "chat", "probe")},
    "inspect": ["inspect", "depo-N4", "--text", "n1"],
}


@pytest.mark.parametrize("command", WITH_DEVICE)
def test_a_device_that_is_not_here_is_named_and_leaves_nothing(command, here):
    before = set(here.rglob("*"))
    for device in DEVICES if command == "read" else DEVICES[:3]:
        code, out, err = run([*WITH_DEVICE[command], "--device", device])
        assert (code, out, err.count("\n")) == (2, "", 1) and f"device={device!r}" in err
    assert {path for path in here.rglob("*") if not path.name.endswith(".lock")} == before


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["eval", "depo-N4", "--window", "0"], "window must be at least 1"),
        (["eval", "depo-N4", "--length", "0"], "--length is for runs on text"),
        (["eval", "depo-N4", "--after", "-5"], "after must not be negative"),
        (["eval", "depo-N4", "--batches", "0"], "batches must be at least 1"),
        (["eval", "depo-N4", "--passes", "1", "0"], "passes must be at least 1"),
        (["read", "depo-N4", "a.txt", "--memory", "m.mem", "--tokenizer", "nope"], "tokenizer='nope'"),
        (["ask", "depo-N4", "n1", "--memory", "old.mem", "--tokenizer", "bytes"], "tokenizer='bytes'"),
        (["read", "depo-N4", "a.txt", "--memory", "old.mem", "--parent", "old.mem"], "is no fork of it"),
        (["inspect", "depo-N4", "--device", "nope"], "--device"),
        (["inspect", "depo-N4", "--tokenizer", "nope"], "--tokenizer"),
        (["inspect", "depo-N4", "--text", "n1", "--samples", "3"], "--samples"),
        (["inspect", "depo-N4", "--file", "bin"], "bin is not UTF-8"),
        (["probe", "depo-N4", "--text", "bin"], "bin is not UTF-8"),
        (["data", "depo", "--split", "test", "--seed", "1"], "--seed"),
        (["data", "depo", "--window", "4", "--jsonl", "x.jsonl"], "--window"),
        (["data", "depo", "--jsonl", "no/x.jsonl"], "--jsonl no/x.jsonl: there is no folder no"),
        (["data", "depo", "--dataset", "no/x"], "--dataset no/x: there is no folder no"),
        (["plot"], "runs must name at least one"),
        (["plot", "depo-N4", "--out", "no/x.png"], "there is no folder no"),
        (["reproduce", "3", "--workers", "0"], "workers must be at least 1, got 0"),
        (["reproduce", "3", "--dry-run", "--workers", "-3"], "workers must be at least 1, got -3"),
        (["reproduce", "6", "--workers", "2"], "workers: figure 6"),
        (["reproduce", "3", "--out", "a.txt"], "out=a.txt"),
        (["reproduce", "6", "--out", "a.txt/x"], "out=a.txt/x"),
        (["demo", "--workers", "-1"], "workers must be at least 1, got -1"),
        (["demo", "--seeds", "-1"], "seeds must not be negative"),
        (["demo", "--out", "a.txt"], "out=a.txt"),
        (["data", "depo", "--samples", "10000000000"], "not enough memory"),
        (["info", "depo-N4", "--window", "1000000000000"], "window must be"),
        (["inspect", "depo-N4", "--samples", "1000000000000"], "not enough memory"),
        (["ask", "depo-N4", "n1", "--memry", "old.mem"], "--memry"),
        (["ask", "depo-N4", "n1", "--memory", "old.mem", "--seed", HUGE], "--seed"),
        (["memory", "show", "old.mem", "a.txt"], "a.txt is not a memory file"),
        (["info", "no\nthing"], "there is no folder no thing"),
    ],
)
def test_no_option_is_ignored_and_blame_is_right(argv, said, here):
    Path("bin").write_bytes(b"\xff\x80 n1")
    before = {path: path.read_bytes() for path in here.iterdir()}
    code, out, err = run(argv)
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err
    assert {path: path.read_bytes() for path in here.iterdir() if not path.name.endswith(".lock")} == before
