"""Hidden states that are kept: to the last bit what would have been computed, and computed once."""

from dataclasses import replace

import pytest
import torch
from conftest import close
from hf_models import family
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lmsleep import SleepConfig, adapt
from lmsleep.hf.finetune import FineTune, pretrained_backbone
from lmsleep.hf.kept import KeptBackbone
from lmsleep.models import HybridConfig
from lmsleep.tasks import MQAR, Batch
from lmsleep.tasks.reading import read_batch
from lmsleep.training import RunConfig, RunFolder, TrainConfig, Trainer
from lmsleep.training.batches import drawn

KINDS = ("gated_delta_net", "kda", "jet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    model = family("llama")
    model.save_pretrained(path)
    return path


def made(folder, kind="gated_delta_net", after=(1,)):
    """Return a frozen model with memory layers that speak."""
    options = FineTune(folder=folder, train="memory", insert=len(after), insert_kind=kind, insert_after=after)
    torch.manual_seed(0)
    backbone = pretrained_backbone(options)
    for p in backbone.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    return backbone


def test_states_of_other_options_are_others(folder, tmp_path):
    backbone = made(folder)
    first = KeptBackbone(backbone, tmp_path, bfloat16=False).folder
    backbone.config.sleep = {"window": 3}  # which changes no hidden state
    assert KeptBackbone(backbone, tmp_path, bfloat16=False).folder == first
    backbone.config.rms_norm_eps *= 2
    assert KeptBackbone(backbone, tmp_path, bfloat16=False).folder != first


def batch(seed, lengths, row_lengths):
    """Return contexts, and two rows of each."""
    g = torch.Generator().manual_seed(seed)
    B, rows = len(lengths), torch.randint(1, 30, (2 * len(lengths), max(row_lengths)), generator=g)
    mask = torch.zeros_like(rows, dtype=torch.bool)
    lasts = torch.tensor([row_lengths[i % len(row_lengths)] for i in range(2 * B)])
    mask[torch.arange(2 * B), lasts - 1] = True
    return Batch(
        tokens=rows,
        loss_mask=mask,
        answers=torch.where(mask, 0, -1),
        difficulty=torch.zeros(2 * B, dtype=torch.int64),
        context=torch.randint(1, 30, (B, max(lengths)), generator=g),
        context_row=torch.arange(B).repeat_interleave(2),
        context_lengths=torch.tensor(lengths),
        lengths=lasts,
    )


def learned(backbone, one, sleep):
    """Return the loss, and the gradient of every weight that is trained."""
    backbone.zero_grad()
    loss = read_batch(backbone, one, sleep).loss
    loss.backward()
    return loss, {name: p.grad for name, p in backbone.named_parameters() if p.requires_grad}


@settings(max_examples=10, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    after=st.sampled_from([(1,), (0, 2), (2, 3), (1, 2, 3)]),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    rows=st.lists(st.integers(2, 4), min_size=1, max_size=3),
    sleep=st.sampled_from(
        [
            SleepConfig(window=4),
            SleepConfig(window=4, passes=2, loop=(1, 4)),
            SleepConfig(window=9, passes=3, loop=(2, 3)),
        ]
    ),
    seed=st.integers(0, 99),
)
def test_losses_and_gradients_are_equal_to_the_last_bit(
    folder, tmp_path_factory, kind, after, lengths, rows, sleep, seed
):
    plain = made(folder, kind, after)
    if sleep.passes > 1 and not set(after) & set(range(*sleep.consolidator.loop)):
        sleep = sleep.with_passes(1)
    kept = KeptBackbone(plain, tmp_path_factory.mktemp("kept"), bfloat16=False)
    one = batch(seed, lengths, rows)
    wanted, grads = learned(plain, one, sleep)
    for _ in range(2):  # made, then read
        loss, found = learned(kept, one, sleep)
        assert torch.equal(loss, wanted)
        for name, grad in grads.items():
            assert (grad is None) == (found[name] is None), name
            assert grad is None or torch.equal(grad, found[name]), name


def test_what_is_frozen_is_run_once(folder, tmp_path):
    kept = KeptBackbone(made(folder, after=(1, 2)), tmp_path, bfloat16=False)
    one, sleep = batch(0, [8, 8], [4]), SleepConfig(window=4)
    ran = []
    for i, block in enumerate(kept.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    learned(kept, one, sleep)
    # Two windows of contexts, and one of rows: of the first nothing was slept on, so all of it is frozen.
    assert [ran.count(i) for i in range(4)] == [3, 3, 3, 3]
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert sorted(len(load_file(file)) for file in files) == [1, 1, 3]
    ran.clear()
    learned(kept, one, sleep)
    assert [ran.count(i) for i in range(4)] == [0, 0, 2, 2]
    assert files == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    # Another context with the same rows.
    learned(kept, replace(one, context=one.context + 1), sleep)
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(files) + 2


def test_what_is_damaged_is_made_again(folder, tmp_path):
    kept = KeptBackbone(made(folder), tmp_path, bfloat16=False)
    one, sleep = batch(1, [4], [4]), SleepConfig(window=4)
    wanted, _ = learned(kept, one, sleep)
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:40])
    assert torch.equal(learned(kept, one, sleep)[0], wanted)
    assert all(load_file(file) for file in tmp_path.rglob("*.safetensors"))


