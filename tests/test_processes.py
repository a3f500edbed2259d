"""Several processes take the same steps as one, whatever their number."""

import json
from dataclasses import replace
from functools import partial

import pytest
import ranks
import torch
from conftest import tiny
from hf_models import family

from lmsleep import GradientSteps, SleepConfig
from lmsleep.hf.finetune import FineTune
from lmsleep.tasks import MQAR, Depo, Rule110, Text
from lmsleep.training import RunConfig, RunFolder, TrainConfig, Trainer
from lmsleep.training.processes import Processes
from lmsleep.training.start import first_model

STEPS = 8
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
            return make(train=replace(train, steps=50))
        case "accumulate":
            return make(train=replace(train, accumulate=3))
        case "random passes":
            return make(train=replace(train, random_passes=True), sleep=sleep.with_passes(4))
        case "draws":
            return make(train=replace(train, draws=4))
        case "inline":
            return make(task=Rule110(width=4, states=2, t=2), train=train)
        case "text":  # documents of one to four windows: the ranks differ in how often they sleep
            rows = [{"text": f"{i} frogs sleep. "[: 3 + 2 * (i % 7)]} for i in range(80)]
            (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
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


@pytest.mark.parametrize(("name", "size"), [("forked", 2), *((name, 3) for name in NAMES)])
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
