"""Muon against its definition in float64, and against PyTorch's."""

import math

import pytest
import torch
from conftest import close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lmsleep.training import muon
from lmsleep.training.muon import Muon, orthogonalised

SHAPES = st.lists(
    st.tuples(st.integers(1, 24), st.integers(1, 24)).flatmap(lambda s: st.sampled_from([s, (8, 12)])),
    min_size=1,
    max_size=5,
)


def parameters(shapes, dtype, seed=0):
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def train(optimizer, params, steps=3):
    for step in range(steps):
        torch.manual_seed(100 + step)
        for p in params:
            p.grad = torch.randn(p.shape, dtype=torch.float64).to(p.dtype)
        optimizer.step()
    return params


def by_definition(params, lr, weight_decay, steps=3):
    """One matrix after the other, by the singular values that each iteration maps."""
    momenta = [torch.zeros_like(p) for p in params]
    for step in range(steps):
        torch.manual_seed(100 + step)
        for p, momentum in zip(params, momenta, strict=True):
            grad = torch.randn(p.shape, dtype=torch.float64)
            momentum.mul_(0.95).add_(grad, alpha=0.05)
            U, values, Vh = torch.linalg.svd(grad * 0.05 + momentum * 0.95, full_matrices=False)
            values = values / values.norm()
            for _ in range(5):
                values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
            scale = lr * math.sqrt(max(1, p.shape[0] / p.shape[1]))
            p.data.mul_(1 - lr * weight_decay).sub_(scale * (U * values) @ Vh)
    return params


@settings(max_examples=30, deadline=None)
@given(shapes=SHAPES, seed=st.integers(0, 99))
def test_the_update_is_the_definition(shapes, seed):
    ours = train(Muon(params := parameters(shapes, torch.float64, seed), lr=0.1, weight_decay=0.3), params)
    for p, q in zip(ours, by_definition(parameters(shapes, torch.float64, seed), 0.1, 0.3), strict=True):
        assert close(p, q, 1e-9)


@settings(max_examples=20, deadline=None)
@given(shapes=SHAPES, seed=st.integers(0, 99))
def test_in_float32_it_is_pytorchs_up_to_its_bfloat16(shapes, seed):
    start, a, b = (parameters(shapes, torch.float32, seed) for _ in range(3))
    train(Muon(a, lr=0.1, weight_decay=0.0), a)
    train(torch.optim.Muon(b, lr=0.1, weight_decay=0.0), b)
    for old, p, q in zip(start, a, b, strict=True):
        assert (p - q).norm() <= 0.03 * (p - old).norm()


def test_singular_values_come_near_one():
    torch.manual_seed(0)
    for shape in ((3, 32, 32), (2, 64, 16), (2, 16, 64)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)))
        assert 0.65 < values.median() < 1.25 and values.max() < 1.25


@pytest.mark.parametrize("together", [1, 30, 10**9])
def test_how_many_go_together_changes_nothing(monkeypatch, together):
    shapes = [(4, 6)] * 3 + [(6, 4)]
    expected = train(Muon(params := parameters(shapes, torch.float64), lr=0.1, weight_decay=0.1), params)
    monkeypatch.setattr(muon, "TOGETHER", together)
    found = train(Muon(params := parameters(shapes, torch.float64), lr=0.1, weight_decay=0.1), params)
    for p, q in zip(found, expected, strict=True):
        assert close(p, q, 1e-12)


def test_parameters_without_a_gradient_stay():
    moved, kept = parameters([(3, 3), (3, 3)], torch.float32)
    before, optimizer = kept.clone(), Muon([moved, kept], lr=0.1, weight_decay=0.1)
    moved.grad = torch.ones(3, 3)
    optimizer.step()
    assert torch.equal(kept, before) and kept not in optimizer.state


def test_a_closure_makes_the_gradients():
    (p,) = parameters([(3, 4)], torch.float32)
    optimizer = Muon([p], lr=0.1, weight_decay=0.0)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    before = (p**2).sum().item()
    assert optimizer.step(closure).item() == pytest.approx(before)
    assert (p**2).sum() < before and optimizer.step(closure=None) is None


def test_its_state_goes_on():
    shapes = [(4, 6), (4, 6), (6, 4)]
    whole = train(Muon(params := parameters(shapes, torch.float64), lr=0.1, weight_decay=0.1), params)
    part = parameters(shapes, torch.float64)
    first = Muon(part, lr=0.1, weight_decay=0.1)
    train(first, part, steps=2)
    again = Muon(part, lr=0.1, weight_decay=0.1)
    again.load_state_dict(first.state_dict())
    torch.manual_seed(102)
    for p in part:
        p.grad = torch.randn(p.shape, dtype=torch.float64)
    again.step()
    for p, q in zip(part, whole, strict=True):
        assert torch.equal(p, q)


@pytest.mark.gpu
def test_on_a_gpu_it_is_pytorchs():
    shapes = [(64, 64), (64, 64), (96, 32)]
    a, b = ([nn.Parameter(p.detach().cuda()) for p in parameters(shapes, torch.float32)] for _ in range(2))
    train(Muon(a, lr=0.1, weight_decay=0.1), a)
    train(torch.optim.Muon(b, lr=0.1, weight_decay=0.1), b)
    for p, q in zip(a, b, strict=True):
        assert close(p, q, 0.02)


def test_the_state_of_pytorchs_optimizer_goes_on():
    params = parameters([(4, 6), (6, 4)], torch.float32)
    before = torch.optim.Muon(params, lr=0.1, weight_decay=0.1)
    train(before, params, steps=1)
    after = Muon(params, lr=0.5, weight_decay=0.0)
    after.load_state_dict(before.state_dict())
    for p in params:
        assert torch.equal(after.state[p]["momentum_buffer"], before.state[p]["momentum_buffer"])
    assert after.param_groups[0]["lr"] == 0.1
    after.step()
