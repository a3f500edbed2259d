import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import run_command

from lmsleep.cli import main
from lmsleep.files import locked

OPTIONS = {"steps": 4, "eval-every": 2, "eval-batches": 1, "save-every": 2, "batch-size": 4, "d-model": 16,
           "num-heads": 2, "head-dim": 8}  # fmt: skip
TINY = [str(word) for name, value in OPTIONS.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    main(["train", "depo", "--passes", "2", "--out", str(folder), *TINY])
    return folder


def test_a_run_is_a_folder_with_config_metrics_checkpoints_and_report(trained):
    config = json.loads((trained / "config.json").read_text())
    assert (config["task"]["name"], config["train"]["steps"]) == ("depo", 4)
    assert config["sleep"]["consolidator"]["passes"] == 2
    assert [json.loads(x)["step"] for x in (trained / "metrics.jsonl").read_text().splitlines()] == [2, 4, 4]
    assert json.loads((trained / "report.json").read_text())["eval"]["per_difficulty"].keys() == set("1234")


def test_eval_reads_with_several_numbers_of_passes(trained, capsys):
    code, out, _ = run_command(capsys, "eval", trained, "--passes", 1, 2, "--batches", 1, "--json")
    document = json.loads(out)
    assert code == 0 and list(document["passes"]) == ["1", "2"]
    assert document["passes"]["1"]["bits"] != document["passes"]["2"]["bits"]
    _, learned, _ = run_command(
        capsys, "eval", trained, "--passes", 1, 2, "--batches", 1, "--split", "train", "--json"
    )
    learned = json.loads(learned)
    assert learned["split"] == "train" and learned["passes"] != json.loads(out)["passes"]
    code, out, _ = run_command(capsys, "eval", trained, "--batches", 1)
    assert code == 0 and out.startswith("N = 2:  k=1: ") and "chance 0.143" in out


def test_info_of_a_run_and_of_a_model(trained, capsys):
    _, out, _ = run_command(capsys, "info", trained, "--json")
    figures = json.loads(out)
    # one block with 2 heads of 8 x 8 float32, one with keys and values of 16 numbers
    assert figures["fast_weight_bytes"] == 2 * 8 * 8 * 4
    assert figures["kv_bytes_per_token"] == 2 * 16 * 4
    assert figures["break_even_tokens"] == 5
    model = next((trained / "checkpoints").iterdir())
    _, out, _ = run_command(capsys, "info", model, "--window", 8, "--passes", 2, "--json")
    assert json.loads(out) == figures
    _, out, _ = run_command(capsys, "info", trained)
    assert "from 5 tokens on" in out


def test_plot_draws_a_picture(trained, capsys, tmp_path):
    code, _, _ = run_command(capsys, "plot", trained, "--out", tmp_path / "c.png", "--x", "flops")
    assert code == 0 and (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nosuch"], "unknown command 'nosuch'"),
        (["train", "nosuch"], "unknown task 'nosuch'; choose one of depo"),
        (["train", "depo", "--passes", "0"], "passes must be at least 1"),
        (["train", "depo", "--window", "0"], "window must be at least 1 token"),
        (["train", "depo", "--loop", "0", "9"], "loop=(0, 9) reaches outside the model"),
        (["train", "depo", "--nosuch", "1"], "--nosuch"),
        (["train", "depo", "--preset", "nosuch"], "preset='nosuch' is unknown for depo"),
        (["train", "depo", "--device", "cuda"], "device='cuda'"),
        (["train", "text"], "data must name at least one file"),
        (["train", "text", "--data", "missing.txt"], "missing.txt is not a file"),
        (["train", "--resume", "nowhere"], "nowhere is not a run"),
        (["eval", "nowhere"], "there is no folder nowhere"),
        (["info", "nowhere"], "shipped: depo-N1, depo-N4"),
        (["plot", "nowhere"], "nowhere is not a run"),
        (["demo", "--scale", "0"], "scale must lie in (0, 1]"),
        (["demo", "--seeds", "1", "1"], "each once"),
    ],
)
def test_bad_input_leaves_with_2_and_says_what(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_command(capsys, *argv)
    flat = " ".join(err.replace("│", " ").split())
    assert code == 2 and said in flat and "Traceback" not in err and not out
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_an_existing_run_is_not_touched(trained, capsys):
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}
    code, _, err = run_command(capsys, "train", "depo", "--out", trained, *TINY)
    assert code == 2 and "--resume" in err
    assert before == {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}


