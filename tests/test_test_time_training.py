from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import VOCAB, close, lively, random_tokens, same_memory, tiny
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmsleep import GradientSteps, HybridLM, Session, SleepConfig, sleep_forward
from lmsleep.evaluation.cost import cost
from lmsleep.state import State
from lmsleep.tasks import MQAR
from lmsleep.training import RunConfig, TrainConfig

CONFIG = tiny("attention", "attention", overrides={1: {"trained_mlp": True}})
SLEEP = SleepConfig(window=4, consolidator=GradientSteps(2, rate=0.3))
TOKENS = random_tokens(3, 14)
MASK = torch.arange(14).expand(3, 14) >= 12
PARTS = ("gate_proj", "up_proj", "down_proj")


def by_hand(model: HybridLM, tokens: torch.Tensor, rate: float, scale: torch.Tensor) -> torch.Tensor:
    # One row, windows of four: a real copy of the weights, stepped on the loss of each window but the last.
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    outputs = []
    for window in tokens.split(4):
        names = [f"blocks.1.mlp.{part}.weight" for part in PARTS]
        inner = {name: weights[name].requires_grad_() for name in names}
        logits = functional_call(model, weights, (window[None],))[0]
        outputs.append(logits.detach())
        loss = F.cross_entropy(logits[:-1], window[1:])
        for (name, weight), g, s in zip(
            inner.items(), torch.autograd.grad(loss, [*inner.values()]), scale.tolist(), strict=True
        ):
            weights[name] = (weight - rate * s**2 * g).detach()
    return torch.cat(outputs)


def test_it_is_gradient_descent_on_a_copy_of_the_weights():
    model = lively(CONFIG)
    scale = model.blocks[1].mlp.scale
    assert scale is not None and len(scale.unique()) == 3
    out = sleep_forward(model, TOKENS, None, SLEEP)
    assert out.logits is not None and out.sleeps.tolist() == [3, 3, 3]
    for row in range(3):
        assert close(out.logits[row], by_hand(model, TOKENS[row], 0.3, scale.detach()))


def test_gradients_of_gradients_agree_with_finite_differences():
    model = lively(CONFIG)
    parameters = dict(model.named_parameters())
    names = ["embedding.weight", "blocks.0.mixer.v_proj.weight", "blocks.1.mlp.up_proj.weight",
             "blocks.1.mlp.scale", "lm_head.weight"]  # fmt: skip
    torch.manual_seed(1)
    sleep_forward(model, TOKENS, MASK, SLEEP).loss.backward()
    for name in names:
        p = parameters[name]
        direction = torch.randn_like(p)

        def loss(step: float, p=p, direction=direction) -> float:
            with torch.no_grad():
                p.add_(direction, alpha=step)
                value = sleep_forward(model, TOKENS, MASK, SLEEP).loss.item()
                p.sub_(direction, alpha=step)
            return value

        numeric = (loss(1e-5) - loss(-1e-5)) / 2e-5
        assert p.grad is not None and abs(numeric) > 1e-6, name
        assert numeric == pytest.approx((p.grad * direction).sum().item(), rel=1e-5), name


def window_loss(model: HybridLM, state: State) -> float:
    h, _ = model.run(model.embed(TOKENS[:, :4]), state, 0, 2)
    return F.cross_entropy(model.head(h)[:, :-1].flatten(0, 1), TOKENS[:, 1:4].flatten()).item()


def test_small_steps_lower_the_loss_of_the_window_and_more_of_them_lower_it_further():
    model = lively(CONFIG)
    losses = [window_loss(model, model.initial_state(3))]
    for passes in (2, 3, 4):
        sleep = replace(SLEEP, passes=passes, rate=0.05)
        learned = sleep_forward(model, TOKENS[:, :4], None, sleep, evict_last=True)
        losses.append(window_loss(model, learned.state))
    assert losses == sorted(losses, reverse=True) and losses[0] - losses[1] > 0.01


