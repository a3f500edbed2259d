"""Muon on sharded matrices against Muon on whole ones."""

import ranks
import torch
from collectives import Collectives
from conftest import close
from hypothesis import given, settings
from hypothesis import strategies as st
from test_muon import parameters
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lmsleep.training.muon import Muon

# Fewer rows than ranks, rows that do not divide, one row, one column, tall, wide; some twice.
SHAPES = [(4, 6), (1, 5), (5, 1), (2, 3), (7, 2), (2, 7), (4, 6), (1, 1), (7, 2)]


def over(copies):
    world = torch.distributed.get_world_size()
    if copies == 1:
        return init_device_mesh("cpu", (world,)), [Shard(0)]
    return init_device_mesh("cpu", (copies, world // copies)), [Replicate(), Shard(0)]


def moved(shapes, seed, copies=None, steps=3, still=(), dtype=torch.float64, between=None):
    """Parameters after some steps: sharded with so many copies of each slice, whole if that is None."""
    params, mesh = parameters(shapes, dtype, seed), None
    if copies is not None:
        mesh, placements = over(copies)
        params = [nn.Parameter(distribute_tensor(p.detach(), mesh, placements)) for p in params]
    optimizer = Muon(params, lr=0.1, weight_decay=0.3)
    for step in range(steps):
        torch.manual_seed(100 + step)
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, dtype=torch.float64).to(dtype)
            if i not in still:
                p.grad = grad if mesh is None else distribute_tensor(grad, mesh, placements)
        with Collectives() as found:
            optimizer.step()
        if between is not None:
            optimizer = between(params, optimizer)
    whole = [p.detach() if mesh is None else p.full_tensor().detach() for p in params]
    return whole, dict(found.counts), len(optimizer.state)


def gathers(shapes):
    return {"all_gather_into_tensor": len(set(shapes))}


def same(found, expected, precision=1e-12):
    return all(close(p, q, precision) for p, q in zip(found, expected, strict=True))


def test_the_update_is_that_of_one_process_by_one_gather_a_stack():
    expected, nothing, _ = moved(SHAPES, 0)
    assert nothing == {}
    for world in (2, 3):
        for found, counts, _ in ranks.run(world, moved, SHAPES, 0, 1):
            assert same(found, expected) and counts == gathers(SHAPES)


@settings(max_examples=6, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    seed=st.integers(0, 99),
    world=st.integers(1, 3),
)
def test_any_shapes_on_any_number_of_ranks(shapes, seed, world):
    expected, _, _ = moved(shapes, seed)
    for found, counts, _ in ranks.run(world, moved, shapes, seed, 1):
        assert same(found, expected) and counts == (gathers(shapes) if world > 1 else {})


def test_copies_of_slices_move_alike_and_gather_among_the_slices_alone():
    expected, _, _ = moved(SHAPES, 0)
    for found, counts, _ in ranks.run(4, moved, SHAPES, 0, 2):
        assert same(found, expected) and counts == gathers(SHAPES)


def test_in_float32_it_is_one_process_to_rounding():
    expected, _, _ = moved(SHAPES, 0, dtype=torch.float32)
    for found, _, _ in ranks.run(2, float32):
        assert same(found, expected, 1e-5)


def float32():
    return moved(SHAPES, 0, 1, dtype=torch.float32)


def without_some():
    return moved(SHAPES, 0, 1, still=(0, 4))


def test_sharded_parameters_without_a_gradient_stay():
    expected, _, states = moved(SHAPES, 0, still=(0, 4))
    assert states == len(SHAPES) - 2
    for found, _, states in ranks.run(3, without_some):
        assert same(found, expected) and states == len(SHAPES) - 2
        assert torch.equal(found[0], parameters(SHAPES, torch.float64)[0])


def taken_up(params, optimizer):
    """Another optimizer with the state that the functions of PyTorch's checkpoints take from this one."""
    model = nn.ParameterList(params)
    # Of one that has made no step they ask for a step with rate 0, `step(closure=None)`.
    grads = [p.grad for p in params]
    other = Muon(model, lr=0.1, weight_decay=0.3)
    for p in params:
        p.grad = None
    set_optimizer_state_dict(model, other, get_optimizer_state_dict(model, optimizer))
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    return other


def checkpointed():
    return moved(SHAPES, 0, 1, between=taken_up)


def test_its_state_is_what_checkpoints_of_pytorch_take_and_give():
    expected, _, _ = moved(SHAPES, 0)
    for found, _, _ in ranks.run(2, checkpointed):
        assert same(found, expected)
