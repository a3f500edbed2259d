"""In-Place TTT: existing feed-forward layers as fast weights."""

import pytest
import torch
from by_hand import said, same_gradients, surprise, through
from conftest import close, lively, random_tokens, run_command, same_memory, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import TOKENS, heard
from torch import Tensor

from lmsleep import (
    GradMem,
    HybridConfig,
    HybridLM,
    InPlace,
    Passes,
    Session,
    SleepConfig,
    sleep_forward,
)
from lmsleep.evaluation.cost import cost
from lmsleep.layers.in_place import NextTokens
from lmsleep.tasks import MQAR
from lmsleep.training import RunConfig, TrainConfig

CONFIG = tiny("attention", "gated_delta_net", "attention", overrides={2: {"in_place_mlp": True}})


def sleeping(by, window: int = 4) -> SleepConfig:
    return SleepConfig(window=window, consolidator=by)


@pytest.fixture(scope="module")
def model():
    return lively(CONFIG)


def targets(layer: NextTokens, x: Tensor) -> Tensor:
    # The last axis of `conv` counts from two tokens before to two after; beyond the chunk there is nothing.
    rows = []
    for t in range(len(x)):
        near = [(tap, t + tap - 2) for tap in range(5) if 0 <= t + tap - 2 < len(x)]
        rows.append(layer.target_proj.weight @ sum(layer.conv[:, tap] * x[place] for tap, place in near))
    return torch.stack(rows)


def by_hand(model: HybridLM, tokens: Tensor, by: InPlace, L: int) -> tuple[Tensor, list[Tensor]]:
    # Logits of one row, and what its blocks have added to their last matrices in the end.
    S = [torch.zeros(*block.mlp.gate_proj.weight.shape, dtype=torch.float64) for block in model.blocks]
    logits, windows = [], tokens.split(L)
    for number, window in enumerate(windows):
        x = model.embedding.weight[window]
        logits.append(said(model, through(model, x, [[own] * len(x) for own in S])[0]))
        for _ in range(by.passes - 1 if number + 1 < len(windows) else 0):
            had: list[list[Tensor]] = [[] for _ in S]  # by each token, when it was read
            for chunk in torch.arange(len(x)).split(by.chunk or L):
                for before, own in zip(had, S, strict=True):
                    before += [own] * len(chunk)
                _, entered = through(model, x[: chunk[-1] + 1], had)
                for i, block in enumerate(model.blocks):
                    V = targets(block.mlp.target, x[chunk])
                    pairs = zip(entered[i][chunk], V, strict=True)
                    S[i] = S[i] + by.rate * sum(torch.outer(z, v) for z, v in pairs)
    return torch.cat(logits), S


@settings(max_examples=15)
@given(
    L=st.integers(1, 6),
    T=st.integers(2, 14),
    N=st.integers(1, 3),
    chunk=st.none() | st.integers(1, 7),
    heads=st.sampled_from([1, 2]),
    blocks=st.sampled_from([["attention"], ["attention"] * 2]),
    seed=st.integers(0, 99),
)
def test_it_is_what_the_equations_say_forward_and_in_its_gradients(L, T, N, chunk, heads, blocks, seed):
    options = {"d_model": 8, "mlp_dim": 12, "num_heads": heads, "in_place_mlp": True}
    model, tokens = lively(tiny(*blocks, **options), seed), random_tokens(1, T, seed=seed)
    by = InPlace(N, rate=0.3, chunk=chunk)
    out = sleep_forward(model, tokens, torch.ones(1, T, dtype=torch.bool), sleeping(by, L))
    logits, S = by_hand(model, tokens[0], by, L)
    assert close(out.logits[0], logits, 1e-10)
    assert all(close(mine[0, 0], other, 1e-10) for mine, other in zip(out.memory.layers, S, strict=True))
    loss = surprise(logits[:-1], tokens[0, 1:]).mean()
    assert close(out.loss, loss, 1e-10)
    same_gradients(model, out.loss, loss)


def test_what_followed_what_in_a_window_is_said_of_it_afterwards():
    # Every token has a unit of its own that it alone switches on, and learns the embedding of its successor.
    V = 6
    config = HybridConfig(
        vocab_size=V, d_model=V, num_heads=1, blocks=("attention",), mlp_dim=V, in_place_mlp=True
    )
    model = HybridLM(config)
    with torch.no_grad():
        model.blocks[0].mixer.o_proj.weight.zero_()
        model.blocks[0].mlp.down_proj.weight.zero_()
        for weight in (
            model.embedding.weight,
            model.lm_head.weight,
            *(getattr(model.blocks[0].mlp, f"{name}_proj").weight for name in ("gate", "up")),
        ):
            weight.copy_(torch.eye(V))
    window, sleep = torch.tensor([[0, 3, 1, 5, 2, 4]]), sleeping(InPlace(2), 6)
    memory = sleep_forward(model, window, None, sleep, evict_last=True).memory
    bigrams = torch.zeros(V, V)
    bigrams[[0, 3, 1, 5, 2], [3, 1, 5, 2, 4]] = 1.0  # what comes after the window is not known
    unit = V**0.5 / (1 + torch.exp(torch.tensor(-(V**0.5)))) * V**0.5  # silu(x) x, at an RMS of 1
    assert close(memory.layers[0][0, 0], unit * bigrams, 1e-5)
    session = Session(model, sleep, memory=memory)
    for asked, answer in ((3, 1), (0, 3), (5, 2)):
        fork = session.fork()
        fork.read([asked])
        assert int(heard(fork).argmax()) == answer


