"""A run knows its data: it goes on with no others, is not scored on others, and its model needs none."""

import gzip
import json
import shutil

import datasets
import pytest
from conftest import run_command

from lmsleep.cli import main
from lmsleep.tasks import GSMInfinite, Text
from lmsleep.text import files
from lmsleep.training import RunFolder, Trainer
from lmsleep.training.data import hashes

datasets.disable_progress_bars()
PROSE = "a pond has many frogs, and few of them sleep. " * 20
TINY = (
    *("--length", 16, "--window", 8, "--passes", 1, "--steps", 2, "--batch-size", 2, "--eval-batches", 1),
    *("--d-model", 16, "--num-heads", 2, "--threads", 1),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run on a file, `run`, and one on rows, `rows-run`."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "book.txt").write_text(PROSE)
    rows = [{"question": f"how many are {i} frogs?", "answer": i} for i in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, data in (("run", "book.txt"), ("rows-run", "rows.jsonl")):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr("sys.argv", ["lmsleep"])
            main(["train", "text", "--data", data, "--out", name, *map(str, TINY)])
    return folder


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """A copy of it, whose runs draw from the data beside them."""
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    for config in folder.glob("*/config.json"):
        config.write_text(config.read_text().replace(str(trained), str(folder)))
    monkeypatch.chdir(folder)
    return folder


CHANGES = {
    "grown": lambda data: data + data[: len(data) // 2],
    "cut": lambda data: data[:-20],
    "another": lambda data: data.replace(b"frogs", b"toads"),
    "packed": gzip.compress,
    "gone": None,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("run", "data"), [("run", "book.txt"), ("rows-run", "rows.jsonl")])
def test_a_run_goes_on_with_its_own_data_alone_and_is_scored_on_them(here, capsys, change, run, data):
    for command in (["eval", run, "--batches", 1], ["train", "--resume", run]):
        code, _, err = run_command(capsys, *command)
        assert code == 0, err
    old, file = (here / data).read_bytes(), here / data
    if CHANGES[change] is None:
        file.unlink()
    else:
        file.write_bytes(CHANGES[change](old))
    before = {path: path.read_bytes() for path in (here / run).rglob("*") if path.is_file()}
    for command, remedy in (
        (["eval", run, "--batches", 1], "--data"),
        (["train", "--resume", run], "--out"),
        (["inspect", run, "--samples", 2], "--text"),
    ):
        code, out, err = run_command(capsys, *command)
        assert code == 2 and str(file) in err and remedy in err and err.count("\n") == 1 and not out
    assert before == {path: path.read_bytes() for path in (here / run).rglob("*") if path.is_file()}
    (here / f"named-{data}").write_bytes(old)
    code, _, err = run_command(capsys, "eval", run, "--batches", 1, "--data", f"named-{data}")
    assert code == 0, err


def test_a_model_is_asked_without_the_data_it_was_trained_on(here, capsys):
    (here / "book.txt").rename(here / "elsewhere.txt")
    (here / "rows.jsonl").unlink()
    (here / "note.txt").write_text("some frogs")
    for run in ("run", "rows-run"):
        for command in (
            ["read", run, "note.txt", "--memory", f"{run}.mem"],
            ["ask", run, "how many?", "--memory", f"{run}.mem", "--max-new-tokens", 2],
            ["info", run],
            ["inspect", run, "--text", "some frogs and few frogs, and many"],
        ):
            code, _, err = run_command(capsys, *command)
            assert code == 0, err


def test_opening_a_run_reads_none_of_its_data(here, capsys, monkeypatch):
    def refuse(*_):
        raise AssertionError("the data were read")

    (here / "note.txt").write_text("some frogs")
    run_command(capsys, "read", "run", "note.txt", "--memory", "a.mem")
    for name in (
        "lmsleep.tasks.text.read_text",
        "lmsleep.tasks.text.read_set",
        "lmsleep.tasks.text.has_rows",
    ):
        monkeypatch.setattr(name, refuse)
    code, _, err = run_command(capsys, "ask", "run", "how many?", "--memory", "a.mem", "--max-new-tokens", 1)
    assert code == 0, err
    assert RunFolder("run").config().to_dict()["model"]["vocab_size"] == 256
    assert files.read_text(here / "note.txt") == b"some frogs"


def test_a_run_of_before_hashes_goes_on(here, capsys):
    config = json.loads((here / "run/config.json").read_text())
    assert list(config.pop("data")) == [str(here / "book.txt")]
    (here / "run/config.json").write_text(json.dumps(config))
    (here / "book.txt").write_text(PROSE[::-1])
    assert Trainer.take_up(RunFolder("run")).step == 2


def test_damaged_hashes_are_named(here, capsys):
    config = json.loads((here / "run/config.json").read_text())
    (here / "run/config.json").write_text(json.dumps({**config, "data": ["book.txt"]}))
    code, _, err = run_command(capsys, "train", "--resume", "run")
    assert code == 2 and "config.json is damaged: data must be an object" in err


def test_what_is_hashed_of_folders(tmp_path):
    datasets.Dataset.from_list([{"text": str(i)} for i in range(9)]).save_to_disk(tmp_path / "set")
    (tmp_path / "tokenizer").mkdir()
    for name in ("tokenizer.json", "model.safetensors", "vocab.txt", "README.md"):
        (tmp_path / "tokenizer" / name).write_text(name)
    tokenizer = str(tmp_path / "tokenizer")
    task = Text(data=(tmp_path / "set",), tokenizer=tokenizer)
    before = hashes(task)
    assert sorted(path.removeprefix(str(tmp_path)) for path in before) == [
        "/set/data-00000-of-00001.arrow", "/tokenizer/tokenizer.json", "/tokenizer/vocab.txt"
    ]  # fmt: skip
    (tmp_path / "set/cache-123.arrow").write_text("of a computation")
    assert hashes(task) == before
    (tmp_path / "tokenizer/vocab.txt").write_text("other words")
    assert hashes(task) != before
    assert hashes(GSMInfinite()) == {}
