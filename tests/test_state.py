from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import Tensor

from lmsleep import Cache, Memory, State


def memory(B: int = 3, *, heads: tuple[int, int] = (2, 2)) -> Memory:
    rng = torch.Generator().manual_seed(B)
    return Memory(
        (None, torch.randn(B, heads[0], 4, 5, generator=rng), torch.randn(B, heads[1], 2, 3, generator=rng))
    )


def cache(B: int = 3, t: int = 6) -> Cache:
    rng = torch.Generator().manual_seed(B)
    return Cache(
        ((torch.randn(B, t, 2, 4, generator=rng), torch.randn(B, t, 2, 4, generator=rng)), (),
         (torch.randn(B, 2, 7, generator=rng),))
    )  # fmt: skip


def tensors(state: State) -> list[Tensor]:
    return [s for s in state.memory.layers if s is not None] + [t for c in state.cache.layers for t in c]


def equal(a: State, b: State) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def test_zeros_have_the_given_shapes_dtype_and_value():
    S = Memory.zeros([(2, 4, 5), None, (1, 2, 3)], 3, dtype=torch.float64)
    assert S.layers[1] is None
    assert torch.equal(S.layers[0], torch.zeros(3, 2, 4, 5, dtype=torch.float64))
    assert torch.equal(S.layers[2], torch.zeros(3, 1, 2, 3, dtype=torch.float64))
    assert Memory.zeros([(1, 1, 1)], 1).layers[0].dtype == torch.float32


def test_sizes_count_every_row_and_block():
    assert memory().batch_size == 3
    assert memory().nbytes == 4 * 3 * (2 * 4 * 5 + 2 * 2 * 3)
    assert cache().nbytes == 4 * 3 * (2 * 6 * 2 * 4 + 2 * 7)
    assert Memory((None,)).batch_size == 0


def test_norms_are_frobenius_per_row_block_and_head():
    S = memory()
    expected = torch.stack([(s**2).sum((2, 3)).sqrt() for s in S.layers if s is not None], dim=1)
    assert torch.allclose(S.norms(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("S", [memory(heads=(2, 1)), Memory((None,))], ids=["uneven heads", "no memory"])
def test_norms_need_equal_heads(S):
    with pytest.raises(ValueError, match="number of heads"):
        S.norms()


def test_values_cannot_be_reassigned():
    with pytest.raises(FrozenInstanceError):
        memory().layers = ()
    with pytest.raises(FrozenInstanceError):
        cache().layers = ()


def test_clone_shares_no_storage():
    S = memory()
    copy = S.clone()
    S.layers[1].add_(1)
    assert torch.equal(copy.layers[1] + 1, S.layers[1])


def test_to_changes_the_dtype_only():
    S = memory()
    wide = S.to(dtype=torch.float64)
    assert wide.layers[0] is None
    assert wide.layers[1].dtype == torch.float64
    assert torch.equal(wide.layers[1].float(), S.layers[1])


def test_detach_cuts_every_tensor_from_the_graph():
    state = State(memory(), cache())
    for t in tensors(state):
        t.requires_grad_()
    cut = state.detach()
    assert not any(t.requires_grad for t in tensors(cut))
    assert equal(cut, state)


@pytest.mark.parametrize(
    "rows",
    [slice(1, 3), [2, 0, 0], torch.tensor([1, 1]), torch.tensor([True, False, True])],
    ids=["slice", "list", "index", "mask"],
)
def test_rows_index_every_tensor(rows):
    state = State(memory(), cache())
    for taken, whole in zip(tensors(state.rows(rows)), tensors(state), strict=True):
        assert torch.equal(taken, whole[rows])


@pytest.mark.parametrize(("kept", "left"), [(0, 0), (1, 1), (5, 5), (6, 6), (9, 6)])
def test_last_keeps_the_newest_positions(kept, left):
    whole = cache(t=6)
    for t, all_of_it in zip(whole.last(kept).layers[0], whole.layers[0], strict=True):
        assert torch.equal(t, all_of_it[:, 6 - left :])


def test_replace_changes_the_named_blocks_alone():
    state = State(memory(), cache())
    new = [(torch.ones(3, 1, 1, 1), (torch.ones(3, 1),)), (None, ())]
    after = state.replace(1, new)
    assert after.memory.layers == (None, new[0][0], None)
    assert after.cache.layers == (state.cache.layers[0], new[0][1], ())
    assert len(state.memory.layers) == 3
    assert state.memory.layers[2] is not None


def test_join_undoes_a_split_in_any_order():
    state = State(memory(5), cache(5))
    first, second = torch.tensor([3, 0]), torch.tensor([4, 1, 2])
    order = torch.cat([first, second]).argsort()
    assert equal(State.join([state.rows(first), state.rows(second)], order), state)