def test_what_is_read_awake_teaches_nothing(model):
    read = sleep_forward(model, TOKENS[:, :4], None, sleeping(InPlace(2)))
    assert not read.memory.layers[2].any() and read.memory.layers[1].any()
    still = sleep_forward(model, TOKENS, None, sleeping(InPlace(2, rate=0.0)))
    plain = sleep_forward(model, TOKENS, None, sleeping(Passes(1)))
    assert close(still.logits, plain.logits) and same_memory(still.memory, plain.memory)


def test_recomputed_activations_change_no_gradient(model):
    mask, gradients = torch.ones(3, 14, dtype=torch.bool), []
    for checkpoint in (False, True):
        loss = sleep_forward(
            model, TOKENS, mask, sleeping(InPlace(2, rate=0.2, chunk=3)), checkpoint=checkpoint
        ).loss
        gradients.append(torch.autograd.grad(loss, [*model.parameters()]))
    assert all(close(a, b) for a, b in zip(*gradients, strict=True))


def test_a_model_goes_through_its_folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = HybridLM.from_pretrained(tmp_path)
    sleep = sleeping(InPlace(2))
    assert torch.equal(*(sleep_forward(m, TOKENS, None, sleep).logits for m in (model, again)))


def test_its_bytes_and_its_cost_are_counted():
    plain = cost(tiny("attention"), sleeping(Passes(1)))
    figures = cost(tiny("attention", in_place_mlp=True), sleeping(InPlace(2)))
    assert figures["fast_weight_bytes"] == 4 * 24 * 16
    assert figures["flops_wake_token"] - plain["flops_wake_token"] == 2 * 24 * 16  # Z S
    # V by a convolution of five taps and a square matrix, Z^T V; the reading is the wake pass.
    assert figures["flops_sleep"] == 2 * 4 * 16 * (5 + 16 + 24)


def test_it_trains_is_scored_and_reads_on_the_command_line(tmp_path, capsys):
    trained = "--steps 2 --eval-every 2 --eval-batches 1 --batch-size 4 --device cpu --checkpoint"
    shape = "--d-model 16 --num-heads 2 --mlp-dim 24 --window 8 --blocks attention --in-place-mlp --passes 2"
    run, memory = tmp_path / "run", tmp_path / "a.mem"
    by = ["--sleep", "in-place,rate=0.1,chunk=4"]
    argv = ["train", "mqar", *trained.split(), *shape.split(), *by, "--out", run]
    assert run_command(capsys, *argv)[0] == 0
    assert run_command(capsys, "eval", run, "--batches", "1", "--passes", "1", "2", "3")[0] == 0
    (tmp_path / "text.txt").write_text("k1 v1 k2 v2 k3 v3 k1 v1 k2 v2 k3 v3")
    assert run_command(capsys, "read", run, tmp_path / "text.txt", "--memory", memory)[0] == 0
    assert run_command(capsys, "ask", run, "--memory", memory, "k1")[0] == 0
    code, out, _ = run_command(capsys, "memory", "show", memory)
    assert code == 0 and "norm" in out


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: tiny(mlp_dim=0, in_place_mlp=True),
            "^in_place_mlp needs a feed-forward layer, got mlp_dim=0",
        ),
        (lambda: tiny(trained_mlp=True, in_place_mlp=True), "^trained_mlp and in_place_mlp are two ways"),
        (lambda: InPlace(2, rate=float("nan")), "^rate must be finite and not negative, got nan"),
        (lambda: InPlace(2, chunk=0), "^chunk must be at least 1 token, got 0"),
        (
            lambda: Session(HybridLM(tiny()), sleeping(InPlace(2))),
            "^in-place is for models with feed-forward layers that learn, .*models of transformers have none",
        ),
        (
            lambda: RunConfig(task=MQAR(), model=tiny(), sleep=sleeping(InPlace(2)), train=TrainConfig()),
            "^in-place is for models with feed-forward layers that learn",
        ),
        (
            lambda: Session(HybridLM(tiny("attention", in_place_mlp=True)), sleeping(GradMem(2))),
            "^GradMem is for models with memory tokens",
        ),
        (
            lambda: sleep_forward(HybridLM(CONFIG), TOKENS, None, sleeping(InPlace(2)), backprop_passes=1),
            "^in-place learns in chunks, not in passes: leave out backprop_passes",
        ),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
