"""The folder of a run: kills, locks, damage, full disks, foreign code."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_command
from hf_models import HEADS, SMALL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import lmsleep
from lmsleep import HybridConfig, HybridLM
from lmsleep.training import Job, RunFolder, Trainer, run_all

TASK = ["mqar", "--pairs", "2", "--keys", "3", "--values", "2", "--queries", "1"]
SAVING = ["--steps", "4", "--save-every", "2", "--eval-every", "2", "--eval-batches", "1"]
SIZE = [*SAVING, "--batch-size", "2", "--threads", "1", "--window", "4"]
MODEL = ["--d-model", "8", "--num-heads", "1", "--blocks", "attention", "gated_delta_net", "--passes", "2"]
TRAIN = ["train", *TASK, *SIZE, *MODEL]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "log_every", 1)
    before = {*sys.modules}
    yield tmp_path
    for name in {*sys.modules} - before:
        if name.endswith(".py"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "log_every", 1)
        lmsleep.cli.main([*TRAIN, "--out", str(folder)])
    return folder


@pytest.fixture
def run(trained, here):
    shutil.copytree(trained, here / "run")
    return here / "run"


def weights(run) -> dict:
    return RunFolder.open(run).model().state_dict()


def same(run, other) -> bool:
    lines = [[{**line, "seconds": 0} for line in RunFolder(r).metrics()] for r in (run, other)]
    mine, its = weights(run), weights(other)
    return lines[0] == lines[1] and all(torch.equal(mine[name], its[name]) for name in its)


def refused(capsys, *argv) -> str:
    code, _, err = run_command(capsys, *argv)
    assert code == 2 and err.count("\n") == 1, (code, err)
    return err


# Kills


def killed(numbers: str, *argv) -> list[dict]:
    environment = {**os.environ, "PYTHONPATH": str(Path(lmsleep.__file__).parents[1])}
    command = [sys.executable, Path(__file__).with_name("kills.py"), numbers, *map(str, argv)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return list(map(json.loads, done.stdout.splitlines()))


ALL = "0:1000:1"


@pytest.mark.parametrize(
    ("command", "numbers"),
    [
        ("train", "2:1000:30"),
        pytest.param("train", ALL, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
        pytest.param("two stages", ALL, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_a_kill_before_any_operation_on_files_leaves_what_goes_on(command, numbers, here):
    argv = [*TRAIN, "--steps", "2", "--save-every", "1"]
    if command == "two stages":
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS, num_hidden_layers=2)).save_pretrained(here / "llama")
        options = [
            "--preset",
            "two-stage",
            "--insert",
            "1",
            "--passes",
            "1",
            "--steps",
            "2",
            "--save-every",
            "1",
        ]
        argv = ["finetune", here / "llama", "--task", *TASK, *SIZE, *options]
    first, *others = killed(numbers, *argv, "--out", "RUN")
    assert first["code"] == 0 and len(others) > 2
    for one in others:
        assert one["code"] == 0, one
        assert one["files"] == first["files"], one


def test_a_folder_with_what_a_kill_leaves_is_new(here, run, capsys):
    (here / "begun").mkdir()
    (here / "begun/.config.json.123.abcd0123").write_text("{")
    shutil.copy(run / "config.json", here / "begun")  # and no more
    assert run_command(capsys, *TRAIN, "--out", "begun")[0] == 0
    assert same(here / "begun", run)
    assert "exists and is not empty" in refused(capsys, *TRAIN, "--out", "begun")
    (here / "other").mkdir()
    shutil.copy(run / "config.json", here / "other")
    assert "exists and is not empty" in refused(capsys, *TRAIN, "--seed", 1, "--out", "other")


def test_what_kills_left_is_swept_when_a_run_goes_on(here, run, trained, capsys):
    (run / "report.json").unlink()
    shutil.rmtree(run / "checkpoints/step-00000004")
    for name in (".partial-1", ".step-00000001.removed", "branch-00000001", "step-00000001"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "config.json").touch()
    for name in (".report.json.1.ab", ".config.json.1.ab"):
        (run / name).touch()
    assert run_command(capsys, "train", "--resume", run)[0] == 0
    files = {str(p.relative_to(run)) for p in run.rglob("*")} - {".training.lock"}
    assert files == {str(p.relative_to(trained)) for p in trained.rglob("*")} - {".training.lock"}
    assert same(run, trained)


def test_a_model_alone_is_opened_and_never_trained_over(run, capsys):
    for path in run.glob("checkpoints/*/trainer.pt"):
        path.unlink()
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert run_command(capsys, "eval", run, "--batches", 1)[0] == 0
    assert "holds a model alone" in refused(capsys, "train", "--resume", run)
    assert before.items() <= {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}.items()


# Locks


def test_a_run_is_trained_by_one_process_at_a_time(run, capsys):
    other = RunFolder.open(run)
    with other.locked(), other.locked():  # which may be taken again
        said = f"{run} is being trained by another process; wait for it to end"
        assert said in refused(capsys, "train", "--resume", run)
        with pytest.raises(ValueError, match="is being trained by another process"):
            Trainer.take_up(RunFolder.open(run)).fit()
        assert run_command(capsys, "eval", run, "--batches", 1)[0] == 0
    assert run_command(capsys, "train", "--resume", run)[0] == 0


def test_one_folder_is_for_one_job(run):
    job = Job(run, RunFolder.open(run).config())
    with pytest.raises(ValueError, match="two runs have one folder"):
        run_all([job, job])


def test_tasks_of_the_demo_are_named_each_once(capsys):
    assert "each once" in refused(capsys, "demo", "--full", "--tasks", "depo", "depo")


# What cannot begin


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--loop", 0, 1], "loop"),
        (["--backend", "fla"], "backend='fla'"),
        (["--device", "meta"], "device='meta'"),
        (["--device", "vulkan"], "device='vulkan'"),
        (["--batch-size", 100_000_000_000], "batch_size"),
        (["--d-model", 10**12], "model does not fit into memory"),
        (["--seed", -1], "seed"),
        (["--start", "none"], "none"),
    ],
    ids=lambda x: str(x[0]) if isinstance(x, list) else None,
)
def test_what_cannot_begin_leaves_no_folder(options, said, here, capsys):
    err = refused(capsys, *TRAIN, *options, "--out", "a/run")
    assert said in err and not list(here.iterdir())


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_folder_that_cannot_be_is_named_first(place, here, capsys, monkeypatch):
    monkeypatch.setattr(Trainer, "__init__", None)  # nothing is built
    (here / "file").touch()
    assert f"out={place}: " in refused(capsys, *TRAIN, "--out", place)


# Full disks


@pytest.mark.parametrize("room", [0, 600, 5000, 8000])
def test_a_full_disk_is_one_line_that_names_the_file_and_the_run_goes_on(room, here, trained, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))  # what is larger cannot be written
    try:
        err = refused(capsys, *TRAIN, "--out", "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "'run" in err and "enforce fail" not in err
    if (here / "run").exists():
        assert "train --resume run" in err
        assert not list(here.rglob(".partial*"))
        assert run_command(capsys, "train", "--resume", "run")[0] == 0
        assert same(here / "run", trained)
    else:
        assert room < 5000  # for config.json


# Damage


@pytest.mark.parametrize("damage", ["type", "step", "beyond", "shape", "garbage", "gone", "model"])
def test_a_damaged_checkpoint_says_which_one_to_go_on_from(damage, run, trained, capsys):
    path = run / "checkpoints/step-00000004"
    saved = torch.load(path / "trainer.pt", weights_only=True)
    if damage == "garbage":
        (path / "trainer.pt").write_bytes(b"garbage")
    elif damage == "model":
        HybridLM(HybridConfig(d_model=16, num_heads=2, blocks=("attention",))).save_pretrained(path)
    else:
        if damage == "shape":
            for state in saved["optimizers"][0]["state"].values():
                state |= {name: torch.ones(3, 3) for name in state}
        saved |= {"type": {"step": None}, "step": {"step": "xpu"}, "beyond": {"step": 99}}.get(damage, {})
        if damage == "gone":
            del saved["tokens"]
        torch.save(saved, path / "trainer.pt")
    err = refused(capsys, "train", "--resume", run)
    assert f"remove {path}, and the run goes on from step-00000002" in err and "weights_only" not in err
    shutil.rmtree(path)
    assert run_command(capsys, "train", "--resume", run)[0] == 0
    assert same(run, trained)


@pytest.mark.parametrize("line", ["", "{", "[]", '{"step": "xpu"}', "\0\0", "\x80"])
@pytest.mark.parametrize("number", [1, 3])
def test_a_damaged_line_of_metrics_is_named_and_nothing_is_dropped(number, line, run, capsys):
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    lines[number - 1] = line.encode("latin-1")
    path.write_bytes(b"\n".join([*lines, b""]))
    for argv in (["train", "--resume", run], ["plot", run]):
        assert f"metrics.jsonl is damaged or foreign: line {number}, " in refused(capsys, *argv)
    assert path.read_bytes().splitlines() == lines
    assert (run / "report.json").exists()


def test_a_start_of_other_sizes_is_one_line(here, capsys):
    HybridLM(HybridConfig(d_model=16, num_heads=2, blocks=("attention", "gated_delta_net"))).save_pretrained(
        "saved"
    )
    err = refused(capsys, *TRAIN, "--start", "saved", "--out", "run")
    assert "has other weights: weight is [256, 16] instead of [5, 8]" in err


ODD = st.sampled_from([None, True, -1, 0, 1.5, "x", "", [], {}, [[1]], [-1, 2], float("nan"), {"name": "x"}])
FILES = ["config.json", "metrics.jsonl", "report.json", "checkpoints/step-00000004/config.json"]
COMMANDS = [["info"], ["eval", "--batches", "1"], ["plot", "--out", "c.png"], ["train", "--resume"]]


def places(data) -> list[tuple]:
    # Each key or index in JSON, with what holds it.
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [place for key, value in inner for place in ((data, key), *places(value))]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=st.sampled_from(FILES), place=st.integers(0, 10**6), value=ODD, command=st.sampled_from(COMMANDS))
def test_odd_values_in_the_files_of_a_run_are_one_line(
    file, place, value, command, trained, tmp_path_factory, capsys
):
    run = tmp_path_factory.mktemp("odd") / "run"
    shutil.copytree(trained, run)
    lines = (run / file).read_text().splitlines() if file.endswith("l") else [(run / file).read_text()]
    data = list(map(json.loads, lines))
    holder, key = (found := [p for d in data for p in places(d)])[place % len(found)]
    if key == "data_workers":
        return
    holder[key] = value
    (run / file).write_text("".join(json.dumps(d) + "\n" for d in data))
    code, _, err = run_command(capsys, command[0], *command[1:], run)
    said = [line for line in err.splitlines() if line.startswith("lmsleep: ")]
    assert code in (0, 2) and len(said) == (code == 2) and "Traceback" not in err


# Code of others

CODE = """
from dataclasses import dataclass
from pathlib import Path
from lmsleep.ops import RULES, Rule
from lmsleep.sleep import Passes
from lmsleep.tasks import MQAR

