import copy
import pickle
import threading

import torch
from hypothesis import given
from hypothesis import strategies as st

from lmsleep.layers.rope import rotate, rotate_on
from lmsleep.ops import append


def some(B, T, seed=0, sizes=(2, 4)):
    return torch.randn(B, T, *sizes, generator=torch.Generator().manual_seed(seed))


@given(
    steps=st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 40), st.none() | st.integers(0, 50), st.booleans()),
        min_size=1,
        max_size=20,
    ),
    sizes=st.sampled_from([(), (3,), (2, 4)]),
)
def test_values_branch_from_wherever_they_were_and_stay_what_they_are(steps, sizes):
    # Each step goes on from any earlier value (a fork, or going back), of which as much as `keeps` is left
    # after an eviction, and appends T tokens in either mode; beside it what torch.cat says.
    values = [(some(2, 0, sizes=sizes),) * 2]
    for seed, (which, T, keeps, inference) in enumerate(steps):
        past, said = values[which % len(values)]
        if keeps is not None:
            past, said = (x[:, max(x.shape[1] - keeps, 0) :] for x in (past, said))
        new = some(2, T, seed, sizes)
        with torch.inference_mode() if inference else torch.no_grad():
            values.append((append(past, new), torch.cat([said, new], dim=1)))
    assert all(torch.equal(mine, said) for mine, said in values)


def test_what_grows_in_inference_mode_goes_on_outside_in_the_same_room():
    with torch.inference_mode():
        inside = append(some(1, 3), some(1, 1))
    with torch.no_grad():
        outside = append(inside, some(1, 2))
    assert inside.data_ptr() == outside.data_ptr() and not outside.is_inference()
    weight = torch.ones((), requires_grad=True)
    (outside * weight).sum().backward()  # and serves training, which tensors of inference mode cannot
    assert weight.grad is not None


@torch.no_grad()
def test_who_comes_first_appends_in_place_and_the_second_gets_a_copy():
    past = append(some(1, 3), some(1, 1))
    first, second = append(past, some(1, 1, 1)), append(past, some(1, 1, 2))
    assert first.data_ptr() == past.data_ptr() != second.data_ptr()
    cut = append(past[:, 1:], some(1, 1))  # any other view of it knows of no room
    assert cut.untyped_storage().data_ptr() != past.untyped_storage().data_ptr()


@torch.no_grad()
def test_copies_and_pickles_have_no_part_in_the_room():
    past = append(some(1, 3), some(1, 1))
    for other in (copy.deepcopy(past), pickle.loads(pickle.dumps(past))):
        longer = append(other, some(1, 1, 1))
        assert torch.equal(longer[:, :4], past) and torch.equal(append(past, some(1, 1, 2))[:, :4], past)


def test_threads_that_branch_from_one_value_do_not_meet():
    @torch.no_grad()  # of the thread that calls it
    def grow(value, seed, begin, ends):
        begin.wait()
        for _ in range(20):
            value = append(value, some(1, 1, seed))
        ends[seed] = value

    for _ in range(30):
        with torch.no_grad():
            value = append(some(1, 3), some(1, 1))
        begin, ends = threading.Barrier(2), {}
        both = [threading.Thread(target=grow, args=(value, seed, begin, ends)) for seed in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        for seed, end in ends.items():
            assert torch.equal(end, torch.cat([value, some(1, 1, seed).expand(1, 20, 2, 4)], dim=1))


def test_gradients_flow_through_what_is_appended():
    past, new = some(1, 3).requires_grad_(), some(1, 2).double().requires_grad_()
    longer = append(past, new)
    assert longer.dtype == torch.float64
    longer.sum().backward()
    assert bool((past.grad == 1).all()) and bool((new.grad == 1).all())


@torch.no_grad()
def test_keys_that_remember_how_they_are_rotated_are_rotated_as_all_at_once():
    keys = some(2, 3, sizes=(2, 8))
    for step in range(80):
        longer = append(keys, some(2, 1 + step % 2, step, (2, 8)))
        assert torch.equal(rotate_on(longer, keys, 1e4), rotate(longer, 0, 1e4))
        keys = longer
