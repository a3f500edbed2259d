import json
import re
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import ranks
import torch
from benchmarks.processes import Sent
from conftest import random_tokens, run_command, tiny
from tools import scale

from lmsleep import HybridConfig, HybridLM, SleepConfig
from lmsleep.flops import flop_counter
from lmsleep.recipes.settings import depo, rule110
from lmsleep.recipes.table import published
from lmsleep.training import Objective, TrainConfig, Trainer
from lmsleep.training.batches import draw
from lmsleep.training.compute import count_flops
from lmsleep.training.held import kept_bytes, peak_bytes
from lmsleep.training.optim import optimizers
from lmsleep.training.processes import Processes
from lmsleep.training.scale import (
    Cluster,
    Collective,
    Layout,
    Plan,
    Weights,
    collectives,
    memory,
    rows_of_text,
)
from lmsleep.training.sharing import Copies
from lmsleep.training.simulated import Held, Parts, Simulated, simulate
from lmsleep.training.start import trained_weights
from lmsleep.training.step import take_step

PAIR = ("attention", "gated_delta_net")
SMALL = {"d_model": 32, "num_heads": 2, "vocab_size": 50, "mlp_dim": 64}


def drawn(batch=5, tokens=30, asked=None):
    found = rows_of_text(batch, tokens)
    if asked is not None:
        found = replace(found, loss_mask=found.loss_mask & (torch.arange(tokens) >= tokens - asked))
    return found


def simulated(config, batch, sleep, train, model=None, *, held=True):
    parts = Parts(model or HybridLM(config), bfloat16=train.precision == "bfloat16")
    if not held:  # which takes most of the time
        parts.held = lambda part, h: Held(0, 0, 0)
    return simulate(parts, [batch], sleep, train)


def flops(*given, **options):
    return simulated(*given, held=False, **options).flops


TRAIN = TrainConfig()


@pytest.mark.parametrize(
    ("blocks", "asked", "sleep", "train"),
    [
        (PAIR, None, SleepConfig(window=8, passes=1), TRAIN),
        (PAIR, None, SleepConfig(window=8, passes=3), TRAIN),
        (PAIR, 5, SleepConfig(window=8, passes=1), TRAIN),
        (PAIR, 5, SleepConfig(window=8, passes=4), TRAIN),
        (PAIR, 5, SleepConfig(window=8, passes=4), TrainConfig(backprop_passes=2)),
        (PAIR, 5, SleepConfig(window=None), TRAIN),
        (PAIR, None, SleepConfig(window=8, passes=2, eviction="sliding"), TRAIN),
        (PAIR * 2, 5, SleepConfig(window=10, passes=3, loop="middle"), TRAIN),
        (PAIR, None, SleepConfig(window=8, passes=2), TrainConfig(precision="bfloat16")),
        (("gated_linear", "attention", "gated_delta_net"), 9, SleepConfig(window=8, passes=2), TRAIN),
        (("raven", "attention"), None, SleepConfig(window=16, passes=2), TRAIN),
    ],
)
def test_flops_of_a_step_are_those_that_are_counted_on_real_passes(blocks, asked, sleep, train):
    config, batch = HybridConfig(blocks=blocks, **SMALL), drawn(asked=asked)
    counted = count_flops(Objective(HybridLM(config), train), batch, sleep)
    assert flops(config, batch, sleep, train) == counted


@pytest.mark.parametrize(
    ("kinds", "train", "within"),
    # What recomputes stops when it has all that it needs, before the last products of a pass. A first window
    # has no gradient of S, of which KDA's products are counted by themselves.
    [(PAIR, TrainConfig(checkpoint=True), 0.03), (("attention", "kda"), TRAIN, 0.005)],
)
def test_flops_that_are_not_exact_are_hardly_more(kinds, train, within):
    config, batch, sleep = HybridConfig(blocks=kinds, **SMALL), drawn(), SleepConfig(window=8, passes=3)
    counted = count_flops(Objective(HybridLM(config), train), batch, sleep)
    assert 1 <= flops(config, batch, sleep, train) / counted < 1 + within


@pytest.mark.parametrize("run", [depo("demo", 2, batch_size=6), rule110("demo", 4, batch_size=3)])
def test_the_batch_of_a_run_is_played_as_it_is(run):
    # Contexts that several rows fork; windows of other lengths; no loss where the context is.
    batch = draw(run, 0)
    counted = count_flops(Objective(HybridLM(run.model), run.train), batch, run.sleep)
    assert flops(run.model, batch, run.sleep, run.train) == counted


