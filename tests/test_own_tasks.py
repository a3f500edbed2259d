import json
import pickle
import re
import sys
import textwrap
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
import torch
from conftest import run_command

from lmsleep import plugins
from lmsleep.models import HybridConfig
from lmsleep.sleep import SleepConfig
from lmsleep.tasks import Depo, batch_rng, find_task, hide_answers, own, task_name
from lmsleep.training import Job, RunConfig, RunFolder, TrainConfig, run_all

PAGE = Path(__file__).parents[1] / "docs" / "carry-on.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
EXAMPLE = next(textwrap.dedent(text) for text in EXAMPLES if "class Recall" in text)
TINY = "--steps 3 --eval-every 3 --eval-batches 1 --save-every 2 --batch-size 4 --d-model 16 --num-heads 2"
OPTIONS = [*TINY.split(), "--window", "4", "--passes", "2", "--threads", "1"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_task.py"
    path.write_text(EXAMPLE)
    yield path
    sys.modules.pop(str(path), None)


def test_the_example_of_the_docs_is_short_and_solves_its_samples(file):
    assert len([x for x in EXAMPLE.split("@dataclass")[1].splitlines() if x]) <= 20
    task = find_task(f"{file}:Recall")()
    batch = task.batch(batch_rng(0, "train", 0), 20, "train")
    for row in range(20):
        seen, answers = hide_answers(batch, row)
        assert task.solve(seen) == answers and len(answers) == 1
    assert int(batch.tokens.max()) < task.vocab_size


def test_a_task_in_a_file_is_trained_shown_evaluated_and_resumed(file, capsys, tmp_path, monkeypatch):
    out = tmp_path / "run"
    name = f"{file}:Recall"
    code, text, err = run_command(
        capsys, "train", name, "--length", 8, "--out", out, *OPTIONS, "--data-workers", 1
    )
    assert code == 0 and "place=" in text, err
    assert json.loads((out / "config.json").read_text())["task"] == {"name": name, "length": 8}
    sys.modules.pop(str(file))  # as in another process
    monkeypatch.chdir("/")
    code, text, _ = run_command(capsys, "eval", out, "--batches", 1, "--json")
    assert code == 0 and json.loads(text)["floors"]["chance"] == 1 / 9
    code, text, _ = run_command(capsys, "data", name, "--samples", 1)
    assert code == 0 and text.count("[") == 1
    assert run_command(capsys, "train", "--resume", out)[0] == 0


def test_the_folder_of_a_run_is_called_after_the_class(file, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_command(capsys, "train", "my_task.py:Recall", *OPTIONS)[0] == 0
    assert (tmp_path / "runs" / "Recall-N2-seed0" / "report.json").is_file()


@pytest.mark.slow
def test_a_run_of_it_can_be_one_of_many(file, tmp_path):
    config = RunConfig(
        task=find_task(f"{file}:Recall")(),
        model=HybridConfig(d_model=16, num_heads=2, blocks=("attention", "gated_delta_net")),
        sleep=SleepConfig(window=4),
        train=TrainConfig(steps=1, eval_batches=1, batch_size=2, threads=1),
    )
    run_all([Job(tmp_path / "run", config)], workers=1)
    assert RunFolder.open(tmp_path / "run").report()["step"] == 1
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.fixture
def entry_point(monkeypatch):
    def install(value):
        points = EntryPoints([EntryPoint("mine", value, own.TASK.group)])
        monkeypatch.setattr(plugins, "entry_points", lambda group: points.select(group=group))

    return install


def test_an_entry_point_is_a_task_by_its_name(entry_point, capsys):
    entry_point("lmsleep.tasks.depo:Depo")
    assert find_task("mine") is Depo and own.TASK.name_of(Depo, {}) == "mine"
    assert run_command(capsys, "data", "mine", "--samples", 1)[0] == 0
    entry_point("lmsleep.nowhere:Task")
    assert "entry point lmsleep.nowhere:Task of task mine fails" in run_command(capsys, "data", "mine")[2]
    assert "depo, rule110" in run_command(capsys, "data", "yours")[2]
    assert "mine, FILE.py:CLASS" in run_command(capsys, "data", "yours")[2]


def test_listed_tasks_keep_their_names():
    assert task_name(Depo()) == "depo" and find_task("depo") is Depo


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        (None, "my.py:Mine", "there is no file"),
        ("", "my.py:Mine", "my.py has no class 'Mine'; call the task my.py:CLASS, one of: none"),
        (EXAMPLE, "my.py:Mine", "one of: Recall"),
        (EXAMPLE, "my.py", "one of: Recall"),
        ("Mine = 3", "my.py:Mine", "is no task: it must be a dataclass"),
        ("class Mine: pass", "my.py:Mine", "is no task: it must be a dataclass"),
        (
            "import dataclasses\n@dataclasses.dataclass\nclass Mine:\n    vocab_size: int\n",
            "my.py:Mine",
            "it lacks difficulty_name, batch, floors, solve, spell",
        ),
        ("a = 1\nb = c\n", "my.py:Mine", "my.py, line 2: NameError: name 'c' is not defined"),
        ("a = = 1\n", "my.py:Mine", "SyntaxError"),
    ],
)
@pytest.mark.parametrize("command", ["train", "data"])
def test_what_is_no_task_is_said_in_one_line(command, content, name, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "my.py").write_text(content)
    code, out, err = run_command(capsys, command, name)
    assert code == 2 and said in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "runs").exists()


def test_a_run_whose_task_is_gone_says_so(file, capsys, tmp_path):
    out = tmp_path / "run"
    assert run_command(capsys, "train", f"{file}:Recall", "--out", out, *OPTIONS)[0] == 0
    file.unlink()
    sys.modules.pop(str(file))
    code, _, err = run_command(capsys, "eval", out)
    assert code == 2 and "config.json: there is no file" in err and err.count("\n") == 1


def test_a_class_inside_a_function_cannot_be_named():
    class Inner(Depo):
        pass

    with pytest.raises(ValueError, match="must stand at the top"):
        own.TASK.name_of(Inner, {})


def test_paths_and_tuples_come_back(tmp_path):
    (tmp_path / "book.txt").write_text("words " * 500)
    task = find_task("text")(data=(tmp_path / "book.txt",), length=32)
    config = RunConfig(task=task, model=HybridConfig(), sleep=SleepConfig(), train=TrainConfig())
    again = RunConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.task.data[0].is_absolute()
    assert torch.equal(
        again.task.batch(batch_rng(0, "train", 0), 2, "train").tokens,
        task.batch(batch_rng(0, "train", 0), 2, "train").tokens,
    )