def test_a_damaged_checkpoint_is_named(trained, capsys, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    weights = sorted(copy.glob("checkpoints/*/model.safetensors"))[-1]
    weights.write_bytes(weights.read_bytes()[:100])
    code, _, err = run_command(capsys, "eval", copy)
    assert code == 2 and "model.safetensors is damaged" in err


@pytest.mark.parametrize("task", ["depo", "rule110", "text"])
def test_help_names_every_option_of_task_model_sleep_and_training(task, capsys):
    code, out, _ = run_command(capsys, "train", task, "--help")
    own = {"depo": "--nodes", "rule110": "--width", "text": "--data"}[task]
    assert code == 0 and all(
        f in out for f in (own, "--blocks", "--passes", "--adam-lr", "--out", "--preset")
    )
    assert "--vocab-size" not in out


def test_text_is_trained_and_scored_in_bits_per_byte(capsys, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("The quick brown fox jumps over the lazy dog. " * 100)
    code, out, _ = run_command(capsys, "train", "text", "--data", book, "--length", 64, "--window", 16,
                       "--out", tmp_path / "run", *TINY)  # fmt: skip
    assert code == 0 and "bits per byte held out" in out
    code, out, _ = run_command(capsys, "eval", tmp_path / "run", "--passes", 1, 2, "--batches", 1)
    assert code == 0 and out.count("after eviction") == 2


def test_sigterm_saves_and_resume_finishes(tmp_path):
    """The command itself, as a scheduler would stop it."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "lmsleep", "train", "depo", "--out", str(folder), *TINY]
    command[command.index("--steps") + 1] = "100000"
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "to go on: lmsleep train --resume" in err
    config = json.loads((folder / "config.json").read_text())
    step = int(sorted((folder / "checkpoints").iterdir())[-1].name.split("-")[1])
    config["train"]["steps"] = step + 2
    (folder / "config.json").write_text(json.dumps(config))
    main(["train", "--resume", str(folder)])
    assert json.loads((folder / "report.json").read_text())["step"] == step + 2


def test_the_readme_examples_run(capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    examples = [part.split("```")[0] for part in readme.split("```python\n")[1:]]
    assert len(examples) == 2
    for example, said in zip(examples, ("n8\n", "[32] 4096"), strict=True):
        assert len([x for x in example.splitlines() if x]) <= 15
        exec(compile(example, "README.md", "exec"), {})
        assert said in capsys.readouterr().out


def test_readme_commands_parse(trained, capsys, monkeypatch, tmp_path):
    """Every `lmsleep train ...` line of the README is accepted by the parser (stopped before it trains)."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    lines = [x.split("#")[0].split() for x in readme.splitlines() if x.strip().startswith("lmsleep train ")]
    book = tmp_path / "python-reference.txt"
    book.write_text("word " * 10_000)
    monkeypatch.chdir(tmp_path)
    started = []
    monkeypatch.setattr(
        "lmsleep.cli.train.Trainer.begin",
        lambda out, config, trust, processes: started.append(config) or _Stop(),
    )
    for words in lines:
        if "--resume" not in words:
            with pytest.raises(_Stopped):
                main(words[1:])
    assert len(started) >= 2


class _Stopped(Exception):
    pass


class _Stop:
    @property
    def folder(self):
        raise _Stopped


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["train", "depo", "--nodes", "1"], "nodes must be at least 3, got 1"),
        (["train", "depo", "--passes", "0"], "passes must be at least 1"),
        (["train", "depo", "--nodez", "1"], "--nodez, 1; perhaps you meant --nodes"),
        (["train", "depo", "--nodes", "x"], "--nodes"),
        (["eval"], "PATH"),
        (["demo", "--tasks", "chess"], "chess"),
        (["memory", "show"], "files"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(argv, said, capsys):
    code, out, err = run_command(capsys, *argv)
    assert code == 2 and not out and said in err and err.count("\n") == 1


@pytest.mark.parametrize("words", [["--preset", "paper"], ["--preset=paper"]])
def test_a_preset_may_be_named_either_way(words, capsys):
    code, out, _ = run_command(capsys, "train", "rule110", *words, "--help")
    assert code == 0 and "97000" in out


@pytest.mark.parametrize("option", ["--passes", "--window"])
def test_info_refuses_nothing_for_a_number(option, trained, capsys):
    code, _, err = run_command(capsys, "info", trained, option, 0)
    assert code == 2 and "at least 1" in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["info", "depo-N4", "--bogus"], "lmsleep: Unrecognized options: --bogus"),
        (["train", "depo", "--steps", "many"], "lmsleep: "),
        (["train", "depo", "--steps", "0"], "steps must be at least 1, got 0"),
        (["ask", "depo-N4"], "lmsleep: "),
    ],
)
def test_usage_errors_are_one_line_on_a_terminal(argv, said, tmp_path):
    # Standard output and error of the child are a terminal, where tyro colours what it says.
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "lmsleep", *argv]
    terminal = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"}
    done = subprocess.Popen(command, cwd=tmp_path, stdin=child, stdout=child, stderr=child, env=terminal)
    os.close(child)
    read = b""
    with contextlib.suppress(OSError):  # what Linux says when the other side has closed
        while more := os.read(parent, 4096):
            read += more
    os.close(parent)
    assert done.wait(60) == 2
    text = read.decode()
    assert said in text and text.count("\n") == 1 and "Traceback" not in text and "\x1b" not in text


def test_a_lock_follows_no_link(tmp_path):
    (tmp_path / "precious.txt").write_text("precious")
    (tmp_path / ".a.mem.lock").symlink_to("precious.txt")
    with pytest.raises(OSError), locked(tmp_path / "a.mem"):
        pass
    assert (tmp_path / "precious.txt").read_text() == "precious"
    with locked(tmp_path / "b.mem"):
        assert (tmp_path / ".b.mem.lock").stat().st_mode & 0o77 == 0
