import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lmsleep import ops

EPS = 1e-3


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return ops.rms_norm(x, weight, EPS)


def rms_definition(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def unit(x: Tensor) -> Tensor:
    return ops.unit_norm(x, EPS)


def unit_definition(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt().clamp(min=EPS)


BOTH = pytest.mark.parametrize(
    ("ours", "definition"), [(rms, rms_definition), (unit, unit_definition)], ids=["rms", "unit"]
)


def inputs(ours, shape, dtype, *, scale=1.0, seed=0) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(shape, generator=rng, dtype=torch.float64)
    weight = torch.randn(shape[-1], generator=rng, dtype=torch.float64)
    parts = [x] if ours is unit else [x, weight]
    return [y.to(dtype).requires_grad_() for y in parts]


def value_and_gradients(f, parts) -> list[Tensor]:
    y = f(*parts)
    weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    return [y, *torch.autograd.grad(y, parts, weights)]


@BOTH
@given(
    shape=st.lists(st.integers(1, 9), max_size=3),
    dim=st.integers(2, 20),
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_value_and_gradients_are_those_of_the_definition(ours, definition, shape, dim, scale, dtype, seed):
    parts = inputs(ours, (*shape, dim), dtype, scale=scale, seed=seed)
    want = value_and_gradients(definition, [x.detach().double().requires_grad_() for x in parts])
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    for x, y in zip(value_and_gradients(ours, parts), want, strict=True):
        # what of dy points along x must cancel: hence errors against dy / |x|, where that is larger
        assert relative_error(x, y, floor=0.1 / max(scale, EPS)) < tolerance


@BOTH
def test_strides_do_not_matter(ours, definition):
    x, *weight = inputs(ours, (3, 5, 4), torch.float64)
    for one, two in zip(
        value_and_gradients(lambda x, *w: ours(x.transpose(0, 1), *w).transpose(0, 1), [x, *weight]),
        value_and_gradients(lambda x, *w: definition(x.transpose(0, 1), *w).transpose(0, 1), [x, *weight]),
        strict=True,
    ):
        assert relative_error(one, two) < 1e-12


@BOTH
def test_there_is_a_second_derivative(ours, definition):
    parts = inputs(ours, (2, 3, 4), torch.float64)
    assert torch.autograd.gradcheck(ours, parts)
    assert torch.autograd.gradgradcheck(ours, parts)
    frozen = [parts[0], *(x.detach() for x in parts[1:])]
    assert torch.autograd.gradgradcheck(ours, frozen)


def test_zeros_and_short_vectors():
    x = torch.zeros(2, 3, requires_grad=True)
    assert torch.equal(unit(x), x)
    (gradient,) = torch.autograd.grad(unit(x).sum(), x)
    assert torch.allclose(gradient, torch.full_like(x, 1 / EPS))


@BOTH
def test_low_precision_is_computed_as_pytorch_does(ours, definition):
    parts = inputs(ours, (3, 8), torch.bfloat16)
    want = (
        F.normalize(parts[0], dim=-1, eps=EPS) if ours is unit else F.rms_norm(parts[0], (8,), parts[1], EPS)
    )
    assert torch.equal(ours(*parts), want)


@BOTH
def test_autocast_does_not_reach_into_the_backward_pass(ours, definition):
    parts = inputs(ours, (3, 8), torch.float32)
    want = value_and_gradients(ours, parts)
    with torch.autocast("cpu", torch.bfloat16):
        got = value_and_gradients(ours, parts)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
