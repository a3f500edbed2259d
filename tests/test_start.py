from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import lively, random_tokens, tiny

from lmsleep import HybridLM, SleepConfig, sleep_forward
from lmsleep.cli import main
from lmsleep.tasks import MQAR
from lmsleep.training import RunConfig, RunFolder, TrainConfig, Trainer

TASK = MQAR(pairs=4, keys=6, values=5, queries=2)
PLAIN = tiny("attention", "attention", vocab_size=11)
WIDER = tiny("attention", "gated_delta_net", "attention", vocab_size=11, overrides={1: {"mlp_dim": 0}})


def run(steps: int = 3, **train) -> RunConfig:
    options = {"steps": steps, "batch_size": 4, "lr": 0.01, "adam_lr": 0.01, "eval_batches": 1, "threads": 1}
    model = WIDER if "inserted" in train else PLAIN
    sleep = SleepConfig(window=4, passes=2)
    return RunConfig(task=TASK, model=model, sleep=sleep, train=TrainConfig(**{**options, **train}))


@pytest.fixture
def first(tmp_path) -> Path:
    Trainer(RunFolder.create(tmp_path / "first", run()), run()).fit()
    return tmp_path / "first"


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("passes", [1, 3])
def test_inserted_blocks_change_nothing_at_first(passes):
    source, model = lively(PLAIN, seed=1), lively(WIDER, seed=2)
    tokens, sleep = random_tokens(2, 10), SleepConfig(window=4, passes=passes)
    model.take_weights(source, inserted=[1])
    before, after = (sleep_forward(m, tokens, None, sleep).logits for m in (source, model))
    assert torch.equal(before, after)
    loss = sleep_forward(model, tokens, torch.ones_like(tokens), sleep).loss
    loss.backward()
    assert model.blocks[1].mixer.o_proj.weight.grad.abs().sum() > 0  # and can learn


def test_a_run_goes_on_from_the_weights_of_another(first, tmp_path):
    trainer = Trainer(RunFolder(tmp_path / "next"), run(start=first))
    expected = RunFolder.open(first).model().state_dict()
    assert all(torch.equal(p, expected[name]) for name, p in trainer.model.named_parameters())
    assert trainer.step == 0


def test_a_run_starts_from_a_saved_model_too(tmp_path):
    source = lively(PLAIN, dtype=torch.float32)
    source.save_pretrained(tmp_path / "model")
    trainer = Trainer(RunFolder(tmp_path / "next"), run(start=tmp_path / "model"))
    assert torch.equal(trainer.model.lm_head.weight, source.lm_head.weight)


def test_inserted_blocks_alone_are_trained_and_the_run_resumes_as_if_it_had_not_stopped(first, tmp_path):
    config = run(6, start=first, inserted=(1,), only_inserted=True, save_every=3, eval_every=3)
    whole = Trainer(RunFolder.create(tmp_path / "whole", config), config)
    before = weights(whole)
    whole.fit()
    moved = {name for name, p in weights(whole).items() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith("blocks.1.") for name in moved)
    assert {name for name in before if name.startswith("blocks.1.")} == moved

    parts = Trainer(RunFolder.create(tmp_path / "parts", config), config)
    parts.fit(until=3)
    (first / "config.json").rename(first / "gone")  # resuming needs the checkpoint alone
    resumed = Trainer.resume(RunFolder.open(tmp_path / "parts"))
    resumed.fit()
    assert all(torch.equal(p, weights(whole)[name]) for name, p in weights(resumed).items())


def test_where_a_run_started_is_part_of_its_configuration(first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = run(start=Path("first"), inserted=(1,))
    read = RunConfig.from_dict(config.to_dict())
    assert read == replace(config, train=replace(config.train, start=first))
    assert read.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: run(inserted=(1,)), r"^inserted: blocks are inserted into a model; name it with start"),
        (lambda: run(only_inserted=True), r"^only_inserted leaves nothing to train"),
        (lambda: run(start=Path("x"), inserted=(3,)), r"^inserted: no block 3 among 3 blocks"),
        (
            lambda: HybridLM(WIDER).take_weights(HybridLM(PLAIN)),
            r"^inserted: 3 blocks without \[\] are 3, but",
        ),
        (
            lambda: HybridLM(PLAIN).take_weights(HybridLM(tiny("attention", "gated_linear"))),
            r"^the model to start from has other weights",
        ),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_start_that_is_not_there_leaves_no_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["train", "mqar", "--start", str(tmp_path / "none"), "--out", str(tmp_path / "run")])
    assert leaving.value.code == 2 and "holds no model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
