import pytest
import torch
import torch.nn.functional as F
from conftest import close, lively, random_tokens, same_memory, tiny

from lmsleep import HybridConfig, HybridLM, Memory, Session, SleepConfig, sleep_forward
from lmsleep.microscope.readback import readback_rows
from lmsleep.microscope.trace import watch
from lmsleep.ops import RULES
from lmsleep.ops.rules.raven import num_slots

KINDS = ["gated_delta_net", "gated_linear", "kda", "raven"]
SLEEP = SleepConfig(window=5, passes=3)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_any_rule_sleeps_streams_and_is_saved(kind, eviction, tmp_path):
    model, x = lively(tiny("attention", kind, "attention")), random_tokens(17)
    sleep = SleepConfig(window=5, passes=3, eviction=eviction)
    whole = sleep_forward(model, x[None], None, sleep)
    session = Session(model, sleep)
    for token in x:
        session.read(token[None])
    assert same_memory(session.memory, whole.memory)
    once = sleep_forward(model, x[None], None, SleepConfig(window=5, passes=1, eviction=eviction))
    assert not same_memory(once.memory, whole.memory, 1e-3)  # passes matter
    session.save(tmp_path / "a.mem")
    again = Session.load(tmp_path / "a.mem", model)
    assert same_memory(again.memory, session.memory, 1e-6)  # files hold float32
    assert Memory.load(tmp_path / "a.mem", model).origin.rule == (None, kind, None)
    assert close(again.logits(x[:3]), session.logits(x[:3]), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_sleep_reach_every_gate(kind):
    model, x = lively(tiny(kind, "attention")), random_tokens(2, 15)
    sleep_forward(model, x, torch.arange(15)[None].expand(2, -1) >= 10, SLEEP).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.blocks[0].mixer.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_padding_writes_nothing(kind):
    model = lively(tiny(kind, conv_size=0))
    layer, x = model.blocks[0].mixer, torch.randn(2, 9, 16, dtype=torch.float64)
    valid = torch.arange(9)[None] < torch.tensor([[9], [4]])
    memory = torch.randn(2, *layer.memory_shape, dtype=torch.float64)
    _, padded, _ = layer(x, memory, (), valid, None)
    _, short, _ = layer(x[1:, :4], memory[1:], (), None, None)
    assert close(padded[1:], short)
    nothing, _ = layer.writes(x, (), torch.zeros_like(valid))
    assert not nothing.g.any() and not nothing.beta.any()


@pytest.mark.parametrize("kind", ["kda", "raven"])
def test_the_state_is_no_larger_than_that_of_the_delta_rule(kind):
    for size in ({}, {"head_dim": 32}, {"head_dim": 6, "value_dim": 5}):
        mine, other = (
            HybridLM(tiny(name, **size)).initial_state(1).memory.nbytes for name in (kind, "gated_delta_net")
        )
        assert other / 2 < mine <= other


def test_every_head_of_kda_has_channels_that_forget_fast_and_slowly():
    layer = HybridLM(tiny("kda", forget=(0.01, 0.64), head_dim=4)).blocks[0].mixer
    writes, _ = layer.writes(torch.randn(1, 1, 16), layer.empty_cache(1), None)
    expected = torch.tensor([0.01, 0.04, 0.16, 0.64]).expand(1, 1, 2, 4)
    assert torch.allclose(-writes.g, expected, rtol=1e-5, atol=0)
    assert torch.allclose(writes.beta, torch.tensor(1.0).sigmoid().expand(1, 1, 2))


def test_raven_overwrites_half_of_its_slots_and_leaves_the_others_as_they_are():
    layer = lively(tiny("raven", num_heads=1, conv_size=0)).blocks[0].mixer
    M, x = num_slots(16, 16), torch.randn(3, 1, 16, dtype=torch.float64)
    writes, _ = layer.writes(x, (), None)
    chosen = writes.g < 0
    assert M == 8 and (chosen.sum(-1) == 4).all() and (chosen != chosen[:1]).any()
    assert torch.equal(writes.beta, -torch.expm1(writes.g))
    scores = layer.r_proj(x).sigmoid()[:, :, None]
    assert scores[chosen].view(3, 4).amin(-1).gt(scores[~chosen].view(3, 4).amax(-1)).all()
    f = -layer.A_log.exp() * F.softplus(layer.a_proj(x) + layer.dt_bias)
    assert close(writes.g.sum(-1), f)  # what all slots forget is shared out
    before = torch.randn(3, 1, M, 32, dtype=torch.float64)
    _, after, _ = layer(x, before, (), None, None)
    assert torch.equal((after != before).any(-1), chosen[:, 0])


def test_keys_are_read_back_from_matrices_alone():
    model, x = lively(tiny("kda", "raven", "attention")), random_tokens(1, 5)
    with torch.no_grad():
        window = next(watch(model, x, SLEEP))
    rows = list(readback_rows([(0, window)], window.after.memory, str))
    assert {row["block"] for row in rows} == {0}


def test_kinds_that_are_rules_are_named_in_the_configuration():
    assert {"kda", "raven"} <= set(RULES)
    assert HybridConfig(blocks=("kda", "attention", "raven")).blocks == ("kda", "attention", "raven")
