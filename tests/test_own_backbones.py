import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_command
from processes import in_a_process_of_its_own

import lmsleep
from lmsleep import SleepConfig, sleep_forward
from lmsleep.backbones import BACKBONES, build, find_kind, kind_in, kind_of
from lmsleep.evaluation.cost import cost
from lmsleep.models import HybridConfig
from lmsleep.opening import open_backbone
from lmsleep.tasks import MQAR
from lmsleep.training import RunConfig, RunFolder, TrainConfig, Trainer

DOCS = Path(__file__).parents[1] / "docs" / "carry-on.md"
TINY = "--steps 3 --eval-every 3 --eval-batches 1 --save-every 2 --batch-size 4 --width 16 --data-workers 1"
OPTIONS = [*TINY.split(), "--window", "8", "--passes", "2", "--threads", "1", "--device", "cpu"]
GRAPH = "n8 n4 n7 n8 n2 n5 n5 n1 n1 n6 n4 n3 n3 n2 n6 n7"


def example() -> str:
    # The one that the documentation shows.
    shown = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    (found,) = (code for code in shown if "class DecayingSum" in code)
    return found


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_model.py"
    path.write_text(example())
    yield path
    sys.modules.pop(str(path), None)


def config(file, task=None, **sleep) -> RunConfig:
    cls = find_kind(f"{file}:DecayingSum").options
    return RunConfig(
        task=task or MQAR(pairs=2, keys=8, values=8, queries=1),
        model=cls(width=16),
        sleep=SleepConfig(**{"window": 4, "passes": 2, **sleep}),
        train=TrainConfig(steps=2, batch_size=2, eval_batches=1, threads=1),
    )


def test_a_backbone_in_a_file_crosses_every_process(file, tmp_path):
    run, memory = tmp_path / "run", tmp_path / "a.mem"
    in_a_process_of_its_own(
        tmp_path, "train", "depo", "--backbone", "my_model.py:DecayingSum", *OPTIONS, "--out", run
    )
    written = json.loads((run / "config.json").read_text())["model"]
    task = RunFolder.open(run).config().task
    assert written == {"backbone": f"{file}:DecayingSum", "vocab_size": task.vocab_size, "width": 16}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (run / "report.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000003")  # as if it had been stopped in the last step
    in_a_process_of_its_own(elsewhere, "train", "--resume", run)
    assert json.loads((run / "report.json").read_text())["step"] == 3
    assert json.loads(in_a_process_of_its_own(elsewhere, "eval", run, "--batches", 1, "--json"))
    assert "decaying_sum decaying_sum" in in_a_process_of_its_own(elsewhere, "info", run)
    (tmp_path / "graph.txt").write_text(GRAPH)
    in_a_process_of_its_own(elsewhere, "read", run, tmp_path / "graph.txt", "--memory", memory)
    assert in_a_process_of_its_own(elsewhere, "ask", run, "--memory", memory, "HOP_1 n1").strip()


def test_training_changes_it_and_a_resumed_run_ends_the_same(file, tmp_path):
    whole, parts = (Trainer(RunFolder.create(tmp_path / name, config(file)), config(file)) for name in "ab")
    before = [p.detach().clone() for p in whole.model.parameters()]
    whole.fit()
    parts.fit(until=1)
    parts.save()
    resumed = Trainer.resume(RunFolder.open(tmp_path / "b"))
    resumed.fit()
    ends = [list(t.model.parameters()) for t in (whole, resumed)]
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(before, ends[0], strict=True))


def test_a_saved_model_opens_without_its_run(file, tmp_path):
    run = Trainer(RunFolder.create(tmp_path / "run", config(file)), config(file))
    run.fit()
    saved = run.folder.latest()
    with pytest.raises(ValueError, match=f"tokenizer has 256 tokens, .* only {run.model.vocab_size}"):
        lmsleep.open(saved)
    model, sleep = open_backbone(saved)
    assert kind_in(saved).name == f"{file}:DecayingSum" and (sleep.window, model.training) == (64, False)
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        said = [sleep_forward(m, tokens, None, run.config.sleep).logits for m in (model, run.model)]
    assert torch.equal(*said)


