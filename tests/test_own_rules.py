import json
import re
import sys

import pytest
import torch
from conftest import run_command
from processes import in_a_process_of_its_own

from lmsleep import HybridConfig, HybridLM, ops

RULE = """
import torch
from lmsleep.ops import Rule


def decayed_sum(q, k, v, g, beta, scale, state):
    outputs = []
    for t in range(q.shape[1]):
        write = beta[:, t, :, None, None] * k[:, t, :, :, None] * v[:, t, :, None, :]
        state = g[:, t, :, None, None].exp() * state + write
        outputs.append(scale * (state * q[:, t, :, :, None]).sum(-2))
    return (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v)), state


mine = Rule(decayed_sum)
"""
TINY = "--steps 3 --eval-every 3 --eval-batches 1 --save-every 2 --batch-size 4 --d-model 16 --num-heads 2"
OPTIONS = [*TINY.split(), "--window", "8", "--passes", "2", "--threads", "1", "--device", "cpu"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_rule.py"
    path.write_text(RULE)
    yield path
    sys.modules.pop(str(path), None)


@pytest.mark.slow
def test_a_rule_in_a_file_crosses_every_process(file, tmp_path):
    run, memory = tmp_path / "run", tmp_path / "a.mem"
    blocks = ["--blocks", "attention", "my_rule.py:mine"]
    options = [*OPTIONS, "--data-workers", "1", "--out", run]
    in_a_process_of_its_own(tmp_path, "train", "depo", *blocks, *options)
    assert json.loads((run / "config.json").read_text())["model"]["blocks"] == ["attention", f"{file}:mine"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    in_a_process_of_its_own(elsewhere, "train", "--resume", run)
    assert json.loads(in_a_process_of_its_own(elsewhere, "eval", run, "--batches", 1, "--json"))
    (tmp_path / "graph.txt").write_text("n8 n4 n7 n8 n2 n5 n5 n1 n1 n6 n4 n3 n3 n2 n6 n7")
    in_a_process_of_its_own(elsewhere, "read", run, tmp_path / "graph.txt", "--memory", memory)
    in_a_process_of_its_own(elsewhere, "ask", run, "--memory", memory, "HOP_1 n1")


def test_a_rule_in_a_file_is_the_one_that_it_equals(file):
    own, listed = (HybridConfig(blocks=("attention", kind)) for kind in (f"{file}:mine", "gated_linear"))
    models = []
    for config in (own, listed):
        torch.manual_seed(0)
        models.append(HybridLM(config).double())
    tokens = torch.arange(20)[None]
    assert torch.allclose(models[0](tokens), models[1](tokens), atol=1e-10)
    assert HybridConfig.from_dict(own.to_dict()) == own
    assert ops.find_rule(own.blocks[1]) is ops.find_rule(f"{file}:mine")


GATED = """
from lmsleep.ops import Rule
from lmsleep.ops.rules import kda

mine = Rule(kda.by_token, gates=kda.ChannelGates(), sizes=kda.RULE.sizes)
"""


def test_a_rule_in_a_file_brings_its_gates_and_the_shape_of_its_state(tmp_path):
    (tmp_path / "gated.py").write_text(GATED)
    tokens, outputs = torch.arange(20)[None], []
    for kind in (f"{tmp_path}/gated.py:mine", "kda"):
        torch.manual_seed(0)
        outputs.append(HybridLM(HybridConfig(blocks=("attention", kind))).double()(tokens))
    assert torch.allclose(*outputs, atol=1e-10)


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        (None, "none.py:mine", "there is no file"),
        (RULE, "my_rule.py:other", "has no object 'other'; call the rule .*, one of: mine"),
        (RULE, "my_rule.py:decayed_sum", "is.{0,3}no rule: it must be a lmsleep.ops.Rule"),
        (RULE, "nobody", "unknown rule 'nobody'; choose one of gated_delta_rule.*FILE.py:OBJECT"),
        ("a = b", "my_rule.py:mine", "my_rule.py, line 1: NameError"),
    ],
)
def test_what_is_no_rule_is_said_in_one_line(content, name, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "my_rule.py").write_text(content)
    code, out, err = run_command(capsys, "train", "depo", "--blocks", "attention", name)
    assert code == 2 and re.search(said, err) and err.count("\n") == 1 and not out
    assert not (tmp_path / "runs").exists()
