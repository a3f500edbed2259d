import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import close, tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lmsleep
from lmsleep import HybridLM, SleepConfig, sleep_forward
from lmsleep.cli import main
from lmsleep.files import write_atomic
from lmsleep.tasks import MQAR, Batch, Depo, Drift, GSMInfinite, Rule110, Text, Variables, batch_rng
from lmsleep.training import (
    Diverged,
    Interrupted,
    Job,
    RunConfig,
    RunFolder,
    TrainConfig,
    Trainer,
    baseline,
    choose_device,
    compute,
    default_workers,
    equal_compute,
    flops_per_step,
    optim,
    run_all,
    training_flops,
)
from lmsleep.training.batches import Batches, draw
from lmsleep.training.compute import count_flops
from lmsleep.training.launch import local
from lmsleep.training.muon import Muon
from lmsleep.training.step import gradients, take_step

TASK = Rule110(width=4, states=2, t=2)
SMALL = {
    "steps": 24, "batch_size": 4, "eval_every": 8, "eval_batches": 1, "save_every": 6, "warmup": 3,
    "device": "cpu", "precision": "float32", "threads": 1,
}  # fmt: skip


def run_config(task=TASK, passes: int = 2, blocks=("attention", "gated_delta_net"), **train) -> RunConfig:
    return RunConfig(
        task=task, model=tiny(*blocks), sleep=SleepConfig(window=4, passes=passes),
        train=TrainConfig(**{**SMALL, **train}),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def log_every_step(monkeypatch):
    monkeypatch.setattr(Trainer, "log_every", 1)


def start(path: Path, config: RunConfig | None = None) -> Trainer:
    config = config or run_config()
    return Trainer(RunFolder.create(path, config), config)


def metrics(folder: RunFolder) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in folder.metrics()]


def assert_same_weights(a: HybridLM, b: HybridLM) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def assert_same_run(a: Trainer, b: Trainer) -> None:
    assert_same_weights(a.model, b.model)
    for mine, other in zip(a.optimizers, b.optimizers, strict=True):
        assert mine.state_dict()["param_groups"] == other.state_dict()["param_groups"]
        for x, y in zip(mine.state.values(), other.state.values(), strict=True):
            assert all(torch.equal(torch.as_tensor(x[k]), torch.as_tensor(y[k])) for k in x)
    assert (a.step, a.tokens, a.flops) == (b.step, b.tokens, b.flops)
    assert metrics(a.folder) == metrics(b.folder)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "log_every", 1)
        run = start(tmp_path_factory.mktemp("runs") / "uninterrupted")
        run.fit()
    return run


class Killed(BaseException):
    pass


# The training step


class Wrapped(torch.nn.Module):
    # As DDP wraps a module: whatever does not pass through forward does not exist for it.
    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *given):
        self.calls += 1
        return self.inner(*given)


@pytest.mark.parametrize("passes", [1, 3])
def test_the_objective_is_one_call_a_part_and_may_be_wrapped(passes):
    config = run_config(FORKED, passes=passes, batch_size=5)
    plain, run = (Trainer(RunFolder("unused"), config) for _ in range(2))
    wrapped = Wrapped(run.objective)
    parts, sleep = run.batches[0].parts(2), config.sleep
    found, expected = (
        take_step(objective, parts, sleep, trainer.optimizers, clip=1.0)
        for objective, trainer in ((wrapped, run), (plain.objective, plain))
    )
    assert wrapped.calls == 2 and found == expected and found.finite
    assert_same_weights(run.model, plain.model)


def test_shares_of_several_processes_add_up_to_the_mean():
    # Rank r reads part r and knows the count of all; DDP would sum the gradients.
    config = run_config(FORKED, batch_size=5)
    run = Trainer(RunFolder("unused"), config)
    run.model.double()
    whole = run.batches[0]
    gradients(run.objective, [whole], config.sleep)
    expected = [p.grad.clone() for p in run.model.parameters()]
    run.model.zero_grad()
    parts = whole.parts(3)
    assert len({part.num_predicted for part in parts}) > 1
    shares = [run.objective(part, config.sleep, whole.num_predicted) for part in parts]
    sum(shares).backward()
    assert all(close(p.grad, g, 1e-9) for p, g in zip(run.model.parameters(), expected, strict=True))


def test_a_batch_that_predicts_nothing_costs_nothing():
    config = run_config()
    run = Trainer(RunFolder("unused"), config)
    batch = run.batches[0]
    silent = replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
    loss = run.objective(silent, config.sleep, batch.num_predicted)
    assert loss == 0 and not loss.requires_grad
    assert gradients(run.objective, [batch, silent], config.sleep) == gradients(
        run.objective, [batch], config.sleep
    )


