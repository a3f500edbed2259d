import fcntl
import os
import pty
import select
import struct
import termios

from lmsleep import progress


def test_without_a_terminal_a_bar_is_lines(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with progress.progress(total=4, desc="run-seed0", unit="step", position=3, leave=True) as bar:
        for _ in range(4):
            bar.update()
    said = capsys.readouterr().err
    lines = said.splitlines()
    assert len(lines) >= 4 and "\r" not in said and "\x1b" not in said
    assert all(line.startswith("run-seed0") for line in lines) and "4/4" in lines[-1]


def test_what_ends_before_the_first_interval_says_nothing(capsys):
    with progress.progress(total=4, desc="run-seed0") as bar:
        bar.update(4)
    assert not capsys.readouterr().err


def terminal_says(columns, term, monkeypatch):
    # What a bar draws on a pseudo-terminal of so many columns.
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setenv("TERM", term)
    with os.fdopen(child, "w") as screen, os.fdopen(parent, "rb", buffering=0) as seen:
        monkeypatch.setattr("sys.stderr", screen)
        with progress.progress(total=2, desc="run", mininterval=0) as bar:
            bar.update(2)
        screen.flush()
        said = b""
        while select.select([seen], [], [], 0)[0]:  # a read gives a line
            said += seen.read(65536)
        return said.decode()


def test_a_terminal_that_nothing_can_be_drawn_on_gets_lines(monkeypatch):
    # CI systems and `script` make terminals of no column.
    for columns, term in ((0, "xterm"), (80, "dumb")):
        said = terminal_says(columns, term, monkeypatch)
        assert "run: 100%" in said and "\r" not in said.replace("\r\n", "")
    assert "\rrun: 100%" in terminal_says(80, "xterm", monkeypatch)


def test_a_bar_that_is_not_shown_is_never_seen(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    assert list(progress.progress(show=False, iterable=[1, 2])) == [1, 2]
    assert not capsys.readouterr().err
