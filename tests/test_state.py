import ast
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lmsleep.state
from lmsleep import Cache, Memory, Origin, State


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


def test_values_stand_on_the_ground():
    nodes = list(ast.walk(ast.parse(Path(lmsleep.state.__file__).read_text())))
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    others = {name.split(".")[0] for name in imported} - sys.stdlib_module_names
    assert others == {"torch"} and not {"json", "hashlib"} & imported


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


def test_nothing_of_what_is_evicted_stays_alive():
    whole = cache(t=6).map(lambda t: t.double().requires_grad_() * 2)
    for t in whole.last(0).layers[0]:
        assert t.untyped_storage().nbytes() == 0 and not t.requires_grad


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


def ragged(*counts: int) -> State:
    parts = [State(memory(1), cache(1, t=count)) for count in counts]
    return State.join(parts)


def test_join_puts_the_newest_positions_of_short_rows_last():
    state = ragged(6, 2, 4)
    assert state.cache.filled.tolist() == [6, 2, 4]
    for row, count in enumerate([6, 2, 4]):
        keys, alone = state.cache.layers[0][0][row], cache(1, t=count).layers[0][0][0]
        assert torch.equal(keys[6 - count :], alone)
        assert not keys[: 6 - count].any()


def test_split_undoes_a_join_of_unequal_rows():
    for part, count in zip(ragged(6, 2, 4).split(), [6, 2, 4], strict=True):
        assert part.cache.filled is None
        assert part.cache.layers[0][0].shape[1] == count
        assert equal(part, State(memory(1), cache(1, t=count)))


def test_split_rows_share_no_storage():
    state = ragged(3, 3)
    rows = state.split()
    rows[0].memory.layers[1].zero_()
    rows[0].cache.layers[0][0].zero_()
    assert equal(rows[1], ragged(3, 3).split()[1]) and state.memory.layers[1].any()


def test_keep_evicts_each_row_to_its_own_count():
    kept = cache(3, t=6).keep(torch.tensor([0, 4, 9]))
    assert kept.filled.tolist() == [0, 4, 9] and kept.length == 6
    for t, whole in zip(kept.layers[0], cache(3, t=6).layers[0], strict=True):
        assert not t[0].any() and not t[1, :2].any()
        assert torch.equal(t[1, 2:], whole[1, 2:]) and torch.equal(t[2], whole[2])


def test_rows_that_agree_need_no_counts():
    assert cache(3, t=6).keep(torch.tensor([4, 4, 4])).filled is None
    assert ragged(6, 2).cache.last(2).keep(torch.tensor([2, 2])).filled is None
    assert ragged(6, 2).cache.last(0).filled is None
    assert ragged(6, 2).cache.last(4).filled.tolist() == [4, 2]
    assert ragged(5, 5).cache.filled is None


# What can be asked of a memory


def test_effective_rank_is_the_exponential_of_the_entropy_of_singular_values():
    S = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    S[0, 0] = 3 * torch.eye(4)
    S[0, 1, 0, 1] = 5
    assert torch.allclose(Memory((None, S)).effective_rank(), torch.tensor([[[4.0, 1.0, 0.0]]]).double())
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    S[0, 2, :3, :3] = torch.diag(p)
    assert torch.allclose(Memory((S,)).effective_rank()[0, 0, 2], (-(p * p.log()).sum()).exp())


def test_diff_is_what_one_holds_and_the_other_does_not():
    a, b = memory(), memory().map(lambda s: s + 1)
    assert all(torch.allclose(s, torch.ones_like(s)) for s in b.diff(a).layers if s is not None)
    with pytest.raises(ValueError, match="same blocks"):
        a.diff(memory(heads=(2, 1)))


def test_merge_is_a_weighted_sum_with_all_parents():
    a = Memory((torch.ones(1, 1, 2, 2),), Origin(model="m", tokens=3, sleeps=1))
    b = Memory((3 * torch.ones(1, 1, 2, 2),), Origin(model="m", tokens=4, sleeps=2))
    merged = a.merge([b])
    assert torch.equal(merged.layers[0], 2 * torch.ones(1, 1, 2, 2))
    assert torch.equal(a.merge([b], [2, -1]).layers[0], -torch.ones(1, 1, 2, 2))
    assert merged.origin.parents == (a.origin.id, b.origin.id) and merged.origin.id != a.origin.id
    assert (merged.origin.tokens, merged.origin.sleeps) == (7, 3)
    with pytest.raises(ValueError, match="weights must be 2"):
        a.merge([b], [1.0])
    with pytest.raises(ValueError, match="different models"):
        a.merge([Memory(b.layers, Origin(model="other"))])


def test_a_fork_has_the_same_values_and_an_id_of_its_own():
    a = Memory((torch.ones(1, 1, 2, 2),), Origin(model="m"))
    child = a.fork()
    assert torch.equal(child.layers[0], a.layers[0])
    assert child.origin.parents == (a.origin.id,) and child.origin.id != a.origin.id
    with pytest.raises(ValueError, match="no origin"):
        memory().fork()