WIDE = HybridConfig(d_model=64, num_heads=2, vocab_size=50, blocks=PAIR * 2)


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activations_are_what_autograd_keeps(passes, precision):
    train, sleep, batch = (
        TrainConfig(precision=precision),
        SleepConfig(window=24, passes=passes),
        drawn(8, 97),
    )
    model = HybridLM(WIDE)
    objective = Objective(model, train, bfloat16=precision == "bfloat16")
    with kept_bytes(model.parameters()) as kept, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of norms that are not fused
        loss = objective(batch, sleep)
    loss.backward()
    found = simulated(WIDE, batch, sleep, train)
    assert found.activations == pytest.approx(kept.total, rel=0.03)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("backprop_passes", [None, 1])
def test_a_step_never_holds_more_than_is_planned_and_not_much_less(checkpoint, backprop_passes):
    train = TrainConfig(checkpoint=checkpoint, backprop_passes=backprop_passes)
    sleep, batch, model = SleepConfig(window=24, passes=3), drawn(16, 97, asked=20), HybridLM(WIDE)
    objective = Objective(model, train)
    measured = peak_bytes(lambda: objective(batch, sleep).backward())
    found = simulated(WIDE, batch, sleep, train)
    gradients = sum(p.grad.nbytes for p in model.parameters())
    # Gradients grow while activations go, so that not all of both is there at once.
    assert 1 <= (found.activations + found.room + gradients) / measured < 1.3


def test_recomputed_activations_hardly_grow_with_passes():
    def of(checkpoint, passes):
        train = TrainConfig(checkpoint=checkpoint)
        return simulate(parts, [drawn(8, 97, asked=20)], SleepConfig(window=24, passes=passes), train)

    parts = Parts(HybridLM(WIDE), bfloat16=False)
    kept, recomputed = ([of(how, n) for n in (1, 4)] for how in (False, True))
    assert kept[1].activations > 3 * kept[0].activations
    assert recomputed[1].activations < 1.6 * recomputed[0].activations
    assert recomputed[1].flops > 1.25 * kept[1].flops


def test_gradient_steps_are_not_played():
    config = tiny("attention", trained_mlp=True)
    sleep = SleepConfig(window=8, consolidator="gradient-steps", passes=2)
    with pytest.raises(ValueError, match="gradient-steps cannot be played"):
        simulated(config, drawn(), sleep, TRAIN)


@pytest.mark.parametrize(
    "config", [tiny(), tiny(*PAIR * 2, tie_embeddings=True), tiny("kda", "attention", mlp_dim=0)]
)
def test_bytes_of_weights_and_optimizers_are_those_of_real_ones(config):
    model = HybridLM(config)
    weights = Weights.of(model, TRAIN)
    assert weights.nbytes == sum(p.nbytes for p in model.parameters()) == sum(n for n, _ in weights.units)
    groups = optimizers(model, TRAIN)
    model(random_tokens(2, 6)).square().mean().backward()
    for optimizer in groups:
        optimizer.step()
    states = [t for o in groups for state in o.state.values() for t in state.values()]
    assert weights.optimizer_bytes == sum(t.nbytes for t in states)
    with flop_counter() as counter:
        groups[0].step()
    assert weights.muon_flops == counter.get_total_flops()


def test_what_is_frozen_has_no_gradients_and_no_states():
    config, train = tiny(*PAIR, "gated_delta_net"), TrainConfig(start="x", inserted=(2,), only_inserted=True)
    model = trained_weights(HybridLM(config), train)
    weights = Weights.of(model, train)
    block = sum(p.nbytes for p in model.blocks[2].parameters())
    assert weights.gradient_bytes == block < weights.nbytes and [n for _, n in weights.units] == [
        0,
        0,
        block,
        0,
    ]
    found = [*collectives(weights, Layout(4))]
    assert [(c.kind, c.nbytes) for c in found] == [("all-reduce", block)]
    objective = Objective(trained_weights(HybridLM(config), train), train)
    counted = count_flops(objective, drawn(), SleepConfig(window=8, passes=2))
    found, whole = (flops(config, drawn(), SleepConfig(window=8, passes=2), train, m) for m in (model, None))
    assert found == counted < whole  # that of a model which trains all


def test_a_ring_sends_what_it_must():
    reduce, gather = (Collective(kind, 800, 4, 1) for kind in ("all-reduce", "all-gather"))
    assert (reduce.sent, gather.sent) == (1200, 600)
    cluster = Cluster(bandwidth=100, between=10, latency=1, node=4)
    assert gather.seconds(cluster) == 1 + 6 and replace(gather, ranks=8).seconds(cluster) == 1 + 70
    assert replace(gather, stride=2).seconds(cluster) == 1 + 60  # GPUs 0, 2, 4, 6: two nodes


