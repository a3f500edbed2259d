"""Memory tokens, written by a forward pass (RMT) or by gradient descent (GradMem)."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from by_hand import norm, said, same_gradients, surprise, through
from conftest import close, lively, random_tokens, run_command, same_memory, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import TOKENS
from torch import Tensor

from lmsleep import (
    GradMem,
    HybridLM,
    Memory,
    MemoryTokens,
    Passes,
    Session,
    SleepConfig,
    sleep_forward,
)
from lmsleep.backbones import find_kind
from lmsleep.evaluation.cost import cost
from lmsleep.hf.finetune import FineTune
from lmsleep.tasks import MQAR
from lmsleep.training import RunConfig, TrainConfig, baseline

BLOCKS, M = ("attention", "attention"), 3
CONFIG = tiny(*BLOCKS, memory_tokens=M)


def sleeping(by, window: int = 4) -> SleepConfig:
    return SleepConfig(window=window, consolidator=by)


@pytest.fixture(scope="module")
def model():
    return lively(CONFIG)


def by_forward(model: HybridLM, vectors: Tensor, window: Tensor) -> Tensor:
    read = vectors * model.memory_scale
    h, _ = through(model, torch.cat([read, model.embedding.weight[window], read]))
    return norm(h[-len(vectors) :], eps=0.0)


def by_descent(model: HybridLM, vectors: Tensor, window: Tensor, rate: float) -> Tensor:
    h, _ = through(model, torch.cat([vectors * model.memory_scale, model.embedding.weight[window]]))
    loss = surprise(said(model, h[len(vectors) - 1 : -1]), window).mean()
    (gradient,) = torch.autograd.grad(loss, vectors, create_graph=True)
    return vectors - rate * gradient


def by_hand(model: HybridLM, tokens: Tensor, by, L: int) -> tuple[Tensor, Tensor]:
    # Logits of one row, and the vectors that it ends with: those behind which its last window is read.
    vectors, logits, windows = model.memory_start, [], tokens.split(L)
    for place, window in enumerate(windows):
        h, _ = through(model, torch.cat([vectors * model.memory_scale, model.embedding.weight[window]]))
        logits.append(said(model, h[len(vectors) :]))
        for _ in range(by.passes - 1 if place + 1 < len(windows) else 0):
            if isinstance(by, GradMem):
                vectors = by_descent(model, vectors, window, by.rate)
            else:
                vectors = by_forward(model, vectors, window)
    return torch.cat(logits), vectors


@settings(max_examples=15)
@given(
    m=st.integers(1, 4),
    L=st.integers(1, 5),
    T=st.integers(2, 12),
    N=st.integers(1, 3),
    descends=st.booleans(),
    heads=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_it_is_what_the_equations_say_forward_and_in_its_gradients(m, L, T, N, descends, heads, seed):
    model = lively(tiny("attention", memory_tokens=m, d_model=8, mlp_dim=12, num_heads=heads), seed)
    tokens = random_tokens(1, T, seed=seed)
    by = GradMem(N, rate=0.7) if descends else MemoryTokens(N)
    out = sleep_forward(model, tokens, torch.ones(1, T, dtype=torch.bool), sleeping(by, L))
    logits, vectors = by_hand(model, tokens[0], by, L)
    assert close(out.logits[0], logits, 1e-10)
    assert close(out.memory.layers[0][0, 0], vectors, 1e-10)
    loss = surprise(logits[:-1], tokens[0, 1:]).mean()
    assert close(out.loss, loss, 1e-10)
    same_gradients(model, out.loss, loss)


def test_where_blocks_add_nothing_vectors_stay_what_they_are():
    model = lively(CONFIG)
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    out = sleep_forward(model, TOKENS[:, :5], None, sleeping(MemoryTokens(2)))
    assert close(out.memory.layers[0][0, 0], norm(model.memory_start * model.memory_scale, eps=0.0))


def test_at_rate_zero_nothing_is_written_and_steps_lower_the_loss_of_the_window(model):
    still = sleep_forward(model, TOKENS, None, sleeping(GradMem(4, rate=0.0)))
    assert same_memory(still.memory, model.initial_state(3).memory, 0.0)
    losses = []
    for passes in (1, 2, 3, 4):
        by = GradMem(passes, rate=0.3)
        memory = sleep_forward(model, TOKENS[:, :4], None, sleeping(by), evict_last=True).memory
        losses.append(sum(_loss(model, memory.layers[0][row, 0], TOKENS[row, :4]) for row in range(3)))
    assert losses == sorted(losses, reverse=True) and losses[0] - losses[-1] > 0.1


@torch.no_grad()
def _loss(model: HybridLM, vectors: Tensor, window: Tensor) -> float:
    h, _ = through(model, torch.cat([vectors * model.memory_scale, model.embedding.weight[window]]))
    return float(surprise(said(model, h[M - 1 : -1]), window).mean())


def test_recomputed_activations_change_no_gradient(model):
    mask = torch.ones(3, 14, dtype=torch.bool)
    gradients = []
    for checkpoint in (False, True):
        loss = sleep_forward(model, TOKENS, mask, sleeping(MemoryTokens(2)), checkpoint=checkpoint).loss
        gradients.append(torch.autograd.grad(loss, [*model.parameters()]))
    assert all(close(a, b) for a, b in zip(*gradients, strict=True))


def test_a_model_goes_through_its_folder_and_starts_another(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = HybridLM.from_pretrained(tmp_path)
    sleep = sleeping(MemoryTokens(2))
    assert torch.equal(*(sleep_forward(m, TOKENS, None, sleep).logits for m in (model, again)))
    other = lively(CONFIG, seed=1)
    other.take_weights(model)
    assert torch.equal(*(sleep_forward(m, TOKENS, None, sleep).logits for m in (model, other)))


@pytest.mark.parametrize("name", ["transformer-cached", "transformer-evicted", "transformer-sliding"])
def test_its_baselines_are_transformers_without_vectors(name):
    run = RunConfig(task=MQAR(), model=CONFIG, sleep=sleeping(MemoryTokens(2)), train=TrainConfig())
    made = baseline(name, run)
    assert made.model == replace(run.model, memory_tokens=0) and made.sleep.consolidator == Passes(1)


def test_the_cost_of_a_window_counts_the_vectors():
    plain = cost(tiny(*BLOCKS), sleeping(Passes(1)))
    figures = cost(CONFIG, sleeping(MemoryTokens(2)))
    assert figures["fast_weight_bytes"] == M * 16 * 4
    # A token sees M positions more: M queries and M values of two blocks, 16 wide.
    assert figures["flops_wake_token"] - plain["flops_wake_token"] == 2 * (2 * 2 * M * 16)
    assert figures["flops_sleep"] > 0


def test_it_trains_is_scored_and_reads_on_the_command_line(tmp_path, capsys):
    trained = "--steps 2 --eval-every 2 --eval-batches 1 --batch-size 4 --device cpu"
    shape = "--d-model 16 --num-heads 2 --window 8 --blocks attention --memory-tokens 2 --passes 2"
    for name, by in (("memory-tokens", ["memory-tokens", "--checkpoint"]), ("gradmem", ["gradmem,rate=0.5"])):
        run = tmp_path / name
        argv = ["train", "mqar", *trained.split(), *shape.split(), "--sleep", *by]
        assert run_command(capsys, *argv, "--out", run)[0] == 0
        assert run_command(capsys, "eval", run, "--batches", "1", "--passes", "1", "2", "3")[0] == 0
        code, out, _ = run_command(capsys, "info", run)
        assert code == 0 and f"{2 * 16 * 4:,} bytes a sequence" in out
        (tmp_path / "text.txt").write_text("k1 v1 k2 v2 k3 v3 k1 v1 k2 v2 k3 v3")
        memory = tmp_path / f"{name}.mem"
        assert run_command(capsys, "read", run, tmp_path / "text.txt", "--memory", memory)[0] == 0
        assert run_command(capsys, "ask", run, "--memory", memory, "k1")[0] == 0
        assert isinstance(Memory.load(memory), Memory)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: find_kind("hf").check(FineTune(folder=Path("model")), sleeping(GradMem(2))),
            "^GradMem is for models with memory tokens, .*models of transformers have none",
        ),
        (lambda: replace(CONFIG, memory_tokens=-1), "^memory_tokens must be finite and not negative, got -1"),
        (lambda: tiny(memory_tokens=2), "^memory_tokens=2 is for models that keep nothing else: attention"),
        (
            lambda: replace(CONFIG, overrides={1: {"trained_mlp": True}}),
            "^overrides of block 1: memory_tokens=3 is for models that keep nothing else",
        ),
        (lambda: GradMem(2, rate=-1.0), "^rate must be finite and not negative, got -1"),
        (
            lambda: SleepConfig(window=4, consolidator=MemoryTokens(2), eviction="sliding"),
            "^eviction='sliding' leaves something in attention, and with MemoryTokens",
        ),
        (
            lambda: sleep_forward(HybridLM(tiny("attention")), TOKENS, None, sleeping(GradMem(2))),
            r"^GradMem is for models with memory tokens, HybridConfig\(memory_tokens=m\)",
        ),
        (
            lambda: Session(HybridLM(tiny()), sleeping(MemoryTokens(2))),
            r"^MemoryTokens is for models with memory tokens, .*models of transformers have none",
        ),
        (
            lambda: Session(HybridLM(CONFIG), sleeping(Passes(2))),
            "^memory_tokens=3 are read and written by the consolidators memory-tokens and gradmem alone",
        ),
        (
            lambda: RunConfig(task=MQAR(), model=CONFIG, sleep=sleeping(Passes(2)), train=TrainConfig()),
            "^memory_tokens=3 are read and written by the consolidators memory-tokens and gradmem alone",
        ),
        (
            lambda: sleep_forward(
                HybridLM(CONFIG), TOKENS, None, sleeping(MemoryTokens(2)), backprop_passes=1
            ),
            "^MemoryTokens writes in no passes: leave out backprop_passes",
        ),
        (
            lambda: sleep_forward(HybridLM(CONFIG), TOKENS, None, sleeping(GradMem(2)), checkpoint=True),
            "^GradMem makes steps, through all of which gradients flow: leave out checkpoint$",
        ),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_gradmem_writes_no_window_whose_beginning_it_cannot_see(model):
    read = sleep_forward(model, TOKENS[:, :2], None, sleeping(GradMem(2)))
    with pytest.raises(ValueError, match=r"^gradmem writes whole windows"):
        sleep_forward(model, TOKENS[:, 2:], None, sleeping(GradMem(2)), state=read.state)
    rest = sleep_forward(
        model, TOKENS[:, 2:4], None, sleeping(MemoryTokens(2)), state=read.state, evict_last=True
    )
    whole = sleep_forward(model, TOKENS[:, :4], None, sleeping(MemoryTokens(2)), evict_last=True)
    assert same_memory(rest.memory, whole.memory)
