"""Sharded training against one process: the same steps, by so many collectives."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import ranks
import torch
from collectives import Collectives
from conftest import VOCAB, close, lively, random_tokens, tiny
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lmsleep import GradientSteps, GradMem, InPlace, SleepConfig
from lmsleep.hf.finetune import FineTune, pretrained_backbone
from lmsleep.models import HybridLM
from lmsleep.tasks import Batch
from lmsleep.training import Objective, TrainConfig
from lmsleep.training.optim import optimizers, sleep_at
from lmsleep.training.processes import ALONE, Processes
from lmsleep.training.sharding import Shards
from lmsleep.training.step import take_step

HF_VOCAB = 64  # of hf_models, which takes seconds to import in each rank
KINDS = ("attention", "gated_delta_net", "kda", "gated_linear")
SLEEP = SleepConfig(window=4, passes=4)
STEPS = 2
TRAIN = TrainConfig(steps=STEPS, lr=0.05, adam_lr=0.05, weight_decay=0.1)


def batch(seed, vocab=VOCAB, rows=5, most=10):
    """Rows of other lengths and so windows; of three ranks one has rows, and no token to predict."""
    tokens = random_tokens(rows, most, seed=seed, vocab=vocab)
    lengths = torch.tensor([most, 4, 7, 6, 9][:rows])
    mask = torch.arange(most) >= 2
    mask = mask.repeat(rows, 1)
    mask[1::3] = False
    return Batch(tokens, mask, torch.full_like(tokens, -1), torch.zeros(0), lengths=lengths)


def own_rows(whole, rank, world):
    """The rows of a rank, which may have none."""
    if rank >= len(whole.tokens):
        return []
    mine = {k: getattr(whole, k)[rank::world] for k in ("tokens", "loss_mask", "answers", "lengths")}
    return [replace(whole, **mine)]


def hybrid(**options):
    return lively(tiny(*KINDS, **options))


def tied_across_blocks():
    model = hybrid()
    model.blocks[2].norm.weight = model.blocks[0].norm.weight
    return model


def pretrained_backbone_of(name, bfloat16=False, **options):
    torch.manual_seed(0)
    model = pretrained_backbone(FineTune(folder=FOLDERS[name], **options), bfloat16=bfloat16)
    with torch.no_grad():  # as after some training: adapters and new layers do something
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.05)
    return model


FOLDERS = {}
CASES = {
    "one pass": (hybrid, SLEEP.with_passes(1), TRAIN),
    "two passes": (hybrid, SLEEP.with_passes(2), TRAIN),
    "four passes": (hybrid, SLEEP, TRAIN),
    "parts": (hybrid, SLEEP, replace(TRAIN, accumulate=2)),
    "checkpointed": (hybrid, SLEEP, replace(TRAIN, accumulate=2, checkpoint=True)),
    "truncated": (hybrid, SLEEP, replace(TRAIN, backprop_passes=1)),
    "random passes": (hybrid, SLEEP, replace(TRAIN, random_passes=True)),
    "tied": (lambda: hybrid(tie_embeddings=True), SLEEP, TRAIN),
    "tied across blocks": (tied_across_blocks, SLEEP, TRAIN),
    "test-time training": (
        lambda: lively(tiny("attention", "attention", overrides={1: {"trained_mlp": True}})),
        SleepConfig(window=4, consolidator=GradientSteps(3, rate=0.3)),
        TRAIN,
    ),
    # What a state begins with is a parameter, of no block.
    "memory tokens": (
        lambda: lively(tiny("attention", memory_tokens=3)),
        SleepConfig(window=4, consolidator=GradMem(2, rate=0.3)),
        TRAIN,
    ),
    "in place": (
        lambda: lively(tiny("attention", "gated_delta_net", in_place_mlp=True)),
        SleepConfig(window=4, consolidator=InPlace(2, rate=0.3)),
        TRAIN,
    ),
}
HF_CASES = {
    "lora": (lambda: pretrained_backbone_of("qwen3_5", train="lora", lora=4), SLEEP, TRAIN),
    "memory layers": (
        lambda: pretrained_backbone_of("llama", True, train="memory", insert=2),
        SLEEP.with_passes(2),
        TRAIN,
    ),
    "experts": (lambda: pretrained_backbone_of("qwen3_next", train="full"), SLEEP.with_passes(2), TRAIN),
}


def trained(name, copies=None, rows=5, split=1):
    """Train a few steps: in one process, its rows in as many parts, or sharded with so many copies."""
    make, sleep, train = {**CASES, **HF_CASES}[name]
    objective, processes, shards = Objective(make(), train, bfloat16=name == "memory layers"), ALONE, None
    model = objective.model
    if copies is not None:
        world = torch.distributed.get_world_size()
        processes = Processes(torch.distributed.get_rank(), world, world // copies, joined=True)
        mesh = init_device_mesh("cpu", (copies, world // copies), mesh_dim_names=("replicate", "shard"))
        shards, split = Shards(objective, mesh), world
        assert all(isinstance(p, DTensor) for p in model.parameters())
    both, found = optimizers(model, train), []
    for step in range(STEPS):
        whole = batch(step, HF_VOCAB if name in HF_CASES else VOCAB, rows)
        readers = range(split) if shards is None else [processes.rank]
        parts = [
            part
            for reader in readers
            for some in own_rows(whole, reader, split)
            for part in some.parts(train.accumulate)
        ]
        with Collectives() if step == STEPS - 1 else nullcontext(Collectives()) as counted:
            metrics = take_step(
                objective, parts, sleep_at(step, sleep, train), both,
                clip=1.0, total=whole.num_predicted, processes=processes, sharing=shards,
            )  # fmt: skip
        found.append((metrics.loss, metrics.grad_norm))
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    if shards is not None:
        assert all(isinstance(p, DTensor) for p in model.parameters())
        weights = {n: p.full_tensor() for n, p in weights.items()}
    return found, weights, {k: v for k, v in counted.counts.items() if not k.startswith("all_")}


def several(names, copies, rows=5, folders=()):
    FOLDERS.update(folders)
    return {name: trained(name, copies, rows) for name in names}


def check(name, of_ranks, expected, precision=1e-9):
    """Compare what each rank found with one process."""
    losses, weights, _ = expected
    for rank in of_ranks:
        steps, found, _ = rank[name]
        for step, one in zip(steps, losses, strict=True):
            assert step == pytest.approx(one, rel=precision), name
        assert found.keys() == weights.keys()
        assert all(close(found[k], weights[k], precision) for k in weights), name


@pytest.fixture(scope="module")
def one_process():
    return {name: trained(name) for name in CASES}


FEWER = {"tied across blocks": 1, "test-time training": 3, "memory tokens": 2, "in place": 3}  # units
SOME = ("parts", "truncated", "tied across blocks", "test-time training")


@pytest.mark.parametrize(("world", "names"), [(1, SOME[:1]), (2, tuple(CASES)), (3, SOME)])
def test_any_number_of_ranks_takes_the_steps_of_one_process(world, names, one_process):
    found = ranks.run(world, several, names, 1)
    for name in names:
        check(name, found, one_process[name])
    if world == 1:
        return
    # A gather and a reduction for each of four blocks and the rest, whatever is read, and a small agreement.
    for rank in found:
        for name, (_, _, collectives) in rank.items():
            units = FEWER.get(name, 5)
            assert collectives == {"allgather_base": units, "reduce_scatter_base": units, "allreduce": 1}, (
                name
            )


def test_ranks_without_rows_and_copies_of_slices(one_process):
    names = ("parts", "test-time training")
    found = ranks.run(4, several, names, 2)
    for name in names:
        check(name, found, one_process[name])
    (name,) = few = ("checkpointed",)
    check(name, ranks.run(3, several, few, 1, 2), trained(name, rows=2))


def test_pretrained_models(tmp_path):
    from hf_models import family

    for name in ("qwen3_5", "llama", "qwen3_next"):
        model = family(name)
        if name == "llama":
            model = model.bfloat16()
        model.save_pretrained(tmp_path / name)
        FOLDERS[name] = tmp_path / name
    found = ranks.run(2, several, tuple(HF_CASES), 1, 5, FOLDERS)
    for name in HF_CASES:
        # In parts, since the gradients of other rows together round in bfloat16 elsewhere.
        check(name, found, trained(name, split=2), 1e-3)


def scalar():
    model = HybridLM(tiny("attention"))
    model.blocks[0].temperature = nn.Parameter(torch.tensor(1.0))
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
    with pytest.raises(ValueError, match=r"blocks\.0\.temperature is a number.*give it the shape \[1\]"):
        Shards(Objective(model, TRAIN), mesh)


def two_dtypes():
    model = HybridLM(tiny("attention"))
    model.blocks[0].norm.bfloat16()
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
    with pytest.raises(ValueError, match=r"one dtype, not torch\.bfloat16, torch\.float32"):
        Shards(Objective(model, TRAIN), mesh)


@pytest.mark.parametrize("case", [scalar, two_dtypes])
def test_what_cannot_be_sharded_is_named(case):
    ranks.run(1, case)