def test_the_page_has_what_the_command_says():
    page = scale.PAGE.read_text()
    assert published(page, {"scale:depo": scale.block("depo")}) == page
    names = re.findall(r"<!-- scale:([\w.-]+) -->\n\| L", page)
    assert names == [*scale.CASES]


def counted(shard):
    """Take steps in this rank; return what each sent: how often, and how many bytes each time."""
    processes, sent = Processes.join("cpu", shard=shard), []
    for passes in (1, 3):
        torch.manual_seed(0)
        # All sizes are even: FSDP2 pads what it cannot divide.
        model = HybridLM(tiny(*PAIR * 2, vocab_size=12))
        batch = replace(drawn(4), tokens=random_tokens(4, 30))
        weights, objective = Weights.of(model, TRAIN), Objective(model, TRAIN)
        sharing = Copies(objective, processes)
        if shard > 1:
            from lmsleep.training.sharding import Shards

            sharing = Shards(objective, processes.mesh(torch.device("cpu")))
        parts, groups = [batch.share(processes.rank, processes.size)], optimizers(model, TRAIN)
        with Sent() as step:
            take_step(
                objective, parts, SleepConfig(window=8, passes=passes), groups, clip=1.0,
                total=batch.num_predicted, processes=processes, sharing=sharing,
            )  # fmt: skip
        sent.append(step.found)
    processes.leave()
    return sent, weights


@pytest.mark.parametrize("shard", [1, 2])
def test_collectives_of_a_step_are_those_that_processes_make_whatever_n(shard):
    (once, thrice), weights = ranks.run(2, counted, shard, group=False)[0]
    assert once == thrice
    names = {
        "allreduce": "all-reduce",
        "allgather_base": "all-gather",
        "all_gather_into_tensor": "all-gather",
    }
    planned = [*collectives(weights, Layout(2, shard), muon=4)]  # float32, on a CPU
    least = min(c.nbytes for c in planned)
    large = [(names.get(n, "reduce-scatter"), size) for n, size in once if size >= least]
    assert sorted(large) == sorted((c.kind, c.nbytes) for c in planned)
    small = [nbytes for _, nbytes in once if nbytes < least]
    assert len(small) <= 4 and sum(small) < 2000  # a step has more of these around it


def test_sharding_takes_the_optimizers_apart_and_moves_more():
    weights, step = Weights.of(HybridLM(tiny()), TRAIN), Simulated(0, 1000, 10)
    alone, copies, shards = (memory(weights, Layout(k, s), step) for k, s in ((1, 1), (8, 1), (8, 8)))
    assert alone == copies and shards["optimizers"] < alone["optimizers"] / 7
    assert shards["gathered"] == weights.nbytes and not copies["gathered"]
    assert memory(weights, Layout(8), step, parts=2)["gradients"] == 2 * copies["gradients"]
    kinds = [c.kind for c in collectives(weights, Layout(8, 8))]
    units = len(weights.units)
    assert kinds.count("reduce-scatter") == units and kinds.count("all-gather") == units + len(weights.stacks)
    mixed = [*collectives(weights, Layout(8, 2))]
    assert {(c.kind, c.ranks, c.stride) for c in mixed} == {
        ("all-gather", 2, 1), ("reduce-scatter", 2, 1), ("all-reduce", 4, 2)
    }  # fmt: skip
    assert not [*collectives(weights, Layout(1))]


@pytest.fixture(scope="module")
def plan():
    return Plan(HybridLM(WIDE), TRAIN, SleepConfig(window=24), drawn(64, 97), Cluster(flops=1e9))


def test_sleeping_costs_no_communication_so_that_its_share_falls_with_passes(plan):
    steps = [plan.step(Layout(8), n) for n in (1, 2, 4)]
    assert len({(s["collectives"], s["sent_bytes"]) for s in steps}) == 1
    shares = [s["communication_seconds"] / s["seconds"] for s in steps]
    assert shares == sorted(shares, reverse=True) and shares[0] > 1.5 * shares[2] > 0
    efficiency = [s["efficiency"] for s in steps]
    assert efficiency == sorted(efficiency) and 0 < efficiency[-1] < 1


def test_the_least_number_of_gpus_is_the_first_that_fits(plan, monkeypatch):
    by = {k: plan.step(Layout(k), 4)["memory_bytes"] for k in (1, 2, 4, 64)}
    assert by[1] > by[2] > by[4] > by[64]
    for bytes_of_a_gpu, least in ((by[2], 2), (by[1], 1), (by[64] - 1, None)):
        monkeypatch.setattr(plan, "cluster", Cluster(memory=bytes_of_a_gpu))
        assert plan.least(1, 4) == least


