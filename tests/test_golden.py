import json
import shutil

import pytest
import torch
from conftest import close, run_command
from golden import write as golden
from safetensors.torch import load_file

import lmsleep
from lmsleep import Memory, Session
from lmsleep.training import RunFolder, Trainer

CURVES = json.loads((golden.HERE / "losses.json").read_text())


def near(found: list[float], expected: list[float]) -> bool:
    # Measured: at most 2e-8 after six steps in four passes from weights that differ by 1e-15 of themselves.
    return len(found) == len(expected) and close(*map(torch.DoubleTensor, (found, expected)), 1e-6)


def same(found, file: str, tolerance: float) -> bool:
    expected = load_file(golden.HERE / file)
    assert found.keys() == expected.keys()
    return all(close(found[name], expected[name], tolerance) for name in expected)


@pytest.mark.parametrize("sleep", golden.sleeps())
@pytest.mark.parametrize("task", [golden.DEPO, golden.RULE110], ids=lambda task: task["name"])
def test_steps_lose_what_they_lost(task, sleep, tmp_path):
    trainer = Trainer(RunFolder(tmp_path), golden.run_config(task, golden.sleeps()[sleep]))
    assert near(golden.losses(trainer), CURVES[f"{task['name']}-{sleep}"])


@pytest.mark.parametrize("name", ["depo-N1", "depo-N4"])
def test_shipped_models_say_and_write_what_they_did(name):
    assert same(golden.shipped(name), f"{name}.safetensors", 1e-5)


def test_an_old_run_goes_on(tmp_path):
    shutil.copytree(golden.HERE / "run", tmp_path / "run")
    trainer = Trainer.resume(RunFolder.open(tmp_path / "run"))
    assert trainer.step == golden.STEPS // 2
    assert near(golden.losses(trainer), CURVES["run"])


def test_an_old_memory_goes_on(tmp_path, capsys):
    run = RunFolder.open(lmsleep.shipped.find("depo-N4"))
    session = Session.load(golden.HERE / "depo-N4.mem", run.model())
    assert session.stream.tokens == 16 and session.stream.sleeps == 1 and len(session.stream.window) == 8
    assert session.origin.tags["made"] == "golden"
    memory = Memory.load(golden.HERE / "depo-N4-S.mem", run.model())
    assert memory.origin.tokens == 16
    assert all(
        S is None or close(S, T, 1e-5) for S, T in zip(memory.layers, session.memory.layers, strict=True)
    )
    shutil.copy(golden.HERE / "depo-N4.mem", tmp_path)
    code, out, err = run_command(capsys, "ask", "depo-N4", "--memory", tmp_path / "depo-N4.mem", "HOP_3 n1")
    assert (code, out.strip(), err) == (0, "n8", "")


def test_an_old_hugging_face_folder_sleeps_as_it_did():
    assert same(golden.hub_outputs(golden.HERE / "hub"), "hub.safetensors", 1e-5)


# What users and scripts write down: a change here is one for the changelog.


def test_public_names():
    assert golden.public_names() == json.loads((golden.HERE / "names.json").read_text())


def test_flags():
    assert golden.flags() == json.loads((golden.HERE / "flags.json").read_text())