def test_what_it_costs_is_counted_from_its_options(file):
    options = kind_of(config(file).model).fitted(config(file).model, 20)
    figures = cost(options, SleepConfig(window=8, passes=3))
    assert figures["parameters"] == sum(p.numel() for p in build(options).parameters())
    assert figures["break_even_tokens"] is None and figures["fast_weight_bytes"] > 0
    assert figures["flops_sleep"] > 0


def test_configurations_survive_json(file):
    made = config(file)
    assert RunConfig.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert made.model.vocab_size == made.task.vocab_size


def test_listed_kinds_keep_their_names_and_runs_of_before_did_not_name_them(tmp_path):
    assert [*BACKBONES] == ["hybrid", "hf"]
    hybrid = kind_of(HybridConfig())
    assert hybrid.name == "hybrid" and hybrid.to_dict(HybridConfig())["backbone"] == "hybrid"
    old = HybridConfig(d_model=32).to_dict()
    assert lmsleep.backbones.from_dict(old) == HybridConfig(d_model=32)
    assert type(lmsleep.backbones.from_dict({"folder": str(tmp_path)})).__name__ == "FineTune"


def test_training_a_hybrid_needs_no_hf():
    code = "import sys; import lmsleep.training, lmsleep.opening as o; o.open_model('depo-N4'); "
    code += "assert not {m for m in sys.modules if m.startswith(('lmsleep.hf', 'transformers'))}"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        (None, "none.py:Mine", "there is no file"),
        ("example", "my_model.py:Other", "has no class 'Other'; .* one of: DecayingSum"),
        ("example", "my_model.py:Model", "is no backbone: it must be a dataclass .* with a method build"),
        ("example", "nobody", "unknown backbone 'nobody'; choose one of hybrid, hf, FILE.py:CLASS"),
        ("", "hf", "trained by lmsleep finetune MODEL_DIR"),
        ("a = b", "my_model.py:Mine", "my_model.py, line 1: NameError"),
        (
            "import dataclasses\nimport torch\n@dataclasses.dataclass(frozen=True)\nclass Mine:\n"
            "    def build(self): return torch.nn.Linear(2, 2)\n",
            "my_model.py:Mine",
            "builds no backbone: it lacks blocks, device, embed, head",
        ),
    ],
)
def test_what_is_no_backbone_is_said_in_one_line(content, name, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "my_model.py").write_text(example() if content == "example" else content)
    code, out, err = run_command(capsys, "train", "depo", "--backbone", name)
    sys.modules.pop(str(tmp_path / "my_model.py"), None)
    assert code == 2 and re.search(said, err) and err.count("\n") == 1 and not out
    assert not (tmp_path / "runs").exists()


def test_what_is_for_hybrids_is_refused(file, tmp_path, capsys):
    own = ["--backbone", f"{file}:DecayingSum", "--width", 16, "--out", tmp_path / "run"]
    for more, said in (
        (["--baseline", "one-pass-wider"], "this is for hybrids (HybridConfig), not for DecayingSum"),
        (["--start", tmp_path], "start is for hybrid models, not for"),
        (["--loop", 0, 9], "loop=(0, 9) reaches outside the model"),
    ):
        code, _, err = run_command(capsys, "train", "depo", *own, *more)
        assert code == 2 and said in err and not (tmp_path / "run").exists()


def test_damaged_and_foreign_weights_are_named(file, tmp_path):
    run = Trainer(RunFolder.create(tmp_path / "run", config(file)), config(file))
    saved = run.save()
    weights = saved / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="is damaged or foreign"):
        run.folder.model()
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        run.folder.model()
    wider = kind_of(run.config.model)
    wider.save(wider.build(wider.options(width=8)), wider.options(width=8), saved)
    with pytest.raises(ValueError, match="weights of another configuration"):
        run.folder.model()