def test_at_rate_zero_it_is_the_evicted_transformer():
    plain = HybridLM(replace(CONFIG, overrides={}))
    trained = HybridLM(CONFIG)
    trained.load_state_dict(plain.state_dict(), strict=False)
    with sdpa_kernel(SDPBackend.MATH):  # the kernel that has second derivatives rounds differently
        expected = sleep_forward(plain, TOKENS, None, SleepConfig(window=4)).logits
        actual = sleep_forward(trained, TOKENS, None, replace(SLEEP, rate=0.0)).logits
        moved = sleep_forward(trained, TOKENS, None, SLEEP).logits
    assert expected is not None and actual is not None and moved is not None
    assert torch.equal(actual, expected) and not torch.equal(moved, expected)


def test_rows_that_sleep_beside_rows_that_do_not_may_have_no_loss_in_a_window():
    model, lengths = lively(CONFIG), torch.tensor([14, 3, 9])
    both = sleep_forward(model, TOKENS, MASK, SLEEP, lengths=lengths, return_logits=False)
    alone = sleep_forward(model, TOKENS[:1], MASK[:1], SLEEP)
    assert close(both.loss, alone.loss) and same_memory(both.memory[:1], alone.memory)


def test_a_step_starts_from_any_memory_and_leaves_it_alone():
    model = lively(CONFIG)
    start = sleep_forward(model, TOKENS[:, :8], None, SLEEP, evict_last=True).state.detach()
    before = start.memory.clone()
    rest = sleep_forward(model, TOKENS[:, 8:], None, SLEEP, state=start)
    whole = sleep_forward(model, TOKENS, None, SLEEP)
    assert rest.logits is not None and whole.logits is not None
    assert close(rest.logits, whole.logits[:, 8:])
    assert same_memory(start.memory, before, 0)
    assert not any(S.requires_grad for S in start.memory.layers if S is not None)


def test_a_window_of_one_token_has_nothing_to_learn():
    model = lively(CONFIG)
    out = sleep_forward(model, TOKENS[:, :3], None, replace(SLEEP, window=1))
    assert all(bool((S == 0).all()) for S in out.memory.layers if S is not None)


def test_the_cost_of_a_step_is_counted():
    figures = cost(CONFIG, SLEEP)
    assert figures["fast_weight_bytes"] == 4 * 3 * 16 * 24
    head, matrix = 2 * 4 * 16 * VOCAB, 2 * 4 * 16 * 24
    # forward and back through the head; gradients of S's three matrices, and of what enters the last twice
    assert figures["flops_sleep"] == 2 * head + 5 * matrix
    assert cost(CONFIG, replace(SLEEP, passes=1))["flops_sleep"] == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(SLEEP, rate=-1.0), r"^rate must be finite and not negative, got -1"),
        (lambda: replace(SLEEP, rate=float("nan")), r"^rate must be finite and not negative, got nan"),
        (lambda: replace(SLEEP, normalize=True), r"^normalize: no option of a sleep with GradientSteps"),
        (lambda: replace(CONFIG, trained_mlp=True, mlp_dim=0), r"^trained_mlp needs a feed-forward layer"),
        (
            lambda: sleep_forward(HybridLM(tiny("attention")), TOKENS, None, SLEEP),
            r"^gradient-steps are for models of attention alone with feed-forward layers that each sequence",
        ),
        (
            lambda: sleep_forward(HybridLM(CONFIG), TOKENS, None, SLEEP, backprop_passes=1, checkpoint=True),
            r"^GradientSteps makes steps, .*: leave out backprop_passes and checkpoint$",
        ),
        (
            lambda: RunConfig(task=MQAR(), model=CONFIG, sleep=SLEEP, train=TrainConfig(checkpoint=True)),
            r"^GradientSteps makes steps, .*: leave out checkpoint$",
        ),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_recurrences_are_refused_wherever_a_model_meets_a_sleep():
    # They have no second derivative, and what they write while a window is read would be lost.
    config = tiny(vocab_size=VOCAB)
    model, text = HybridLM(config), TOKENS
    for meet in (
        lambda: RunConfig(task=MQAR(), model=config, sleep=SLEEP, train=TrainConfig()),
        lambda: Session(model, SLEEP),
        lambda: sleep_forward(model, text, None, SLEEP),
    ):
        with pytest.raises(ValueError, match="gradient-steps are for models of attention alone"):
            meet()
