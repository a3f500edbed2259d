from dataclasses import replace

import pytest
import torch

from lmsleep import GradientSteps, HybridConfig, HybridLM, SleepConfig, Sliding
from lmsleep.tasks import Depo, batch_rng
from lmsleep.tasks.reading import read_batch
from lmsleep.training import BASELINES, RunConfig, TrainConfig, baseline, baselines, flops_per_step

RUN = RunConfig(
    task=Depo(nodes=6, hops=2, queries=4, names=6, name_lengths=(1, 1), ask="fork"),
    model=HybridConfig(d_model=32, num_heads=4, blocks=("attention", "gated_delta_net"), mlp_dim=48),
    sleep=SleepConfig(window=6, passes=6),
    train=TrainConfig(steps=100, batch_size=4, backprop_passes=2),
)


def parts(config: RunConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in ("task", "model", "sleep", "train")}


def answers(config: RunConfig, *, change_context: bool) -> torch.Tensor:
    torch.manual_seed(0)
    model = HybridLM(config.model)
    batch = config.task.batch(batch_rng(0, "test", 0), 4, "test")
    assert batch.context is not None
    if change_context:
        batch = replace(batch, context=(batch.context + 1) % config.task.vocab_size)
    logits = read_batch(model, batch, config.sleep, return_logits=True).logits
    assert logits is not None
    return logits


def test_names_are_spelt_like_options():
    assert {"transformer-evicted", "one-pass-longer", "looped-awake", "reset-S", "reset-h"} <= set(BASELINES)
    with pytest.raises(ValueError, match=r"^baseline='nap' is unknown; choose one of transformer-cached"):
        baseline("nap", RUN)


@pytest.mark.parametrize(
    ("name", "changed", "sleep"),
    [
        ("transformer-cached", {"model", "sleep", "train"}, {"window": None, "passes": 1}),
        ("transformer-evicted", {"model", "sleep", "train"}, {"passes": 1}),
        (
            "transformer-sliding",
            {"model", "sleep", "train"},
            {"passes": 1, "eviction": Sliding()},
        ),
        ("test-time-training", {"model", "sleep", "train"}, {"consolidator": GradientSteps(2)}),
        ("one-pass", {"sleep", "train"}, {"passes": 1}),
        ("one-pass-longer", {"sleep", "train"}, {"passes": 1}),
        ("one-pass-deeper", {"sleep", "train", "model"}, {"passes": 1}),
        ("one-pass-wider", {"sleep", "train", "model"}, {"passes": 1}),
        ("looped-awake", {"sleep", "train"}, {"passes": 1, "wake_passes": 6}),
        ("reset-S", {"sleep"}, {"reset": "S"}),
        ("reset-h", {"sleep"}, {"reset": "h"}),
    ],
)
def test_a_baseline_changes_what_it_names_and_nothing_else(name, changed, sleep):
    made = baseline(name, RUN)
    before, after = parts(RUN), parts(made)
    assert {part for part in before if before[part] != after[part]} == changed
    cut = None if "train" in changed else 2  # of a single pass, or of gradient steps, nothing is cut
    assert made.sleep == replace(RUN.sleep, **sleep)
    assert made.train == replace(RUN.train, steps=made.train.steps, backprop_passes=cut)
    if name.startswith("transformer"):
        assert made.model == replace(RUN.model, blocks=("attention", "attention"))
    if name == "test-time-training":
        evicted = replace(RUN.model, blocks=("attention", "attention"))
        assert made.model == replace(evicted, overrides={1: {"trained_mlp": True}})
    if name == "one-pass-deeper":
        assert len(made.model.blocks) > 2
        longer = RUN.model.blocks * (len(made.model.blocks) // 2)  # whole patterns
        assert made.model == replace(RUN.model, blocks=longer)
    if name == "one-pass-wider":
        assert made.model.num_heads > 4 and made.model.key_dim == RUN.model.key_dim
        assert made.model.d_model == 8 * made.model.num_heads
        assert made.model.mlp_dim == 12 * made.model.num_heads


@pytest.mark.parametrize("name", ["one-pass-longer", "one-pass-deeper", "one-pass-wider"])
def test_equal_compute_is_equal_to_within_a_step(name):
    made = baseline(name, RUN)
    left = RUN.train.steps * flops_per_step(RUN) - made.train.steps * flops_per_step(made)
    assert 0 <= left < flops_per_step(made)
    assert made.train.steps >= RUN.train.steps


def test_depth_is_added_by_the_shortest_pattern_that_repeats(monkeypatch):
    # A block costs 1 a pass, and 3 are spent besides: twice 7 pay a pass over 11 blocks.
    monkeypatch.setattr(
        baselines, "flops_per_step", lambda run: (len(run.model.blocks) + 3) * run.sleep.passes
    )
    monkeypatch.setattr(baselines, "training_flops", lambda run: 1000)
    twice = replace(RUN, sleep=RUN.sleep.with_passes(2))
    pair, triple = RUN.model.blocks, (*RUN.model.blocks, "attention")
    for blocks, deeper in ((2 * pair, 5 * pair), (pair, 3 * pair), (triple, 3 * triple)):
        made = baseline("one-pass-deeper", replace(twice, model=replace(RUN.model, blocks=blocks)))
        assert made.model.blocks == deeper


@pytest.mark.parametrize("name", ["one-pass-deeper", "one-pass-wider"])
def test_where_no_larger_model_fits_that_is_said(name):
    few = replace(RUN, sleep=RUN.sleep.with_passes(1), train=replace(RUN.train, backprop_passes=None))
    with pytest.raises(ValueError, match="passes=1 cost less than any larger model"):
        baseline(name, few)


def test_a_wider_model_keeps_its_query_groups():
    grouped = replace(RUN, model=replace(RUN.model, num_kv_heads=2))
    wide = baseline("one-pass-wider", grouped).model
    assert wide.num_kv_heads is not None and wide.num_heads == 2 * wide.num_kv_heads > 4


@pytest.mark.parametrize("name", ["one-pass-deeper", "one-pass-wider"])
def test_overrides_of_single_blocks_have_no_larger_model(name):
    with pytest.raises(ValueError, match=r"^overrides"):
        baseline(name, replace(RUN, model=replace(RUN.model, overrides={0: {"mlp_dim": 0}})))


def test_an_evicted_transformer_answers_without_its_context():
    evicted = baseline("transformer-evicted", RUN)
    assert torch.equal(answers(evicted, change_context=False), answers(evicted, change_context=True))


def test_test_time_training_begins_as_the_evicted_transformer():
    models = []
    for name in ("transformer-evicted", "test-time-training"):
        torch.manual_seed(0)
        models.append(HybridLM(baseline(name, RUN).model))
    plain, trained = (dict(model.named_parameters()) for model in models)
    assert set(trained) - set(plain) == {"blocks.1.mlp.scale"}
    assert all(torch.equal(plain[name], trained[name]) for name in plain)


def test_test_time_training_needs_blocks_to_train():
    bare = replace(RUN, model=replace(RUN.model, mlp_dim=0))
    made = baseline("test-time-training", bare).model
    assert [made.for_block(i).hidden_dim > 0 for i in range(2)] == [False, True]  # the other block stays
    with pytest.raises(ValueError, match=r"^blocks: test-time training"):
        baseline("test-time-training", replace(RUN, model=replace(RUN.model, blocks=("attention",))))


@pytest.mark.parametrize("name", sorted(set(BASELINES) - {"transformer-evicted"}))
def test_every_other_baseline_answers_from_its_context(name):
    made = baseline(name, RUN)
    assert not torch.equal(answers(made, change_context=False), answers(made, change_context=True))