def test_training_is_the_written_out_loop(tmp_path):
    config = run_config(steps=8, decay=0.5, weight_decay=0.1, clip=0.5)
    run = start(tmp_path / "run", config)
    run.fit(until=6)
    torch.manual_seed(config.train.seed)
    model = HybridLM(config.model)
    muon, adam = optim.optimizers(model, config.train)
    for step, factor in enumerate([1 / 3, 2 / 3, 1, 1, 1, 3 / 4]):
        batch = config.task.batch(batch_rng(0, "train", step), 4, "train")
        out = sleep_forward(
            model, batch.tokens, batch.loss_mask, config.sleep, read_last=False, return_logits=False
        )
        model.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = 0.02 * factor, 0.01 * factor
        muon.step()
        adam.step()
    assert_same_weights(run.model, model)
    assert run.tokens == 6 * 4 * (8 + 1 + 2)


def test_evaluating_and_saving_do_not_disturb_training(tmp_path, uninterrupted):
    run = start(tmp_path / "run", run_config(eval_every=5, eval_batches=2, save_every=7))
    run.fit()
    assert_same_weights(run.model, uninterrupted.model)


def test_the_report_is_the_final_evaluation(uninterrupted):
    report = uninterrupted.folder.report()
    assert report["step"] == 24
    assert report["eval"] == uninterrupted.evaluate(4).to_dict()
    assert report["floors"] == TASK.floors()
    assert_same_weights(uninterrupted.folder.model(), uninterrupted.model)


@pytest.mark.parametrize(
    ("task", "blocks"),
    [
        (Rule110(width=4, states=1, t=1, asked=4), ("attention", "gated_delta_net")),
        (
            Depo(
                nodes=3,
                names=3,
                hops=2,
                queries=2,
                name_lengths=(1, 1),
                ask="fork",
                node_distribution="fixed",
            ),
            ("gated_delta_net", "attention"),
        ),
    ],
    ids=["rule110", "depo"],
)
def test_sixty_steps_lower_the_loss(tmp_path, task, blocks):
    config = run_config(task, blocks=blocks, steps=60, batch_size=32, eval_every=60, save_every=60)
    run = start(tmp_path / "run", config)
    run.fit()
    losses = [line["loss"] for line in run.folder.metrics() if "loss" in line]
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


FORKED = Depo(nodes=4, names=4, hops=2, queries=3, name_lengths=(1, 1), ask="fork")
STORIES = GSMInfinite(subset="medium", ops=(2, 3), mode="forward", noise=False, length=(0, 120))


@pytest.fixture
def essays(tmp_path):
    rows = [{"text": "the quick brown fox " * (1 + i % 7)} for i in range(80)]
    (tmp_path / "essays.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Text(data=(tmp_path / "essays.jsonl",), length=40)


@pytest.mark.parametrize("task", [TASK, FORKED, STORIES, "essays"], ids=["row", "fork", "padded", "text"])
def test_a_step_is_the_same_in_any_number_of_parts(tmp_path, request, task):
    task = request.getfixturevalue(task) if task == "essays" else task
    config, found = run_config(task, batch_size=5), {}
    if task == STORIES:
        config = replace(config, sleep=SleepConfig(window=40, passes=2))
    for accumulate in (1, 2, 5):
        train = replace(config.train, accumulate=accumulate)
        run = Trainer(RunFolder("unused"), replace(config, train=train))
        run.model.double()
        batch = run.batches[0]
        parts = batch.parts(accumulate)
        assert len(parts) == accumulate
        assert sum(part.num_tokens for part in parts) == batch.num_tokens
        loss = gradients(run.objective, parts, run.config.sleep)
        found[accumulate] = (loss, [p.grad for p in run.model.parameters()])
    loss, grads = found.pop(1)
    for other, theirs in found.values():
        assert abs(other - loss) < 1e-6 * loss
        assert all(close(a, b, 1e-9) for a, b in zip(theirs, grads, strict=True))


def test_a_run_in_parts_resumes_exactly_and_sees_the_same_data(tmp_path, uninterrupted):
    config = run_config(accumulate=3)
    whole = start(tmp_path / "whole", config)
    whole.fit(until=8)
    start(tmp_path / "stopped", config).fit(until=7)
    resumed = Trainer.resume(RunFolder.open(tmp_path / "stopped"))
    resumed.fit(until=8)
    assert_same_run(resumed, whole)
    assert whole.flops == 8 * flops_per_step(config) == 8 * flops_per_step(uninterrupted.config)
    for mine, other in zip(whole.folder.metrics(), uninterrupted.folder.metrics(), strict=False):
        assert mine["tokens"] == other["tokens"] and mine["flops"] == other["flops"]
        if "loss" in mine:
            assert abs(mine["loss"] - other["loss"]) < 1e-3  # roundings add up
        else:
            assert mine["eval"]["answers"] == other["eval"]["answers"]


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # no fused norm on the CPU for mixed precision
def test_bfloat16_training_begins_as_float32_and_resumes_exactly(tmp_path, uninterrupted):
    config = run_config(precision="bfloat16")
    whole = start(tmp_path / "whole", config)
    whole.fit(until=10)
    start(tmp_path / "stopped", config).fit(until=7)
    resumed = Trainer.resume(RunFolder.open(tmp_path / "stopped"))
    resumed.fit(until=10)
    assert_same_run(resumed, whole)
    assert {p.dtype for p in whole.model.parameters()} == {torch.float32}
    low, full = next(whole.folder.metrics())["loss"], next(uninterrupted.folder.metrics())["loss"]
    assert 0 < abs(low - full) < 0.02 * full


def test_batches_and_first_weights_do_not_depend_on_the_sleep(tmp_path, monkeypatch):
    seen, original = [], Rule110.batch

    def spy(self, rng, size, split, level=1.0):
        batch = original(self, rng, size, split, level)
        if split == "train":
            seen[-1].append(batch.tokens)
        return batch

    monkeypatch.setattr(Rule110, "batch", spy)
    weights = []
    for passes in (1, 4):
        seen.append([])
        run = start(tmp_path / str(passes), run_config(passes=passes))
        weights.append({k: v.clone() for k, v in run.model.state_dict().items()})
        run.fit(until=5)
    assert len(seen[0]) == len(seen[1]) == 5
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert len({str(tokens.tolist()) for tokens in seen[0]}) == 5
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())