Path("was-run").touch()
rule = RULES["gated_linear_rule"]

@dataclass(frozen=True)
class Task(MQAR):
    pass

@dataclass(frozen=True)
class Sleep(Passes):
    pass
"""


def forget(here) -> None:
    # As in another process.
    for name in [n for n in sys.modules if n.endswith(".py")]:
        del sys.modules[name]
    (here / "was-run").unlink(missing_ok=True)


@pytest.fixture
def foreign(run, here):
    # A run that somebody else sends: it brings a file, and names it as it lies here.
    (run / "mine.py").write_text(CODE)
    return run


def name_in(run, where: str, name: str) -> None:
    for file in [run / "config.json", *run.glob("checkpoints/*/config.json")]:
        config = json.loads(file.read_text())
        if where == "task" and "task" in config:
            config["task"]["name"] = name
        elif where == "sleep" and "sleep" in config:
            config["sleep"]["consolidator"]["name"] = name
        elif where == "blocks":
            config.get("model", config)["blocks"] = ["attention", name]
        elif where == "checkpoint" and "task" not in config:
            config["blocks"] = ["attention", name]
        file.write_text(json.dumps(config))


OPENING = [
    ["info"], ["eval", "--batches", "1"], ["inspect"], ["inspect", "--text", "k1"],
    ["ask", "--memory", "a.mem", "k1"], ["read", "--memory", "a.mem", "words.txt"], ["chat"],
    ["probe", "--text", "words.txt"], ["train", "--resume"], [*TRAIN, "--out", "next", "--start"],
]  # fmt: skip


@pytest.mark.parametrize("argv", OPENING, ids=lambda argv: " ".join(argv[:2]))
def test_no_command_runs_a_file_that_a_foreign_run_names(argv, foreign, here, capsys):
    (here / "words.txt").write_text("k1 v1 " * 20)
    command, options = argv[0], argv[1:]
    where = "blocks" if "--start" in argv else "task"
    name_in(foreign, where, "run/mine.py:rule" if where == "blocks" else "run/mine.py:Task")
    call = [*argv, foreign] if argv[-1].startswith("--") else [command, foreign, *options]
    err = refused(capsys, *call)
    assert f"names code, {here}/run/mine.py, which you have trained no run with" in err and "--trust" in err
    assert not (here / "was-run").exists()


@pytest.mark.parametrize("where", ["task", "sleep", "blocks", "checkpoint"])
@pytest.mark.parametrize("form", ["run/mine.py:{}", "{here}/run/mine.py:{}", "run/mine.py"])
def test_a_foreign_file_runs_nowhere_until_it_is_trusted(where, form, foreign, here, capsys):
    kind = {"task": "Task", "sleep": "Sleep"}.get(where, "rule")
    name_in(foreign, where, form.format(kind, here=here))
    argv = ["eval", foreign, "--batches", 1]
    assert "--trust" in refused(capsys, *argv) and not (here / "was-run").exists()
    for call in (lmsleep.open, lambda path: RunFolder.open(path).model()):
        with pytest.raises(PermissionError, match=r"mine\.py"):
            call(foreign)
    assert not (here / "was-run").exists()
    code, _, err = run_command(capsys, *argv, "--trust")
    assert (here / "was-run").exists()
    if form.endswith("{}"):
        assert (code == 0) if where != "checkpoint" else "another configuration" in err


def test_a_saved_model_names_code_as_a_run_does(foreign, here, capsys):
    name_in(foreign, "blocks", "run/mine.py:rule")
    saved = foreign / "checkpoints/step-00000004"
    for call in (lmsleep.open, HybridLM.from_pretrained):
        with pytest.raises(PermissionError, match="you have trained no run with"):
            call(saved)
    assert not (here / "was-run").exists()
    HybridLM.from_pretrained(saved, trust=True)
    assert (here / "was-run").exists()


def test_a_file_that_one_trained_with_runs_until_it_changes(here, capsys):
    (here / "mine.py").write_text(CODE)
    options = [*TRAIN[2:], "--blocks", "attention", "mine.py:rule", "--out", "run"]
    assert run_command(capsys, "train", "mine.py:Task", *options)[0] == 0
    forget(here)
    assert run_command(capsys, "eval", "run", "--batches", 1)[0] == 0 and (here / "was-run").exists()
    forget(here)
    (here / "mine.py").write_text(f"{CODE}\n# another one")
    assert "which has changed since you trained a run with it" in refused(capsys, "info", "run")
    assert not (here / "was-run").exists()
    assert run_command(capsys, "info", "run", "--trust")[0] == 0
    forget(here)
    assert run_command(capsys, "train", "--resume", "run", "--trust")[0] == 0


def test_a_text_that_is_learned_is_no_code_that_may_run(foreign, here, capsys):
    (here / "text.py").write_text(CODE * 20)
    argv = ["train", "text", "--data", "text.py", "--length", 16, *SIZE, *MODEL, "--out", "learned"]
    assert run_command(capsys, *argv)[0] == 0
    name_in(foreign, "task", "text.py:Task")
    assert "you have trained no run with" in refused(capsys, "info", foreign)


def test_without_a_home_the_run_trains_and_its_code_wants_trust(here, capsys, monkeypatch):
    (here / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(here / "file"))
    (here / "mine.py").write_text(CODE)
    assert run_command(capsys, "train", "mine.py:Task", *TRAIN[2:], "--out", "run")[0] == 0
    forget(here)
    assert "--trust" in refused(capsys, "info", "run")
