import json
import subprocess
import sys
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from conftest import run_command

from lmsleep.evaluation import EVAL_SEED
from lmsleep.recipes import settings
from lmsleep.tasks import TASKS, Batch, Depo, Rule110, Text, batch_rng
from lmsleep.tasks.samples import EVICTED, records, show

DEPO = Depo(nodes=4, hops=2, queries=2, names=4, name_lengths=(1, 1), ask="fork")


def data(capsys, *argv):
    return run_command(capsys, "data", *argv)


def test_evictions_stand_between_windows_and_answers_in_brackets():
    batch = DEPO.batch(batch_rng(0, "train", 0), 1, "train")
    before, *rest = show(DEPO, batch, 0, 4).split(f" {EVICTED} ")
    assert len(before.split()) == 4 and len(rest) == 2  # two windows of context, then the question
    answer = DEPO.spell(batch.tokens[0, -1:].tolist())
    assert rest[-1].endswith(f" [{answer}]")
    assert EVICTED not in show(DEPO, batch, 0, None).split(f" {EVICTED} ")[0]


def test_windows_count_on_through_tokens_that_are_no_context():
    task = Rule110(width=6, states=2, t=1, asked=2)
    shown = show(task, task.batch(batch_rng(0, "train", 0), 1, "train"), 0, 6)
    windows = shown.split(f" {EVICTED} ")
    assert [len(w) for w in windows[:2]] == [6, 6] and windows[2].startswith("| [")
    assert len(windows) == 3


def test_text_marks_evictions_and_no_answers(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdefgh" * 50)
    task = Text(data=(path,), length=12)
    shown = show(task, task.batch(batch_rng(0, "train", 0), 1, "train"), 0, 5)
    assert "[" not in shown and [len(w) for w in shown.split(f" {EVICTED} ")] == [5, 5, 2]


@pytest.mark.parametrize("name", [name for name in TASKS if name != "text"])
def test_records_hold_what_the_batch_holds(name):
    task = TASKS[name]()
    batch = task.batch(batch_rng(3, "test", 0), 2, "test")
    rows = list(records(task, batch))
    assert len(rows) == len(batch.tokens)
    for row, record in enumerate(rows):
        _, tokens, _ = batch.row(row)
        assert record["tokens"] == tokens and json.loads(json.dumps(record)) == record
        assert record["loss"] == np.flatnonzero(batch.loss_mask[row].numpy()).tolist()
        marked = torch.full_like(batch.answers[row], -1)
        for answer in record["answers"]:
            stop = answer["start"] + len(answer["tokens"])
            assert tokens[answer["start"] : stop] == answer["tokens"]
            number = batch.answers[row, answer["start"]]
            assert answer["difficulty"] == batch.difficulty[number]
            marked[answer["start"] : stop] = number
        assert torch.equal(marked, batch.answers[row])


def test_rows_of_one_context_carry_it_each():
    batch: Batch = DEPO.batch(batch_rng(0, "train", 0), 2, "train")
    contexts = [record["context"] for record in records(DEPO, batch)]
    assert contexts == [batch.context[c].tolist() for c in batch.context_row]


def test_the_command_shows_the_stream_it_names(capsys):
    code, out, _ = data(capsys, "depo", "--samples", 2, "--split", "test", "--nodes", 9, "--names", 9)
    task = replace(settings.DEPO, nodes=9, names=9)
    batch = task.batch(batch_rng(EVAL_SEED, "test", 0), 2, "test")
    assert code == 0 and out.startswith(show(task, batch, 0, 8) + "\n")
    assert f"chance {1 / 8:.3f}" in out


def test_the_command_exports_json_lines_and_overwrites_nothing(capsys, tmp_path):
    path = tmp_path / "rows.jsonl"
    code, out, _ = data(capsys, "mqar", "--samples", 3, "--jsonl", path)
    lines = path.read_text().splitlines()
    assert code == 0 and out == f"{path}: {len(lines)} rows\n" and json.loads(lines[0])["answers"]
    code, _, err = data(capsys, "mqar", "--jsonl", path)
    assert code == 2 and "exists" in err and path.read_text().splitlines() == lines


def test_the_command_exports_a_folder_of_datasets_or_nothing(capsys, tmp_path, monkeypatch):
    folder = tmp_path / "set"
    code, out, err = data(capsys, "mqar", "--samples", 3, "--dataset", folder, "--jsonl", tmp_path / "rows")
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert code == 0 and f"{folder}: {len(rows)} rows\n" in out and not err
    assert datasets.load_from_disk(folder).to_list() == rows
    before = sorted(p.name for p in folder.iterdir())
    code, _, err = data(capsys, "mqar", "--dataset", folder)
    assert code == 2 and "exists; name another --dataset" in err
    assert sorted(p.name for p in folder.iterdir()) == before

    def fail(self, path):
        (tmp_path / path).mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(datasets.Dataset, "save_to_disk", fail)
    code, _, err = data(capsys, "mqar", "--dataset", tmp_path / "other")
    assert code == 2 and err == "lmsleep: disk full\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows", "set"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["rule30"], "unknown task"),
        (["depo", "--samples", "0"], "samples"),
        (["depo", "--window", "0"], "window"),
    ],
)
def test_bad_input_is_one_line(capsys, argv, said):
    code, out, err = data(capsys, *argv)
    assert code == 2 and not out and said in err and err.count("\n") == 1


def test_help_lists_the_tasks(capsys):
    code, out, _ = data(capsys, "--help")
    assert code == 0 and all(name in out for name in TASKS)


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m lmsleep data depo --samples 300 | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert "HOP_" in done.stdout and not done.stderr
