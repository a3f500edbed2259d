"""Checkpoints of sharded runs: written beside training, whole or not at all, read by other processes."""

import os
import pickle
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import ranks
import torch
from conftest import close, tiny
from test_sharding import SLEEP, batch, own_rows
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lmsleep.backbones import build, kind_of
from lmsleep.tasks import MQAR
from lmsleep.training import Objective, RunConfig, RunFolder, TrainConfig
from lmsleep.training import slices as sharded
from lmsleep.training.optim import optimizers
from lmsleep.training.processes import ALONE, Processes
from lmsleep.training.runs import TRAINER
from lmsleep.training.sharding import Shards
from lmsleep.training.slices import Saver, load_optimizers, load_weights, share_out, tensors
from lmsleep.training.step import take_step

TRAIN = TrainConfig(steps=4, lr=0.05, adam_lr=0.05, weight_decay=0.1)
MODEL = tiny("attention", "gated_delta_net", tie_embeddings=True)
CONFIG = RunConfig(model=MODEL, sleep=SLEEP, task=MQAR(), train=TRAIN)


class Run:
    """A run in the steps that a trainer takes, in one process or in those of a group."""

    def __init__(self, path, model=None):
        torch.manual_seed(0)
        self.folder, self.model = RunFolder(path), model or build(CONFIG.model)
        self.objective, self.processes, self.shards = Objective(self.model, TRAIN), ALONE, None
        if torch.distributed.is_initialized():
            world = torch.distributed.get_world_size()
            self.processes = Processes(torch.distributed.get_rank(), world, world, joined=True)
            mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("replicate", "shard"))
            self.shards, self.saver = Shards(self.objective, mesh), Saver(self.processes)
        self.optimizers = optimizers(self.model, TRAIN)

    def train(self, steps):
        for step in steps:
            whole = batch(step)
            parts = own_rows(whole, self.processes.rank, self.processes.size)
            take_step(
                self.objective, parts, SLEEP, self.optimizers, clip=1.0,
                total=whole.num_predicted, processes=self.processes, sharing=self.shards,
            )  # fmt: skip
        return self

    def tensors(self):
        return tensors(kind_of(CONFIG.model).weights(self.model), self.model, self.optimizers)

    def save(self, step):
        final = self.folder.checkpoint(step)
        if self.shards is None:
            final.parent.mkdir(parents=True, exist_ok=True)
            write = lambda folder: kind_of(CONFIG.model).save(self.model, CONFIG.model, folder)  # noqa: E731
            states = [optimizer.state_dict() for optimizer in self.optimizers]
            self.folder.save_checkpoint(final, write, {"step": step, "optimizers": states})
        else:
            self.folder.save_shards(final, self.saver, self.tensors(), {"step": step})
        return self

    @classmethod
    def resumed(cls, path):
        latest = RunFolder(path).latest(resumable=True)
        run = cls(path, RunFolder(path).model_of(latest, CONFIG))
        if (latest / "shards").is_dir():
            load_optimizers(latest, run.model, run.optimizers)
        else:
            saved = torch.load(latest / TRAINER, weights_only=True)
            for optimizer, state in zip(run.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            share_out(run.optimizers)
        return run

    def whole(self):
        return {k: whole(t) for k, t in self.tensors().items()}


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t.clone()


def two_then_two(path):
    """Save after two steps, and go on while it is written."""
    run = Run(path).train(range(2)).save(2)
    at_two = run.whole()
    run.train(range(2, 4)).saver.wait()
    return at_two, run.whole()


def go_on(path):
    return Run.resumed(path).train(range(2, 4)).whole()


def same(found, expected, precision):
    assert found.keys() == expected.keys()
    if precision is None:
        return all(torch.equal(found[k], expected[k]) for k in expected)
    return all(close(found[k], expected[k], precision) for k in expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    (at_two, at_four), _ = ranks.run(2, two_then_two, path)
    return path, at_two, at_four


@pytest.mark.parametrize("world", [1, 2, 3])
def test_as_many_ranks_go_on_exactly_and_others_to_rounding(saved, world):
    path, _, expected = saved
    for found in ranks.run(world, go_on, path):
        assert same(found, expected, None if world == 2 else 1e-3)


def test_one_process_opens_it_and_goes_on(saved):
    path, at_two, at_four = saved
    assert [p.name for p in (path / "checkpoints").iterdir()] == ["step-00000002"]
    run = Run.resumed(path)
    assert same(run.whole(), at_two, None)
    assert same(run.train(range(2, 4)).whole(), at_four, 1e-3)
    model = RunFolder(path).model(config=CONFIG)
    assert model.lm_head.weight is model.embedding.weight


def test_ranks_go_on_with_what_one_process_saved(tmp_path):
    run = Run(tmp_path).train(range(2)).save(2)
    expected = run.train(range(2, 4)).whole()
    for found in ranks.run(2, go_on, tmp_path):
        assert same(found, expected, 1e-3)


def many(path):
    run = Run(path)
    for step in range(1, 5):
        run.train([step]).save(step)
    run.saver.wait()


def test_the_newest_two_stay(tmp_path):
    ranks.run(2, many, tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]


def killed(path, where):
    run = Run(path).train(range(1)).save(1)
    run.saver.wait()

    def die(*args, **kwargs):
        os._exit(9)

    if where == "writing":
        from torch.distributed.checkpoint import filesystem

        filesystem._write_item = die
    elif where == "metadata":
        sharded.FileSystemWriter.finish = die
    else:
        RunFolder._put = die
    run.train(range(1, 2)).save(2)
    run.saver.wait()


@pytest.mark.parametrize(("where", "codes"), [("writing", (9, 9)), ("metadata", None), ("naming", None)])
def test_a_kill_leaves_the_checkpoints_before_and_half_a_hidden_one(tmp_path, where, codes):
    if codes:
        ranks.run(2, killed, tmp_path, where, expect=codes)
    else:
        with pytest.raises(ranks.Failed, match="9"):
            ranks.run(2, killed, tmp_path, where)
    folder = RunFolder(tmp_path)
    found = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert found == [".step-00000002", "step-00000001"] and folder.latest().name == "step-00000001"
    folder.rewind(1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    ranks.run(2, go_on, tmp_path)


def full(path):
    run = Run(path).train(range(1)).save(1)
    run.saver.wait()
    if run.processes.rank == 1:
        from torch.distributed.checkpoint import filesystem

        def fail(*args, **kwargs):
            raise OSError(28, "No space left on device", "a file")

        filesystem._write_item = fail
    run.save(2)
    try:
        run.saver.wait()
    except OSError as error:
        return str(error)


def test_a_full_disk_is_an_error_of_all_ranks(tmp_path):
    assert all("No space left on device" in said for said in ranks.run(2, full, tmp_path))
    assert RunFolder(tmp_path).latest().name == "step-00000001"


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def damage(checkpoint: Path, how: str) -> None:
    slices = sorted((checkpoint / "shards").glob("*.distcp"))
    if how == "a file is gone":
        slices[1].unlink()
    elif how == "a file is cut short":
        slices[0].write_bytes(slices[0].read_bytes()[:2000])
    elif how == "no metadata":
        (checkpoint / "shards/.metadata").unlink()
    elif how == "half of the metadata":
        data = (checkpoint / "shards/.metadata").read_bytes()
        (checkpoint / "shards/.metadata").write_bytes(data[: len(data) // 2])
    else:
        (checkpoint / "shards/.metadata").write_bytes(pickle.dumps(Evil()))


HOW = ("a file is gone", "a file is cut short", "no metadata", "half of the metadata", "code")


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_checkpoint_is_named_and_runs_nothing(saved, tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved[0], tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    damage(folder.latest(), how)
    said = r"step-00000002/shards is damaged or foreign; remove .*step-00000002, and the run goes on from its"
    with pytest.raises(ValueError, match=said):
        folder.model(config=CONFIG)
    assert not (tmp_path / "pwned").exists()


def test_weights_of_another_model_are_named(saved):
    path, _, _ = saved
    latest = RunFolder(path).latest()
    other = build(tiny("attention", "gated_delta_net", tie_embeddings=True, d_model=8))
    with pytest.raises(ValueError, match=r"another configuration: blocks\.0\.mixer\.k_proj\.weight is \["):
        load_weights(latest, kind_of(CONFIG.model).weights(other))
    model = build(CONFIG.model)
    with pytest.raises(ValueError, match="an optimizer of another model"):
        load_optimizers(latest, model, [torch.optim.AdamW([model.embedding.weight])])


def options_of(path):
    from lmsleep.hf.finetune import FineTune

    return FineTune(folder=path / "llama", train="memory", insert=2)


def exported(path, name):
    options = options_of(path)
    torch.manual_seed(0)
    objective = Objective(build(options), TRAIN)
    reading, main = nullcontext(), True
    if torch.distributed.is_initialized():
        world = torch.distributed.get_world_size()
        mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("replicate", "shard"))
        reading, main = Shards(objective, mesh).gathered(), torch.distributed.get_rank() == 0
    with reading:
        if main:
            kind_of(options).export(objective.model, options, SLEEP, path / name, {})


def test_a_pretrained_model_is_exported_while_it_is_gathered(tmp_path):
    from hf_models import family

    family("llama").save_pretrained(tmp_path / "llama")
    exported(tmp_path, "one")
    ranks.run(2, exported, tmp_path, "two")
    one, two = (tmp_path / name / "adapter.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
