"""Several processes take the same steps as one, whatever their number."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import ranks
import torch
from collectives import Collectives
from conftest import run_command, tiny
from hf_models import family
from hypothesis import given, settings
from hypothesis import strategies as st

from lmsleep import GradientSteps, SleepConfig, cli
from lmsleep.backbones import build
from lmsleep.cli import interrupts
from lmsleep.cli.several import quiet
from lmsleep.hf.finetune import FineTune
from lmsleep.tasks import MQAR, Depo, Rule110, Text
from lmsleep.training import (
    Job,
    Lost,
    Processes,
    RunConfig,
    RunFolder,
    TrainConfig,
    Trainer,
    loop,
    provenance,
    run_all,
)
from lmsleep.training.batches import draw
from lmsleep.training.launch import Together
from lmsleep.training.processes import NEEDED
from lmsleep.training.sharing import units
from lmsleep.training.start import first_model

STEPS = 4
BLOCKS = ("attention", "gated_delta_net")
TRAIN = TrainConfig(
    steps=STEPS, batch_size=5, eval_every=STEPS, eval_batches=3, save_every=STEPS, warmup=3, device="cpu",
    precision="float32", threads=1,
)  # fmt: skip
FORKED = Depo(nodes=5, names=5, hops=2, ask="fork", queries=2)


def config(name, folder):
    """A run by name: what differs between ranks differs here."""
    train, sleep = TRAIN, SleepConfig(window=4, passes=2)
    make = partial(RunConfig, task=FORKED, model=tiny(*BLOCKS), sleep=sleep)
    match name:
        case "forked":  # rows that share contexts, of different length
            return make(train=replace(train, steps=12))
        case "accumulate":
            return make(train=replace(train, accumulate=3))
        case "random passes":
            return make(train=replace(train, random_passes=True), sleep=sleep.with_passes(4))
        case "draws":
            return make(train=replace(train, draws=4))
        case "inline":
            return make(task=Rule110(width=4, states=2, t=2), train=replace(train, steps=50))
        case "text":  # documents of one to four windows: the ranks differ in how often they sleep
            rows = [{"text": f"{i} frogs sleep. "[: 3 + 2 * (i % 7)]} for i in range(80)]
            (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
            return make(task=Text(data=(folder / "rows.jsonl",), length=16), train=train)
        case "test-time training":
            model = tiny("attention", "attention", trained_mlp=True)
            return make(model=model, sleep=replace(sleep, consolidator=GradientSteps(2)), train=train)
    # What only some of the weights are trained of.
    how, task = name.split()[0], MQAR(keys=8, values=8, pairs=3, queries=2)
    if not (folder / "model").exists():
        family("olmo_hybrid").save_pretrained(folder / "model")
    model = FineTune(folder=folder / "model", train=how, lora=2)
    return make(task=task, model=model, train=replace(train, adam_lr=1e-3, lr=1e-3))


def trained(name, folder, out):
    """Train in float64, where rounding stays small; return losses, weights and counts."""
    run = config(name, folder)
    processes = Processes.join("cpu", patience=60)
    torch.manual_seed(run.train.seed)
    model = first_model(run).double()
    path = RunFolder(folder / out)
    if processes.main:
        path.make(run)
    trainer = Trainer(path, run, model, processes=processes)
    losses = [trainer.train_step()["loss"] for _ in range(run.train.steps)]
    score = trainer.evaluate(run.train.eval_batches)
    processes.leave()
    weights = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return losses, weights, (trainer.step, trainer.tokens), (score.total, score.tokens), score.nll


NAMES = (
    "forked", "accumulate", "random passes", "draws", "inline", "text", "test-time training", "lora model",
    "memory model",
)  # fmt: skip


@pytest.mark.parametrize(("name", "size"), [(name, 2 if name == "inline" else 3) for name in NAMES])
def test_a_run_is_a_function_of_its_seed_and_not_of_the_number_of_processes(name, size, tmp_path):
    alone = trained(name, tmp_path, "alone")
    assert alone[0][-1] != alone[0][0]
    several = ranks.run(size, trained, name, tmp_path, "together", group=False)
    for losses, weights, spent, counted, nll in several:
        assert losses == pytest.approx(alone[0], rel=1e-9)
        assert (spent, counted) == (alone[2], alone[3])
        assert nll == pytest.approx(alone[4], rel=1e-7)
        for key, value in alone[1].items():
            assert torch.allclose(weights[key], value, rtol=1e-7, atol=1e-9), key
    # Bit for bit: they would drift apart.
    assert all(torch.equal(several[0][1][k], other[1][k]) for other in several[1:] for k in alone[1])


# The command


TINY = (
    "train", "rule110", "--width", "4", "--states", "2", "--t", "2", "--asked", "4", "--blocks", *BLOCKS,
    "--d-model", "16", "--num-heads", "2", "--window", "4", "--passes", "2", "--steps", "6",
    "--batch-size", "4", "--eval-every", "3", "--eval-batches", "1", "--save-every", "2", "--threads", "1",
    "--device", "cpu",
)  # fmt: skip


def command(folder, *words):
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lmsleep", *words])
        cli.main(words)


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def nearly(line):
    """What rounding may change of a line of metrics."""
    return line["loss"] if "loss" in line else line["eval"]["bits"]


def test_the_command_writes_once_what_one_process_writes(tmp_path, capsys):
    cli.main([*TINY, "--out", str(tmp_path / "alone")])
    first, second = ranks.run(2, command, tmp_path, *TINY, "--out", "both", group=False, expect=(0, 0))
    assert "both is complete" in first
    assert second == ""
    mine, theirs = metrics(tmp_path / "alone"), metrics(tmp_path / "both")
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert (a["tokens"], a["flops"]) == (b["tokens"], b["flops"])
        assert nearly(a) == pytest.approx(nearly(b), rel=1e-4)
    # What a run in several processes leaves is the run of one: read, evaluated and gone on with as that is.
    shutil.rmtree(tmp_path / "both" / "checkpoints" / "step-00000006")
    (tmp_path / "both" / "report.json").unlink()
    cli.main(["train", "--resume", str(tmp_path / "both")])
    assert metrics(tmp_path / "both")[-1]["step"] == 6
    said = ranks.run(
        2, command, tmp_path, "eval", "both", "--batches", "3", "--json", group=False, expect=(0, 0)
    )
    capsys.readouterr()
    cli.main(["eval", str(tmp_path / "both"), "--batches", "3", "--json"])
    alone = json.loads(capsys.readouterr().out)["passes"]["2"]
    both = json.loads(said[0])["passes"]["2"]
    assert (alone.pop("bits"), alone.pop("bits_after_eviction")) == pytest.approx(
        (both.pop("bits"), both.pop("bits_after_eviction"))
    )
    assert alone == both


def signalled(folder, name, which, *more):
    # A signal to one of them while a step is under way.
    take_step = loop.take_step

    def step(*given, **options):
        metrics = take_step(*given, **options)
        step.taken += 1
        if step.taken == 3 and os.environ["RANK"] == which:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    step.taken = 0
    loop.take_step = step
    command(folder, *TINY, "--out", name, *more)


def test_a_signal_to_one_stops_all_after_the_same_step_and_another_number_goes_on(tmp_path):
    cli.main([*TINY, "--out", str(tmp_path / "whole")])
    said = ranks.run(3, signalled, tmp_path, "run", "2", group=False, expect=(143, 143, 143))
    [line] = [line for one in said for line in one.splitlines() if "stopped" in line]
    assert re.fullmatch(
        r"lmsleep: stopped after step [34]; to go on: torchrun ... -m lmsleep train --resume run", line
    )
    ranks.run(2, command, tmp_path, "train", "--resume", "run", group=False, expect=(0, 0))
    mine, theirs = metrics(tmp_path / "whole"), metrics(tmp_path / "run")
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert nearly(a) == pytest.approx(nearly(b), rel=1e-4)


def left_alone(folder):
    take_step = loop.take_step

    def step(*given, **options):
        step.taken += 1
        if step.taken == 3 and os.environ["RANK"] == "1":
            os.getppid = lambda: 1
        return take_step(*given, **options)

    step.taken = 0
    loop.take_step = step
    command(folder, *TINY, "--out", "run")


def test_processes_do_not_train_on_when_torchrun_was_killed(tmp_path):
    how = {"TORCHELASTIC_RUN_ID": "one"}
    told = ranks.run(2, left_alone, tmp_path, group=False, expect=(143, 143), **how)
    [line] = "".join(told).splitlines()
    assert "stopped after step 3; to go on" in line
    assert [path.name for path in RunFolder(tmp_path / "run").checkpoints()][-1] == "step-00000003"


def killed(folder, name):
    take_step = loop.take_step

    def step(*given, **options):
        step.taken += 1
        if step.taken == 5 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return take_step(*given, **options)

    step.taken = 0
    loop.take_step = step
    command(folder, *TINY, "--out", name)


def test_one_that_dies_ends_the_run_with_one_message_and_it_goes_on(tmp_path):
    first, _ = ranks.run(2, killed, tmp_path, "run", group=False, expect=(1, -9))
    [line] = first.splitlines()
    assert line.startswith("lmsleep: a process of this run has ended, or did not answer for 600 s; to go on:")
    ranks.run(2, command, tmp_path, "train", "--resume", "run", group=False, expect=(0, 0))
    assert (tmp_path / "run" / "report.json").exists()


def hanging(folder):
    if os.environ["RANK"] == "1":
        loop.take_step = lambda *given, **options: time.sleep(60)
    command(folder, *TINY, "--out", "run", "--patience", "3")


@pytest.mark.slow
def test_one_that_hangs_is_waited_for_no_longer_than_was_said(tmp_path):
    first, _ = ranks.run(2, hanging, tmp_path, group=False, expect=(1, -9), patience=20)
    assert "did not answer for 3 s" in first


BAD = {
    "shard=2 must divide the number of processes, 3": ("--shard", "2"),
    "shard must be at least 1": ("--shard", "0"),
    "batch_size=2 is less than the 3 processes that share it": ("--batch-size", "2"),
    "run exists and is not empty": ("--out", "run"),
    "device='cuda:1'": ("--device", "cuda:1"),
}


@pytest.mark.parametrize("said", BAD)
def test_what_cannot_be_is_said_once_by_all(said, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").touch()
    told = ranks.run(3, command, tmp_path, *TINY, *BAD[said], group=False, expect=(2, 2, 2))
    [line] = "".join(told).splitlines()
    assert said in line


def failing(folder):
    # One of them alone cannot read what all others can.
    def check(config):
        if os.environ["RANK"] == "1":
            raise OSError("no disk here")

    loop.check_samples = check
    command(folder, *TINY, "--out", "run")


def failing_deeper(folder):
    def first_model(config, **options):
        if os.environ["RANK"] == "2":
            raise ValueError("no such model")
        return build(config.model)

    loop.first_model = first_model
    command(folder, *TINY, "--out", "run", "--shard", "3")


@pytest.mark.parametrize(("fails", "said"), [(failing, "no disk here"), (failing_deeper, "no such model")])
def test_what_one_alone_cannot_do_is_raised_by_all(fails, said, tmp_path):
    told = ranks.run(3, fails, tmp_path, group=False, expect=(2, 2, 2))
    [line] = "".join(told).splitlines()
    assert line == f"lmsleep: {said}"
    assert not (tmp_path / "run").exists()


def kinds():
    processes, found = Processes(int(os.environ["RANK"]), 2, joined=True), []
    for error in (FileExistsError("here"), OSError(28, "full", "a file"), MemoryError("none"), KeyError("x")):
        try:
            with processes.together():
                if processes.rank == 1:
                    raise error
        except Exception as raised:
            found.append((type(raised), str(raised), getattr(raised, "errno", None)))
    return found


def test_an_error_is_of_one_type_in_all_so_that_all_do_the_same_about_it():
    here, there = ranks.run(2, kinds)
    assert here[:3] == there[:3]
    assert [kind for kind, *_ in here] == [FileExistsError, OSError, MemoryError, ValueError]
    assert here[1][1:] == ("[Errno 28] full: 'a file'", 28)


def filled(folder, *more):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    command(folder, *TINY, "--out", "run", *more)


@pytest.mark.parametrize("more", [(), ("--shard", "2")])
def test_a_full_disk_is_said_once_and_leaves_no_half_of_a_checkpoint(more, tmp_path):
    told = ranks.run(2, filled, tmp_path, *more, group=False, expect=(2, 2))
    lines = "".join(told).splitlines()
    assert len(lines) == 1, lines
    [line] = lines
    assert re.search(r"File too large; make room, then torchrun .* --resume run: 'run/checkpoints/\.", line)
    assert not [*(tmp_path / "run" / "checkpoints").iterdir()]


def disagreeing(folder, *words):
    words, more = words[:-2], words[-2:]
    command(folder, *words, *(more if os.environ["RANK"] == "1" else ()))


@pytest.mark.parametrize(
    ("more", "said"),
    [(("--lr", "0.5"), "train.lr: 0.01 and 0.5"), (("--shard", "2"), "shard: 1 and 2")],
)
def test_processes_that_were_started_differently_say_in_what(more, said, tmp_path):
    told = ranks.run(2, disagreeing, tmp_path, *TINY, "--out", "run", *more, group=False, expect=(2, 2))
    [line] = "".join(told).splitlines()
    assert f"processes 0 and 1 disagree about {said}" in line
    assert not (tmp_path / "run").exists()


def evaluating_another(folder):
    # A run that is in training: one of them finds a newer checkpoint than the other.
    if os.environ["RANK"] == "1":
        newest = RunFolder.checkpoints
        RunFolder.checkpoints = lambda self: newest(self)[:-1]
    command(folder, "eval", "run", "--batches", "2")


def test_an_evaluation_is_of_one_model_read_in_one_way(tmp_path):
    cli.main([*TINY, "--out", str(tmp_path / "run")])
    words = ("eval", "run", "--batches", "2", "--window", "3")
    told = ranks.run(2, disagreeing, tmp_path, *words, group=False, expect=(2, 2))
    assert "disagree about window: None and 3" in "".join(told)
    told = ranks.run(2, evaluating_another, tmp_path, group=False, expect=(2, 2))
    assert "disagree about checkpoint: 'step-00000006' and 'step-0000000" in "".join(told)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0"}, "has set RANK and not WORLD_SIZE, LOCAL_RANK"),
        ({"WORLD_SIZE": "2"}, "has set WORLD_SIZE and not RANK, LOCAL_RANK"),
        ({**dict.fromkeys(NEEDED, "0"), "RANK": "x"}, "RANK='x', which is no number"),
        ({**dict.fromkeys(NEEDED, "0"), "MASTER_PORT": "x"}, "MASTER_PORT='x', which is no number"),
        ({**dict.fromkeys(NEEDED, "0"), "RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 of WORLD_SIZE=2"),
    ],
)
def test_a_launcher_that_says_half_is_refused(environment, said, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(said)):
        Processes.join("cpu")


@pytest.mark.parametrize("size", ["", "1"])
def test_a_process_that_is_alone_speaks_whatever_its_number(size, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", size)
    assert "parameters" in run_command(capsys, "info", "depo-N1")[1]


def test_ctrl_c_in_all_is_said_by_one(capfd, monkeypatch):
    monkeypatch.setattr("os._exit", lambda code: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for number in ("0", "1"):
        monkeypatch.setenv("RANK", number)
        interrupts.leave_at_once()
    assert capfd.readouterr().err == "lmsleep: interrupted\n"


def test_what_pytorch_says_of_lost_processes_is_not_heard(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "")  # so that it is taken back
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL")
    with quiet():
        assert os.environ["TORCH_CPP_LOG_LEVEL"] == "FATAL"


@pytest.mark.parametrize(
    ("lacks", "device", "said"),
    [
        ("distributed", "cpu", "this build of PyTorch knows no other processes"),
        (
            "gpus",
            "auto",
            "2 processes on this machine, and 1 GPUs; start at most one a GPU (--nproc-per-node=1)",
        ),
        ("nccl", "cuda", "this build of PyTorch has no NCCL"),
    ],
)
def test_what_the_machine_lacks_is_said_before_anybody_waits(lacks, device, said, monkeypatch):
    for name, value in zip(NEEDED, ("0", "2", "0", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1 if lacks == "gpus" else 2)
    monkeypatch.setattr("torch.distributed.is_available", lambda: lacks != "distributed")
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: lacks != "nccl")
    with pytest.raises(ValueError, match=re.escape(said)):
        Processes.join(device)


def test_shard_without_a_launcher_says_how_to_start_one(capsys, tmp_path):
    assert run_command(capsys, *TINY, "--shard", "2", "--out", tmp_path / "run") == (
        2, "", "lmsleep: shard=2 is for several processes; start them with torchrun --standalone "
        "--nproc-per-node=2 -m lmsleep ...\n",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("program", "environment", "said"),
    [
        ("/somewhere/bin/lmsleep", {}, "lmsleep train"),
        ("/somewhere/lmsleep/__main__.py", {}, "python -m lmsleep train"),
        (
            "/somewhere/lmsleep/__main__.py",
            {"RANK": "0", "WORLD_SIZE": "2"},
            "torchrun --nproc-per-node=2 -m lmsleep train",
        ),
    ],
)
def test_a_run_says_the_command_that_made_it(program, environment, said, monkeypatch):
    monkeypatch.setattr("sys.argv", [program, "train"])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert provenance()["command"] == said


def test_one_that_never_comes_is_waited_for_no_longer_than_was_said(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in zip(NEEDED, ("0", "2", "0", "127.0.0.1", port), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(Lost, match=r"not all of the 2 processes came within 1 s"):
        Processes.join("cpu", patience=1)


def test_commands_for_one_process_refuse_several(tmp_path):
    told = ranks.run(2, command, tmp_path, "info", "depo-N1", group=False, expect=(2, 2))
    [line] = "".join(told).splitlines()
    assert "lmsleep info runs in one process" in line


# Their rows


def samples(batch):
    """What a model reads and is asked, a row at a time, with the difficulties of its answers."""
    found = []
    for row in range(len(batch.tokens)):
        context, tokens, answers = batch.row(row)
        where = [(i, int(batch.difficulty[a])) for i, a in enumerate(answers) if a >= 0]
        mask = [i for i in range(len(tokens)) if batch.loss_mask[row, i]]
        found.append((tuple(context), tuple(tokens), tuple(where), tuple(mask)))
    return found


@given(st.sampled_from(["forked", "inline", "text"]), st.integers(1, 7), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=40)
def test_all_together_read_the_rows_of_one(name, draws, size, step):
    with TemporaryDirectory() as folder:
        run = config(name, Path(folder))
        run = replace(run, train=replace(run.train, batch_size=7, draws=draws))
        whole = draw(run, step)
        shares = [draw(run, step, rank, size) for rank in range(size)]
    assert sorted(samples(whole)) == sorted(sample for share in shares for sample in samples(share))
    assert sum(share.num_predicted for share in shares) == whole.num_predicted
    assert sum(share.num_tokens for share in shares) == whole.num_tokens
    assert all(len(share.tokens) for share in shares)
    # Answers count on within a batch: each is one answer of one row.
    for batch in (whole, *shares):
        asked = batch.answers[batch.answers >= 0]
        rows = (batch.answers >= 0).nonzero()[:, 0]
        assert all(len(rows[asked == a].unique()) == 1 for a in asked.unique())


class Counting:
    def __init__(self, task):
        self.task, self.drawn = task, 0

    def batch(self, rng, size, split, level):
        self.drawn += size
        return self.task.batch(rng, size, split, level)


@pytest.mark.parametrize(("draws", "drawn"), [(1, [8, 8, 8]), (4, [4, 2, 2]), (8, [3, 3, 2])])
def test_with_as_many_draws_none_draws_the_rows_of_another(draws, drawn, tmp_path):
    run = config("forked", tmp_path)
    run = replace(run, train=replace(run.train, batch_size=8, draws=draws))
    found = []
    for rank in range(3):
        counting = Counting(run.task)
        draw(SimpleNamespace(task=counting, train=run.train), 0, rank, 3)
        found.append(counting.drawn)
    assert found == drawn


# What they send


def counted(windows, passes, checkpoint):
    # The second rank reads a row less than the first.
    run = config("inline", None)
    task = Rule110(width=4, states=windows, t=2, asked=4)
    train = replace(run.train, checkpoint=checkpoint)
    run = replace(run, task=task, sleep=SleepConfig(window=4, passes=passes), train=train)
    processes = Processes.join("cpu")
    trainer = Trainer(RunFolder("unused"), run, processes=processes)
    trainer.rehearse()
    with Collectives() as found:
        trainer.train_step()
    return found.counts, len([*units(trainer.model)])


def test_how_long_it_sleeps_changes_nothing_of_what_is_sent():
    found = [ranks.run(2, counted, *how, group=False) for how in ((1, 1, False), (1, 4, False), (3, 2, True))]
    exchanges = 2  # what is predicted; the loss, and who has gradients
    for several in found:
        for counts, own in several:
            assert own == 3  # two blocks and the rest
            assert counts == {"allreduce": own + exchanges}


# Sharded


def until(folder):
    put = RunFolder._put

    def slowly(*given):
        time.sleep(0.5)
        put(*given)

    RunFolder._put = slowly
    processes = Processes.join("cpu", shard=2)
    run = config("accumulate", folder)
    trainer = Trainer.begin(
        folder / "run", replace(run, train=replace(run.train, save_every=1)), processes=processes
    )
    trainer.fit(until=2)
    found = [path.name for path in trainer.folder.checkpoints()]
    processes.leave()
    return found


def test_checkpoints_are_in_their_place_when_the_folder_is_let_go(tmp_path):
    assert ranks.run(2, until, tmp_path, group=False)[0] == ["step-00000001", "step-00000002"]


def test_a_sharded_run_is_that_of_one_process_and_any_number_goes_on_with_it(tmp_path, capsys):
    cli.main([*TINY, "--out", str(tmp_path / "whole")])
    sharded = (*TINY, "--out", "run", "--shard", "2")
    ranks.run(2, signalled, tmp_path, "run", "1", "--shard", "2", group=False, expect=(143, 143))
    [stopped] = (tmp_path / "run" / "checkpoints").glob("step-0000000[34]")
    assert (stopped / "shards").is_dir()
    for name in ("alone", "wider"):
        shutil.copytree(tmp_path / "run", tmp_path / name)
    # In four processes two copies of two slices each; in one, the model as a whole.
    ranks.run(
        4, command, tmp_path, "train", "--resume", "wider", "--shard", "2", group=False, expect=(0,) * 4
    )
    ranks.run(2, command, tmp_path, "train", "--resume", "run", "--shard", "2", group=False, expect=(0, 0))
    cli.main(["train", "--resume", str(tmp_path / "alone")])
    ranks.run(2, command, tmp_path, *sharded[:-3], "at-once", "--shard", "2", group=False, expect=(0, 0))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "at-once")  # bit for bit
    mine = metrics(tmp_path / "whole")
    for name in ("run", "wider", "alone"):
        theirs = metrics(tmp_path / name)
        assert [line["step"] for line in mine] == [line["step"] for line in theirs]
        assert [nearly(line) for line in mine] == pytest.approx([nearly(line) for line in theirs], rel=1e-4)
    capsys.readouterr()
    cli.main(["eval", str(tmp_path / "run"), "--batches", "1", "--json"])
    assert json.loads(capsys.readouterr().out)["passes"]["2"]["accuracy"] >= 0


# Many runs


def grid(folder, launched):
    # A run whose start a shorter one shares, and one that ends in an error.
    run = config("inline", folder)
    long, short = (replace(run, train=replace(run.train, steps=steps, save_every=4)) for steps in (8, 4))
    bad = replace(run, train=replace(run.train, lr=1e30, adam_lr=1e30, warmup=0, clip=1e30))
    jobs = [Job(folder / "long", long, Job(folder / "short", short)), Job(folder / "bad", bad)]
    launcher = Together(Processes.join("cpu")) if launched else None
    with pytest.raises(RuntimeError) as error:
        run_all(jobs, 1 if launcher is None else None, launcher)
    return str(error.value)


def test_runs_one_after_the_other_are_those_of_one_process(tmp_path):
    (tmp_path / "alone").mkdir()
    (tmp_path / "together").mkdir()
    grid(tmp_path / "alone", False)
    first, second = ranks.run(2, grid, tmp_path / "together", True, group=False)
    assert first == second and "bad: step" in first
    for name in ("long", "short"):
        mine, theirs = (metrics(tmp_path / where / name) for where in ("alone", "together"))
        assert [nearly(line) for line in mine] == pytest.approx([nearly(line) for line in theirs], rel=1e-4)
        assert (tmp_path / "together" / name / "report.json").exists()