def test_the_seed_decides_weights_and_data(tmp_path, uninterrupted):
    other = start(tmp_path / "other", run_config(seed=1))
    fresh = start(tmp_path / "fresh", run_config(seed=0))
    assert not torch.equal(other.model.embedding.weight, fresh.model.embedding.weight)
    fresh.fit()
    assert_same_run(fresh, uninterrupted)


def test_the_curriculum_raises_the_difficulty(tmp_path, monkeypatch):
    levels, original = [], Rule110.batch

    def spy(self, rng, size, split, level=1.0):
        levels.append((split, level))
        return original(self, rng, size, split, level)

    monkeypatch.setattr(Rule110, "batch", spy)
    start(tmp_path / "run", run_config(curriculum=4, eval_every=3)).fit(until=6)
    assert [level for split, level in levels if split == "train"] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert {level for split, level in levels if split == "test"} == {1.0}


@pytest.mark.parametrize("until", [0, 5, 24, 30])
def test_fit_stops_where_it_is_told_and_never_past_the_end(tmp_path, until):
    run = start(tmp_path / "run")
    score = run.fit(until=until)
    assert run.step == min(until, 24)
    assert (score is not None) == (until >= 24)


# Resuming


@pytest.mark.parametrize("stop", [6, 10, 23])
def test_a_run_resumed_from_its_last_checkpoint_is_exact(tmp_path, uninterrupted, stop):
    start(tmp_path / "run").fit(until=stop)  # what came after the checkpoint at 6, 12 or 18 is repeated
    folder = RunFolder.open(tmp_path / "run")
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # a line that a kill cut short
    run = Trainer.resume(folder)
    assert run.step == stop // 6 * 6
    run.fit()
    assert_same_run(run, uninterrupted)


def test_a_run_may_be_saved_and_resumed_at_any_step(tmp_path, uninterrupted):
    for stop in (1, 7, 8, 20):
        path = tmp_path / "run"
        run = Trainer.resume(RunFolder.open(path)) if path.exists() else start(path)
        run.fit(until=stop)
        run.save()
    run = Trainer.resume(RunFolder.open(path))
    run.fit()
    assert_same_run(run, uninterrupted)


def test_random_passes_are_drawn_anew_each_step_and_again_after_a_resume(tmp_path):
    drawn = []
    sleep = SleepConfig(window=4, passes=3)
    config = replace(run_config(random_passes=True, backprop_passes=2), sleep=sleep)
    whole = start(tmp_path / "whole", config)
    whole.objective.register_forward_pre_hook(lambda _, given: drawn.append(given[1]))
    whole.fit(until=12)
    counts = {passes: sum(s.passes == passes for s in drawn) for passes in (1, 2, 3)}
    assert min(counts.values()) > 0 and set(counts) == {s.passes for s in drawn}
    start(tmp_path / "stopped", config).fit(until=7)
    resumed = Trainer.resume(RunFolder.open(tmp_path / "stopped"))
    resumed.fit(until=12)
    assert_same_weights(resumed.model, whole.model)
    assert resumed.flops == whole.flops


def test_early_steps_make_fewer_passes(tmp_path):
    config = run_config(passes=3, early_steps=4, early_passes=2)
    run = start(tmp_path / "run", config)
    spent = [run.train_step()["flops"] for _ in range(6)]
    counted = [flops_per_step(replace(config, sleep=config.sleep.with_passes(n))) for n in (2, 3)]
    assert spent == [counted[0] * n for n in (1, 2, 3, 4)] + [4 * counted[0] + counted[1] * n for n in (1, 2)]
    shorter = equal_compute(baseline("one-pass", config), config)
    steps, one = config.train.steps, flops_per_step(baseline("one-pass", config))
    assert shorter.train.steps == (4 * counted[0] + (steps - 4) * counted[1]) // one