def test_models_places_and_precisions_do_not_meet(folder, tmp_path):
    folders = {
        KeptBackbone(made(folder, after=after), tmp_path, bfloat16=False).folder for after in ((1,), (2,))
    }
    plain = made(folder)
    folders.add(KeptBackbone(plain, tmp_path, bfloat16=True).folder)
    # Weights that are trained do not count, those that are frozen do.
    plain.blocks[1].memory.norm.weight.data.add_(1)
    assert KeptBackbone(plain, tmp_path, bfloat16=True).folder in folders
    plain.blocks[3].mlp.up_proj.weight.data.add_(1)
    assert len(folders | {KeptBackbone(plain, tmp_path, bfloat16=True).folder}) == 4


def test_a_window_that_goes_on_is_refused(folder, tmp_path):
    kept = KeptBackbone(made(folder), tmp_path, bfloat16=False)
    with pytest.raises(ValueError, match="keep: hidden states are kept of windows that begin with nothing"):
        read_batch(kept, batch(0, [4], [4]), SleepConfig(window=4, eviction="sliding"))


def test_rows_that_end_in_different_windows(folder, tmp_path):
    plain = made(folder, after=(1, 2))
    one, sleep = batch(2, [4, 3], [2, 6, 9]), SleepConfig(window=4)
    wanted, _ = learned(plain, one, sleep)
    loss, _ = learned(KeptBackbone(plain, tmp_path, bfloat16=False), one, sleep)
    assert close(loss, wanted, 1e-6)  # padding is cut where nothing else is in attention


def test_other_fast_weights_and_dropout_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="keep: hidden states are kept of models with inserted memory"):
        KeptBackbone(adapt(family("qwen3_next")), tmp_path, bfloat16=False)
    plain = made(folder)
    plain.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="keep: the model has dropout"):
        KeptBackbone(plain, tmp_path, bfloat16=False)


WINDOW = SleepConfig(window=8)


def run_config(folder, sleep=WINDOW, train="memory", **options):
    given = {
        "steps": 4, "batch_size": 2, "lr": 0.01, "adam_lr": 0.01, "eval_batches": 1, "eval_every": 2,
        "threads": 1, "save_every": 1, "warmup": 0,
    }  # fmt: skip
    return RunConfig(
        task=MQAR(pairs=4, keys=6, values=5, queries=2),
        model=FineTune(folder=folder, train=train, insert=2, insert_after=(1, 2)),
        sleep=sleep,
        train=TrainConfig(**{**given, **options}),
    )


def test_a_run_is_the_same_with_and_without(folder, tmp_path):
    ends = []
    for name, keep in (("plain", None), ("kept", tmp_path / "states"), ("again", tmp_path / "states")):
        config = run_config(folder, batches=2, keep=keep)
        run = Trainer(RunFolder.create(tmp_path / name, config), config)
        if name == "kept":
            run.fit(until=3)
            run = Trainer.resume(RunFolder.open(tmp_path / name))
        run.fit()
        report = RunFolder.open(tmp_path / name).report()
        ends.append((report["eval"], report["flops"], dict(run.model.named_parameters())))
    for score, flops, weights in ends[1:]:
        assert (score, flops) == ends[0][:2]
        assert all(torch.equal(p, ends[0][2][name]) for name, p in weights.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "x"}, "^keep: new batches have no kept hidden states; say how many there are: batches"),
        ({"batches": 0}, "^batches must be at least 1, got 0"),
        ({"batches": 3, "curriculum": 4}, "^curriculum=4 must not exceed batches=3"),
        ({"batches": 2, "keep": "x", "train": "lora"}, "^keep: hidden states change where train='lora'"),
        ({"batches": 2, "keep": "x", "sleep": SleepConfig()}, "^keep: windows must begin with nothing"),
        (
            {"batches": 2, "keep": "x", "sleep": SleepConfig(window=4, eviction="sliding")},
            "^keep: windows must begin with nothing in attention; use eviction='hard'",
        ),
        (
            {"batches": 2, "keep": "x", "sleep": SleepConfig(window=4, passes=2)},
            "^keep: a loop over all blocks leaves none",
        ),
    ],
)
def test_what_changes_is_not_kept(options, message, folder):
    with pytest.raises(ValueError, match=message):
        run_config(folder, **options)


def test_hybrids_keep_nothing():
    with pytest.raises(ValueError, match=r"^keep is for memory layers of pretrained models, not for hybrid"):
        RunConfig(
            task=MQAR(), model=HybridConfig(), sleep=SleepConfig(window=4),
            train=TrainConfig(batches=2, keep="x"),
        )  # fmt: skip


@given(batches=st.integers(1, 9), seed=st.integers(0, 99))
def test_each_epoch_reads_every_batch_once(batches, seed):
    train = TrainConfig(batches=batches, seed=seed)
    epochs = [[drawn(step, train) for step in range(e * batches, (e + 1) * batches)] for e in range(3)]
    assert epochs[0] == list(range(batches))
    assert all(sorted(epoch) == epochs[0] for epoch in epochs)
    assert batches < 7 or epochs[1] != epochs[2] != epochs[0]


def test_insert_after_names_each_layer(folder):
    with pytest.raises(ValueError, match=r"^insert_after=\(1, 2\) names 2 blocks for insert=3 layers"):
        FineTune(folder=folder, insert=3, insert_after=(1, 2))
    assert made(folder, after=(0, 3)).config.memory_layers["after"] == [0, 3]
