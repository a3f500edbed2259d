from pathlib import Path

import pytest
import torch
from conftest import close
from hf_models import VOCAB, family
from torch import nn

from lmsleep import SleepConfig, adapt, sleep_forward
from lmsleep.hf.finetune import FineTune, memory_layers, merged, pretrained_backbone
from lmsleep.tasks import MQAR
from lmsleep.training import RunConfig, RunFolder, TrainConfig, Trainer

SLEEP = SleepConfig(window=4, passes=2)
TOKENS = torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made: dict[str, Path] = {}

    def saved(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            family(name).save_pretrained(made[name])
        return made[name]

    return saved


def loss_of(backbone):
    return sleep_forward(backbone, TOKENS, torch.ones_like(TOKENS, dtype=torch.bool), SLEEP).loss


def stirred(backbone, seed: int = 0):
    # As after some training: everything that is trained has moved, adapters do something.
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in backbone.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return backbone


# Routers and experts, Mamba-2 whose output projection peft refuses, a layer made of parts.
@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_next", "kimi_linear", "nemotron_h"])
def test_adapters_train_what_they_should_and_merge(name, folder):
    options = FineTune(folder=folder(name), lora=2, lora_alpha=4.0)
    plain, tuned = adapt(family(name)), pretrained_backbone(options)
    assert torch.equal(loss_of(plain), loss_of(tuned))  # new adapters change nothing
    layers, blocks = memory_layers(tuned), tuned.blocks
    assert len(layers) == sum("fast_weights" in kind for kind in tuned.kinds)

    inside = {id(p) for layer in layers for p in layer.parameters()}
    trained = {n: p for n, p in blocks.named_parameters() if p.requires_grad}
    assert {id(p) for p in tuned.parameters() if p.requires_grad} == {id(p) for p in trained.values()}
    assert all("lora_" in n or id(p) in inside for n, p in trained.items())
    for word in ("A_log", "dt_bias", "conv1d.weight"):
        assert sum(n.endswith(word) for n in trained) == len(layers)
    maps = {n for n, m in adapt(family(name)).blocks.named_modules() if isinstance(m, nn.Linear)}
    adapted = {n.partition(".lora_A")[0] for n in trained if "lora_A" in n}
    assert adapted == {n for n in maps if not n.endswith("shared_expert_gate")}

    loss_of(stirred(tuned)).backward()
    idle = {n for n, p in trained.items() if p.grad is None or not p.grad.abs().any()}
    assert not idle
    assert all(p.grad is None for p in tuned.parameters() if not p.requires_grad)

    before = loss_of(tuned)
    assert not close(before, loss_of(plain), 1e-3)
    assert close(loss_of(adapt(merged(tuned, options))), before, 1e-5)
    assert torch.equal(loss_of(tuned), before)  # which merging leaves alone


@pytest.mark.parametrize(("train", "share"), [("memory", 0.5), ("full", 1.0)])
def test_only_the_memory_layers_or_everything(train, share, folder):
    options = FineTune(folder=folder("qwen3_5"), train=train)
    tuned = stirred(pretrained_backbone(options))
    moved = {n for n, p in tuned.model.named_parameters() if p.requires_grad}
    everything = {n for n, _ in tuned.model.named_parameters()}
    assert moved == (everything if train == "full" else {n for n in everything if "linear_attn" in n})
    assert close(loss_of(adapt(merged(tuned, options))), loss_of(tuned), 1e-6)


def test_frozen_matrices_in_bfloat16_give_the_same_result(tmp_path):
    family("qwen3_5").bfloat16().save_pretrained(tmp_path)
    losses = []
    for bfloat16 in (False, True):
        torch.manual_seed(1)  # of the adapters
        tuned = stirred(pretrained_backbone(FineTune(folder=tmp_path, lora=2), bfloat16=bfloat16))
        halved = [p for p in tuned.parameters() if p.dtype is torch.bfloat16]
        assert bool(halved) == bfloat16 and not any(p.requires_grad for p in halved)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(loss_of(tuned))
    assert torch.equal(*losses)
    model = merged(tuned, FineTune(folder=tmp_path, lora=2))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}  # as it was


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "some"}, "^train must be one of lora, memory, full, got 'some'"),
        ({"lora": 0}, "^lora must be a rank of at least 1, got 0"),
        ({"lora_alpha": 0.0}, "^lora_alpha must be positive"),
        ({"lora_dropout": 1.0}, "^lora_dropout must be at least 0 and less than 1, got 1.0"),
        ({"train": "full", "targets": ("q_proj",)}, "^targets are maps that get adapters; train='full' has"),
        ({"targets": ("q", "out_proj")}, "^targets: no linear map is called q; there are down_proj, "),
    ],
)
def test_what_cannot_be_trained_is_named(options, message, folder):
    with pytest.raises(ValueError, match=message):
        pretrained_backbone(FineTune(folder=folder("qwen3_5"), **options))


def run(folder: Path, **options) -> RunConfig:
    task = MQAR(pairs=4, keys=6, values=5, queries=2)
    train = {"steps": 2, "batch_size": 2, "lr": 0.01, "adam_lr": 0.01, "eval_batches": 1, "threads": 1}
    return RunConfig(
        task=task,
        model=FineTune(folder=folder, lora=2, **options),
        sleep=SleepConfig(window=8, passes=2, checkpoint=True),
        train=TrainConfig(**train, warmup=0, save_every=1),
    )


@pytest.mark.parametrize("options", [{"lora_dropout": 0.3}, {"train": "full"}])
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(options, folder, tmp_path):
    config = run(folder("qwen3_5"), **options)
    whole = Trainer(RunFolder.create(tmp_path / "whole", config), config)
    whole.fit()
    Trainer(RunFolder.create(tmp_path / "parts", config), config).fit(until=1)
    resumed = Trainer.resume(RunFolder.open(tmp_path / "parts"))
    resumed.fit()
    ends = [dict(t.model.named_parameters()) for t in (whole, resumed)]
    assert all(torch.equal(p, ends[1][name]) for name, p in ends[0].items())
    reports = [RunFolder.open(tmp_path / name).report()["eval"] for name in ("whole", "parts")]
    assert reports[0] == reports[1]
