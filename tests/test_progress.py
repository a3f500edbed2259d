from lmsleep.training import progress


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