def test_worker_processes_draw_the_same_batches(tmp_path, uninterrupted):
    config = run_config(data_workers=2)
    start(tmp_path / "run", config).fit(until=9)
    run = Trainer.resume(RunFolder.open(tmp_path / "run"))
    run.fit()
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize("name", ["book.txt", "rows.jsonl"])
def test_documents_come_in_the_same_order_whoever_draws_them(tmp_path, name):
    rows = [{"question": f"{i}? " * (1 + i % 5), "answer": str(i % 7)} for i in range(60)]
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = run_config(Text(data=(tmp_path / name,), length=16), steps=6)
    expected = [draw(config, step) for step in range(6)]
    for workers, first in ((0, 0), (1, 0), (2, 3)):  # the last as after a resume
        train = replace(config.train, data_workers=workers)
        with closing(Batches(replace(config, train=train))) as batches:
            for step in range(first, 6):
                found = vars(batches[step])
                for field, value in vars(expected[step]).items():
                    assert found[field] is value is None or torch.equal(found[field], value), field


KILLED = """
import os, signal, sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from lmsleep.training.workers import leave_with_parent

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=leave_with_parent)
    print(pool.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_leave_with_a_parent_that_was_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    # ends when the last holder of its output is gone, the worker included
    parent = subprocess.run([sys.executable, script], capture_output=True, timeout=60)
    assert parent.returncode == -signal.SIGKILL
    assert int(parent.stdout) > 0


def test_an_older_checkpoint_may_be_chosen(tmp_path, uninterrupted):
    start(tmp_path / "run").fit()
    folder = RunFolder.open(tmp_path / "run")
    assert [p.name for p in folder.checkpoints()] == ["step-00000018", "step-00000024"]
    run = Trainer.resume(folder, folder.checkpoints()[0])
    assert run.step == 18
    run.fit(until=18)  # what is of later steps is dropped, the report and the checkpoint too
    assert max(line["step"] for line in metrics(folder)) == 18
    assert [p.name for p in folder.checkpoints()] == ["step-00000018"] and folder.report() is None
    run.fit()
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_saves(tmp_path, monkeypatch, uninterrupted, signum):
    original, calls, before = Rule110.batch, [], signal.getsignal(signum)

    def batch(self, rng, size, split, level=1.0):
        calls.append(split)
        if calls.count("train") == 11 and split == "train":
            os.kill(os.getpid(), signum)
        return original(self, rng, size, split, level)

    monkeypatch.setattr(Rule110, "batch", batch)
    with pytest.raises(Interrupted, match="step 11") as stopped:
        start(tmp_path / "run").fit()
    assert stopped.value.signum == signum
    assert signal.getsignal(signum) == before
    run = Trainer.resume(RunFolder.open(tmp_path / "run"))
    assert run.step == 11
    run.fit()
    assert_same_run(run, uninterrupted)


SCRIPT = """
import sys, time
from pathlib import Path
from lmsleep.tasks import Rule110
from lmsleep.training import Interrupted, RunFolder, Trainer

Trainer.log_every = 1
path, go = map(Path, sys.argv[1:])
original, calls = Rule110.batch, 0

def batch(self, rng, size, split, level=1.0):
    global calls
    calls += split == "train"
    if calls == 14 and split == "train":
        print("in the middle of a step", flush=True)
        while not go.exists():
            time.sleep(0.01)
    return original(self, rng, size, split, level)

Rule110.batch = batch
folder = RunFolder.open(path)
try:
    Trainer(folder, folder.config()).fit()
except Interrupted as stop:
    sys.exit(128 + stop.signum)