@pytest.fixture
def model(tmp_path):
    # config.json alone: no weights are needed to plan.
    (tmp_path / "config.json").write_text(json.dumps(WIDE.to_dict()))
    return tmp_path


def test_info_plans_a_step(model, capsys):
    asked = ("info", model, "--gpus", 4, "--shard", 2, "--batch", 8, "--length", 49, "--window", 16)
    code, out, err = run_command(capsys, *asked, "--json")
    assert not code and not err
    found = json.loads(out)
    step, weights = found["training"]["step"], Weights.of(HybridLM(WIDE), TRAIN)
    assert (step["gpus"], step["shard"], step["rows"], step["passes"]) == (4, 2, 2, 4)
    assert step["memory"]["parameters"] == found["parameters"] * 2
    assert step["collectives"] == len([*collectives(weights, Layout(4, 2))]) + 4
    numbers = [(s["gpus"], s["shard"], s["passes"]) for s in found["training"]["steps"]]
    assert numbers == [(k, min(k, 2), n) for k in (1, 4, 8) for n in (1, 2, 4)]
    code, out, _ = run_command(capsys, *asked)
    assert "training on 4 GPUs, a copy on 2 together: 8 rows of 49 tokens" in out and "8, sharded 2" in out


def test_info_plans_the_batches_of_a_run(capsys):
    _, out, _ = run_command(capsys, "info", "depo-N4", "--gpus", 2, "--json")
    found = json.loads(out)["training"]
    assert (found["rows"], found["step"]["rows"], found["window"]) == (64, 32, 8)
    assert found["bfloat16"] is True and found["least_gpus"] == 1


def test_a_plan_reads_its_rows_in_the_parts_that_a_run_does():
    # Six parts of two rows, on one GPU, two, or six; on as many as there are rows, parts of one.
    train = replace(TRAIN, batch_size=12, accumulate=6)
    made = Plan(HybridLM(tiny()), train, SleepConfig(window=8), rows_of_text(12, 17), Cluster())
    kept = {gpus: made.step(Layout(gpus), 1)["memory"] for gpus in (1, 2, 6, 12)}
    assert kept[1]["activations"] == kept[2]["activations"] == kept[6]["activations"]
    assert kept[12]["activations"] == pytest.approx(kept[6]["activations"] / 2, rel=0.2)
    assert kept[2]["gradients"] == 2 * kept[6]["gradients"]  # those of earlier parts, too
    run = Trainer._parts(
        SimpleNamespace(config=SimpleNamespace(train=train), processes=Processes(0, 2), device="cpu"),
        rows_of_text(12, 17).share(0, 2),
    )
    assert [len(part.tokens) for part in run] == [2, 2, 2]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--shard", 2], "--shard plans for --gpus; name how many"),
        (["--flops", 1e9], "--flops plans for --users or --gpus; name how many"),
        (["--checkpoint", "True"], "--checkpoint plans for --gpus"),
        (["--gpus", 0], "gpus must be at least 1, got 0"),
        (["--gpus", 8, "--shard", 3], "shard=3 must divide the gpus=8"),
        (["--gpus", 2, "--shard", 4], "shard=4 must not exceed the gpus=2"),
        (["--gpus", 8, "--batch", 6], "gpus=8 must not exceed the 6 rows"),
        (["--gpus", 2, "--users", 4], "give one of them"),
        (["--gpus", 2, "--batch", 0], "batch_size must be at least 1"),
        (["--gpus", 2, "--length", 1], "a batch has a row of 2 tokens at least"),
        (["--gpus", 2, "--flops", 0], "flops must be above 0"),
        (["--gpus", 2, "--node", 0], "node must be above 0"),
        (["--gpus", 2, "--latency", -1], "latency must not be negative"),
        (["--gpus", 2, "--accumulate", 0], "accumulate must be at least 1"),
        (["--gpus", 2, "--backprop-passes", 9], "backprop_passes must lie in 1 ... passes=4, got 9"),
        (
            ["--gpus", 2, "--batch", 4, "--gpu-memory", 0.001],
            "--gpu-memory 0.001: a step takes",
        ),
        (["--gpus", "many"], "--gpus"),
    ],
)
def test_steps_that_cannot_be_are_refused(given, said, model, capsys):
    if "--gpus" in given and "--length" not in given:
        given = [*given, "--length", 49]
    code, out, err = run_command(capsys, "info", model, "--window", 16, *given)
    assert code == 2 and not out and said in err and err.count("\n") == 1