"""


@pytest.mark.parametrize(
    ("signum", "code", "step"), [(signal.SIGTERM, 143, 14), (signal.SIGKILL, -9, 12)], ids=["TERM", "KILL"]
)
def test_a_process_that_is_killed_can_be_resumed(tmp_path, uninterrupted, signum, code, step):
    path, go, script = tmp_path / "run", tmp_path / "go", tmp_path / "script.py"
    script.write_text(SCRIPT)
    RunFolder.create(path, run_config())
    environment = {**os.environ, "PYTHONPATH": str(Path(lmsleep.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, script, path, go], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        said = process.stdout.readline()
        process.send_signal(signum)
        go.touch()
        assert process.wait(60) == code
    assert said == b"in the middle of a step\n"
    run = Trainer.resume(RunFolder.open(path))
    assert run.step == step
    run.fit()
    assert_same_run(run, uninterrupted)


def raise_in(monkeypatch, fault: str) -> None:
    # The next checkpoint dies half-way.
    if fault == "torch.save":
        original = torch.save

        def half(obj, file):
            whole = io.BytesIO()
            original(obj, whole)
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            raise Killed

        monkeypatch.setattr(torch, "save", half)
    elif fault == "rename":

        def rename(self, target):
            raise Killed

        monkeypatch.setattr(Path, "rename", rename)
    else:

        def fsync(handle):
            raise Killed if fault == "kill" else OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("fault", ["torch.save", "rename", "kill", "disk full"])
def test_a_kill_in_the_middle_of_a_checkpoint_leaves_the_one_before(tmp_path, uninterrupted, fault):
    run = start(tmp_path / "run")
    run.fit(until=11)
    with pytest.MonkeyPatch.context() as patch, pytest.raises((Killed, OSError)):
        raise_in(patch, fault)
        run.fit()
    folder = RunFolder.open(tmp_path / "run")
    assert [p.name for p in folder.checkpoints()] == ["step-00000006"]
    resumed = Trainer.resume(folder)
    assert resumed.step == 6
    resumed.fit()
    assert_same_run(resumed, uninterrupted)


def test_a_damaged_configuration_is_not_mistaken_for_no_run(tmp_path):
    RunFolder.create(tmp_path / "run", run_config())
    path = tmp_path / "run/config.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        RunFolder.open(tmp_path / "run")


def test_a_leftover_of_a_half_written_checkpoint_is_ignored(tmp_path, uninterrupted):
    start(tmp_path / "run").fit(until=12)
    folder = RunFolder.open(tmp_path / "run")
    leftover = folder.path / "checkpoints/.partial"
    leftover.mkdir()
    (leftover / "trainer.pt").write_bytes(b"half of a f")
    run = Trainer.resume(folder)
    assert run.step == 12
    run.fit()
    assert_same_run(run, uninterrupted)
    assert {p.name for p in folder.latest().iterdir()} == {"config.json", "model.safetensors", "trainer.pt"}
    assert not leftover.exists()


# Divergence


def non_finite(loss, model, where: str):
    if where == "loss":
        return loss * torch.nan
    # The loss is finite, its gradient is not: the slope of a square root at zero.
    weight = model.lm_head.weight
    return loss + (weight - weight.detach()).abs().sqrt().sum()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_run_that_diverges_stops_with_the_state_before(tmp_path, uninterrupted, where):
    run = start(tmp_path / "run")
    broken = run.objective.register_forward_hook(
        lambda _, given, loss: non_finite(loss, run.model, where) if run.step == 8 else loss
    )
    with pytest.raises(Diverged, match="step 8"):
        run.fit()
    broken.remove()
    assert run.step == 8
    folder = RunFolder.open(tmp_path / "run")
    state = folder.path / "checkpoints" / "diverged-00000008"
    eight = start(tmp_path / "eight")
    eight.fit(until=8)
    assert_same_weights(HybridLM.from_pretrained(state), eight.model)
    assert [p.name for p in folder.checkpoints()] == ["step-00000006"]
    for checkpoint, step in ((state, 8), (None, 6)):
        resumed = Trainer.resume(folder, checkpoint)
        assert resumed.step == step
        resumed.fit(until=11)
    resumed.fit()
    assert_same_run(resumed, uninterrupted)


# Run folders


@pytest.fixture
def documents(tmp_path):
    paths = (tmp_path / "a.txt", tmp_path / "b.txt")
    for path in paths:
        path.write_text("sleep " * 200)
    return paths


def configs(documents) -> list[RunConfig]:
    return [
        run_config(Depo(nodes=5, names=9, name_lengths=(1, 3), queries=2, ask="fork", held_out_cycles=True)),
        run_config(Rule110(boundary="zero", asked=3), threads=None, tensorboard=True),
        run_config(Text(data=documents, length=50)),
        replace(
            run_config(backprop_passes=2, checkpoint=True),
            sleep=SleepConfig(window=7, passes=4, eviction="sliding", loop=(0, 1)),
            model=tiny("gated_linear", "attention", vocab_size=3, overrides={1: {"mlp_dim": 0}}),
        ),
    ]  # fmt: skip


def test_configurations_survive_json_and_the_folder(tmp_path, documents):
    for number, config in enumerate(configs(documents)):
        assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        RunFolder.create(tmp_path / str(number), config)
        assert RunFolder.open(tmp_path / str(number)).config() == config


def test_relative_documents_are_found_from_another_folder(tmp_path, documents, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = run_config(Text(data=(Path("a.txt"),), length=50))
    (tmp_path / "elsewhere").mkdir()
    data = json.loads(json.dumps(config.to_dict()))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert RunConfig.from_dict(data).task.data == (tmp_path / "a.txt",)


def test_the_vocabulary_is_that_of_the_task():
    assert run_config(TASK).model.vocab_size == 3
    assert run_config(Depo()).model.vocab_size == Depo().vocab_size


def test_a_folder_with_anything_in_it_is_not_overwritten(tmp_path):
    (tmp_path / "run").mkdir()
    RunFolder.create(tmp_path / "run", run_config())  # an empty one will do
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(FileExistsError, match=re.escape(str(tmp_path / "run"))):
        RunFolder.create(tmp_path / "run", run_config(seed=1))
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_only_a_run_is_opened(tmp_path):
    HybridLM(tiny()).save_pretrained(tmp_path / "model")
    for path in (tmp_path / "none", tmp_path / "model"):
        with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
            RunFolder.open(path)
    folder = RunFolder.create(tmp_path / "run", run_config())
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "run"))):
        Trainer.resume(folder)


@pytest.mark.parametrize("section", ["task", "model", "sleep", "train"])
def test_unknown_and_missing_parts_of_a_configuration_are_named(section):
    data = run_config().to_dict()
    with pytest.raises(ValueError, match="hopz"):
        RunConfig.from_dict({**data, section: {**data[section], "hopz": 3}})
    del data[section]
    with pytest.raises(ValueError, match=section):
        RunConfig.from_dict(data)


def test_an_unknown_task_is_named():
    data = run_config().to_dict()
    with pytest.raises(ValueError, match=r"rule30.*depo, rule110, .*text"):
        RunConfig.from_dict({**data, "task": {"name": "rule30"}})


def test_a_loop_outside_the_model_is_named():
    with pytest.raises(ValueError, match="loop"):
        replace(run_config(), sleep=SleepConfig(window=4, loop=(1, 3)))


@pytest.mark.parametrize("content", ["", "{", '{"train": {', '{"train": {}}', "[]", "3", "null", '["train"]'])
def test_a_damaged_configuration_is_named(tmp_path, content):
    RunFolder.create(tmp_path / "run", run_config())
    path = tmp_path / "run" / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        RunFolder(tmp_path / "run").config()
    # However it is opened, the message leads to the file and there is no other kind of error.
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(str(tmp_path / "run"))):
        RunFolder.open(tmp_path / "run").config()


@pytest.mark.parametrize(
    "damage", ["empty", "cut", "cut late", "garbage", "list", "keys", "optimizers", "step"]
)
def test_a_damaged_trainer_state_is_named(tmp_path, damage):
    run = start(tmp_path / "run")
    run.fit(until=6)
    path = run.folder.latest() / "trainer.pt"
    data, saved = path.read_bytes(), torch.load(path, weights_only=True)
    contents = {
        "empty": b"",
        "cut": data[: len(data) // 2],
        "cut late": data[:-10],
        "garbage": b"garbage" * 9,
    }
    objects = {
        "list": [1, 2],
        "keys": {},
        "optimizers": {**saved, "optimizers": saved["optimizers"][:1]},
        "step": {k: v for k, v in saved.items() if k != "step"},
    }
    if damage in contents:
        path.write_bytes(contents[damage])
    else:
        torch.save(objects[damage], path)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        Trainer.resume(run.folder)


def test_a_damaged_or_foreign_model_is_named(tmp_path):
    run = start(tmp_path / "run")
    run.fit(until=6)
    checkpoint = run.folder.latest()
    HybridLM(tiny("attention", vocab_size=3)).save_pretrained(checkpoint)
    with pytest.raises(ValueError, match=re.escape(str(checkpoint))):
        Trainer.resume(run.folder)
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        Trainer.resume(run.folder)


# Files


@pytest.mark.parametrize("fault", ["disk full", "kill", "rename"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, fault):
    path = tmp_path / "file"
    if fault == "rename":
        path.mkdir()  # a file cannot replace a folder
    else:
        path.write_bytes(b"old")
        raise_in(monkeypatch, fault)
    with pytest.raises((OSError, Killed)):
        write_atomic(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.is_dir() if fault == "rename" else path.read_bytes() == b"old"


def test_a_write_replaces_the_file(tmp_path):
    path = tmp_path / "file"
    for content in (b"old", b"new"):
        write_atomic(path, content)
        assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_written_file_is_as_readable_as_any_other(tmp_path):
    (tmp_path / "ordinary").touch()
    write_atomic(tmp_path / "file", b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


# Optimisation


@pytest.mark.parametrize("tied", [False, True])
def test_muon_gets_the_matrices_of_the_blocks_and_adamw_all_else(tied):
    blocks = ("attention", "gated_delta_net", "gated_linear")
    model = HybridLM(tiny(*blocks, qk_norm=True, tie_embeddings=tied))
    mlp = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    qkvo = ["mixer.q_proj", "mixer.k_proj", "mixer.v_proj", "mixer.o_proj"]
    matrices = {f"blocks.{i}.{name}.weight" for i in range(3) for name in qkvo + mlp}
    matrices |= {f"blocks.{i}.mixer.g_proj.weight" for i in (1, 2)}
    named = dict(model.named_parameters())
    muon, adam = optim.optimizers(model, TrainConfig())
    groups = [[p for group in o.param_groups for p in group["params"]] for o in (muon, adam)]
    assert (type(muon), type(adam)) == (Muon, torch.optim.AdamW)
    assert {name for name, p in named.items() if any(p is q for q in groups[0])} == matrices
    assert {name for name, p in named.items() if any(p is q for q in groups[1])} == set(named) - matrices
    assert len(groups[0]) + len(groups[1]) == len(named)


def test_learning_rates_and_weight_decay_reach_the_optimizers(tmp_path):
    run = start(tmp_path / "run", run_config(lr=0.3, adam_lr=0.2, weight_decay=0.1, warmup=4))
    run.fit(until=2)
    assert [o.param_groups[0]["lr"] for o in run.optimizers] == [0.15, 0.1]
    assert [o.param_groups[0]["weight_decay"] for o in run.optimizers] == [0.1, 0.1]


def test_schedule_by_hand():
    config = TrainConfig(steps=10, warmup=2, decay=0.4)
    factors = [optim.schedule(step, config) for step in range(10)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25], rel=1e-12)
    flat = TrainConfig(steps=10, warmup=0, decay=0.0)
    assert [optim.schedule(step, flat) for step in range(10)] == [1.0] * 10


@pytest.mark.parametrize("decay", [0.1, 0.3, 0.9])
@pytest.mark.parametrize("steps", [10, 37, 100])
def test_schedule_does_not_know_its_length_before_the_fall(steps, decay):
    short = TrainConfig(steps=steps, warmup=5, decay=decay)
    long = replace(short, steps=10 * steps)
    fall = int((1 - decay) * steps)
    for step in range(fall + 1):
        assert optim.schedule(step, short) == optim.schedule(step, long)
    if fall + 2 < steps:
        assert optim.schedule(fall + 2, short) < optim.schedule(fall + 2, long)
    assert all(optim.schedule(step, short) > 0 for step in range(steps))


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0}, {"batch_size": 0}, {"eval_every": 0}, {"eval_batches": 0}, {"save_every": 0},
        {"lr": 0.0}, {"adam_lr": -1.0}, {"clip": 0.0}, {"weight_decay": -0.1}, {"warmup": -1},
        {"accumulate": 0}, {"accumulate": 65},
        {"curriculum": -1}, {"seed": -1}, {"decay": 1.5}, {"decay": -0.1}, {"precision": "float16"},
        {"threads": -1}, {"lr": float("nan")},
    ],
)  # fmt: skip
def test_an_invalid_training_option_is_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        TrainConfig(**change)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_named(tmp_path):
    with pytest.raises(ValueError, match="device='cuda'"):
        start(tmp_path / "run", run_config(device="cuda"))


def test_a_run_stopped_before_its_first_checkpoint_begins_again(tmp_path):
    start(tmp_path / "run", run_config(save_every=100)).fit(until=5)
    trainer = Trainer.take_up(RunFolder.open(tmp_path / "run"))
    assert trainer.step == 0
    trainer.fit(until=0)
    assert not list(trainer.folder.metrics())


def test_foreign_metrics_are_named(tmp_path):
    folder = start(tmp_path / "run").folder
    (folder.path / "metrics.jsonl").write_text('{"loss": 1.0, "step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged or foreign"):
        list(folder.metrics())


def test_a_device_that_there_is_not_is_named():
    with pytest.raises(ValueError, match="device='foo' cannot compute here"):
        choose_device("foo")


@pytest.mark.parametrize(
    ("task", "window"),
    [(Rule110(width=6, states=2, t=1), 5), (Depo(nodes=4, names=4, name_lengths=(1, 1), hops=2), 16)],
)
def test_a_window_with_context_and_answers_in_it_is_refused(task, window):
    run = replace(run_config(), task=task, sleep=SleepConfig(window=task.inline_context))
    with pytest.raises(ValueError, match=f"window={window} .*divides the {task.inline_context} tokens"):
        replace(run, sleep=SleepConfig(window=window))
    for sleep in (SleepConfig(), SleepConfig(window=window, eviction="sliding")):  # these look back
        replace(run, sleep=sleep)
    asked_apart = Depo(nodes=4, names=4, name_lengths=(1, 1), hops=2, queries=2, ask="fork")
    replace(run, task=asked_apart, sleep=SleepConfig(window=5))


def test_what_cannot_be_drawn_leaves_no_folder(tmp_path, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["train", "gsm-infinite", "--no-noise", "--length", "0", "20", "--out", str(tmp_path / "run")])
    assert leaving.value.code == 2 and "too short" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# TensorBoard


def scalars(path: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(path)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_holds_the_metrics_once_also_after_a_resume(tmp_path):
    config = run_config(tensorboard=True)
    start(tmp_path / "run", config).fit(until=9)  # steps 9 and on are repeated from the checkpoint before
    Trainer.resume(RunFolder(tmp_path / "run")).fit()
    written = scalars(tmp_path / "run")
    metrics = list(RunFolder(tmp_path / "run").metrics())
    for key in ("loss", "grad_norm"):
        expected = [(m["step"], m[key]) for m in metrics if key in m]
        assert written[key] == [(step, pytest.approx(value)) for step, value in expected]
    assert [s for s, _ in written["eval/accuracy"]] == [m["step"] for m in metrics if "eval" in m]


def test_tensorboard_that_is_not_installed_is_named_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lmsleep.training.loop.installed", lambda: False)
    with pytest.raises(SystemExit) as leaving:
        main(["train", "depo", "--tensorboard", "--out", str(tmp_path / "run")])
    assert leaving.value.code == 2 and "lmsleep[track]" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# Many runs


def test_a_run_continued_from_its_shorter_twin_is_exact(tmp_path, monkeypatch, uninterrupted):
    monkeypatch.setenv("PYTHONPATH", str(Path(lmsleep.__file__).parents[1]))
    short = run_config(steps=12, decay=0.25)
    long = replace(short, train=replace(short.train, steps=24))
    run_all([Job(tmp_path / "long", long, Job(tmp_path / "short", short))], workers=1)
    for name, config in (("long", long), ("short", short)):
        alone = start(tmp_path / f"{name} alone", config)
        alone.fit()
        folder = RunFolder.open(tmp_path / name)
        assert_same_weights(folder.model(), alone.model)
        assert folder.report()["eval"] == alone.folder.report()["eval"]
        assert asdict(folder.config().train) == asdict(config.train)


def test_a_run_started_again_from_nothing_forgets_its_old_metrics(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(lmsleep.__file__).parents[1]))
    config = run_config(steps=12, save_every=12)
    start(tmp_path / "run", config).fit(until=11)  # stopped before its first checkpoint
    run_all([Job(tmp_path / "run", config)], workers=1)
    steps = [line["step"] for line in RunFolder(tmp_path / "run").metrics() if "loss" in line]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize(("gpus", "workers", "dealt"), [(0, 2, []), (2, 2, [0, 1]), (2, 3, [0, 1, 0])])
def test_workers_share_gpus_and_cores(monkeypatch, gpus, workers, dealt):
    monkeypatch.setattr(local, "leave_with_parent", lambda *ignored: None)
    monkeypatch.setattr(local.tqdm, "set_lock", lambda lock: None)
    monkeypatch.setattr(local.signal, "signal", lambda signum, handler: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    threads, devices = [], []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    numbers = multiprocessing.get_context("spawn").SimpleQueue()
    for number in range(workers):
        numbers.put(number)
    for _ in range(workers):
        local._start(None, numbers, workers)
    assert devices == dealt and threads == workers * [5 // workers]
    assert default_workers() == (gpus or 5)


@pytest.mark.parametrize(
    "task",
    [Rule110(), FORKED, Depo(nodes=5, queries=3), MQAR(filler=8), Drift(), Variables()],
    ids=lambda task: type(task).__name__,
)
def test_one_sample_tells_the_flops_of_a_step(task):
    config = run_config(task, batch_size=6)
    config = replace(config, sleep=SleepConfig(window=getattr(task, "inline_context", 64), passes=2))
    run = Trainer(RunFolder("unused"), config)
    assert flops_per_step(config) == count_flops(run.objective, run.batches[0], config.sleep)


def test_the_compute_of_a_run_counts_the_passes_that_its_steps_make():
    (one, two, three) = (flops_per_step(run_config(passes=n)) for n in (1, 2, 3))
    assert one < two < three
    assert training_flops(run_config(passes=3, steps=10)) == 10 * three
    assert (
        training_flops(run_config(passes=3, steps=10, early_steps=4, early_passes=2)) == 4 * two + 6 * three
    )
    drawn = run_config(passes=3, steps=10, random_passes=True)
    assert training_flops(drawn) == 10 * ((one + two + three) // 3)


def test_flops_are_counted_for_few_shapes_and_estimated_for_others(monkeypatch):
    asked = []

    def count(objective, batch, sleep):
        asked.append(batch)
        return 10 * batch.tokens.numel() * sleep.passes

    monkeypatch.setattr(compute, "count_flops", count)
    flops = compute.StepFlops(None)

    def batch(T):
        rows = torch.zeros(2, T, dtype=torch.int64)
        return Batch(rows, rows.bool(), rows - 1, torch.zeros(0, dtype=torch.int64))

    twice = SleepConfig(window=4, passes=2)
    assert [flops(batch(T), twice) for T in (3, 5, 3)] == [120, 200, 120] and len(asked) == 2
    for T in range(10, 40):
        assert flops(batch(T), twice) == 40 * T
    assert len(asked) == compute.COUNTED
    # A run that goes on counts as if it had not stopped.
    again = compute.StepFlops(None)
    again.counted = json.loads(json.dumps(flops.counted))
    assert again(batch(39), twice) == flops(batch(39), twice) and len(asked) == compute.COUNTED
    flops(batch(3), SleepConfig(window=4, passes=1))
    assert len(asked) == compute.COUNTED + 1
