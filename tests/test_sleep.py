import ast
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from conftest import VOCAB, close, lively, random_tokens, same_memory, tiny
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import lmsleep.sleep
from lmsleep import Cache, Memory, SleepConfig, State, read_window, sleep_forward

BLOCKS = ("attention", "gated_delta_net", "gated_linear", "attention")
L = 5
EVICTIONS = pytest.mark.parametrize("eviction", ["hard", "sliding"])


@pytest.fixture(scope="module")
def model():
    return lively(tiny(*BLOCKS))


@pytest.fixture(scope="module")
def tokens():
    return random_tokens(3, 3 * L)


def answers_only(tokens: Tensor, first: int) -> Tensor:
    # The loss begins behind a separator: the token at `first` is read, not predicted.
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, first + 1 :] = True
    return mask


def everything(tokens: Tensor) -> Tensor:
    return torch.ones_like(tokens, dtype=torch.bool)


def sleeping(**options) -> SleepConfig:
    return SleepConfig(**{"window": L, "passes": 3, **options})


def fresh(model, memory: Memory, batch_size: int) -> State:
    return State(memory, model.initial_state(batch_size).cache)


def cross_entropy(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    logp = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return -logp[mask[:, 1:].bool()].mean()


def gradients(loss: Tensor, model) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, model.parameters(), strict=True)]


# Algorithm 1, by hand


def algorithm_1(model, tokens, mask, N):
    # The paper's pseudo-code, line by line (hard eviction, all blocks looped).
    S, loss, count = model.initial_state(len(tokens)).memory, 0.0, 0
    for c, m in zip(tokens.split(L, dim=1), mask.split(L, dim=1), strict=True):
        h = model.embed(c)
        if not m.any():
            for _ in range(N):
                h, state = model.run(h, fresh(model, S, len(c)), 0, model.num_blocks)
                S = state.memory
        else:
            h, state = model.run(h, fresh(model, S, len(c)), 0, model.num_blocks)
            S = state.memory
            loss = loss + cross_entropy(model.head(h), c, m) * m[:, 1:].sum()
            count += m[:, 1:].sum()
    return loss / count, S


@pytest.mark.parametrize("N", [1, 2, 4])
@pytest.mark.parametrize("T", [3 * L, 3 * L - 2])
def test_sleep_forward_is_algorithm_1(model, T, N):
    x = random_tokens(3, T)
    mask = answers_only(x, 2 * L)
    loss, S = algorithm_1(model, x, mask, N)
    out = sleep_forward(model, x, mask, sleeping(passes=N))
    assert close(out.loss, loss)
    assert same_memory(out.memory, S)
    assert out.sleeps.tolist() == [2, 2, 2]


def test_passes_matter(model, tokens):
    losses = [
        sleep_forward(model, tokens, answers_only(tokens, 2 * L), sleeping(passes=N)).loss.item()
        for N in (1, 2, 3)
    ]
    assert min(abs(a - b) for a, b in [losses[:2], losses[1:], losses[::2]]) > 1e-3


@pytest.mark.parametrize("N", [1, 3])
def test_windows_with_loss_make_one_pass_under_algorithm_1s_rule(model, tokens, N):
    mask = answers_only(tokens, L)
    mask[:, 2 * L] = False
    loss, S = algorithm_1(model, tokens, mask, N)
    out = sleep_forward(model, tokens, mask, sleeping(passes=N, sleep_on_loss=False))
    assert close(out.loss, loss)
    assert same_memory(out.memory, S)
    assert out.sleeps.tolist() == [1, 1, 1]
    slept_on = sleep_forward(model, tokens, mask, sleeping(passes=N))
    assert same_memory(slept_on.memory, S) == (N == 1)


def test_rows_decide_by_their_own_loss_whether_to_sleep(model, tokens):
    mask = answers_only(tokens, 2 * L)
    mask[1, L + 1] = True
    config = sleeping(sleep_on_loss=False)
    out = sleep_forward(model, tokens, mask, config)
    assert out.sleeps.tolist() == [2, 1, 2]
    for row in range(3):
        alone = sleep_forward(model, tokens[row : row + 1], mask[row : row + 1], config)
        assert same_memory(out.memory[[row]], alone.memory)
        assert close(out.logits[[row]], alone.logits)


def by_hand(model, tokens, *, N, loop=(0, 4), kept=0, span=None, normalize=False, reinject=False, k=None):
    # Every window is read once for its logits, then slept on unless it is the last.
    first, last = loop
    D, state, logits = model.num_blocks, model.initial_state(len(tokens)), []
    windows = tokens.split(L, dim=1)
    for i, window in enumerate(windows):
        before = state.cache
        h, state = model.run(model.embed(window), state, 0, first, span=span)
        entered = h
        for n in range(1, (N if i < len(windows) - 1 else 1) + 1):
            if n > 1:
                if k is not None and n == N - k + 1:
                    h, entered, state = h.detach(), entered.detach(), state.detach()
                    before = before.detach()
                if normalize:
                    h = h * (h.square().mean(-1, keepdim=True) + torch.finfo(h.dtype).eps).rsqrt()
                if reinject:
                    h = h + entered
            looped = Cache(state.cache.layers[:first] + before.layers[first:last] + state.cache.layers[last:])
            h, state = model.run(h, State(state.memory, looped), first, last, span=span)
            if n == 1:
                logits.append(model.head(model.run(h, state, last, D, span=span)[0]))
        _, state = model.run(h, state, last, D, span=span)
        if i < len(windows) - 1:
            evicted = [[t[:, max(t.shape[1] - kept, 0) :] for t in c] for c in state.cache.layers]
            state = State(state.memory, Cache(tuple(map(tuple, evicted))))
    return torch.cat(logits, dim=1), state


def assert_by_hand(model, tokens, config, k=None, **by_hand_options):
    logits, state = by_hand(model, tokens, N=config.passes, k=k, **by_hand_options)
    loss = cross_entropy(logits, tokens, everything(tokens))
    out = sleep_forward(model, tokens, everything(tokens), config, backprop_passes=k)
    assert close(out.logits, logits)
    assert same_memory(out.memory, state.memory)
    for mine, other in zip(out.state.cache.layers, state.cache.layers, strict=True):
        assert all(close(x, y) for x, y in zip(mine, other, strict=True))
    assert close(out.loss, loss)
    actual, expected = gradients(out.loss, model), gradients(loss, model)
    assert all(close(a, b, 1e-11) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("N", [1, 3])
@pytest.mark.parametrize("loop", [None, (1, 3), (0, 2), (2, 4)])
@EVICTIONS
def test_loop_and_eviction_by_hand(model, tokens, N, loop, eviction):
    sliding = {"kept": L - 1, "span": L} if eviction == "sliding" else {}
    config = sleeping(passes=N, loop=loop, eviction=eviction)
    assert_by_hand(model, tokens, config, loop=loop or (0, 4), **sliding)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reinject", [False, True])
@pytest.mark.parametrize("loop", [(0, 4), (1, 3)])
def test_normalize_and_reinject_by_hand(model, tokens, normalize, reinject, loop):
    options = {"normalize": normalize, "reinject": reinject, "loop": loop}
    assert_by_hand(model, tokens, sleeping(**options), **options)


def other_carries_by_hand(model, tokens, *, N=1, W=1, reset=None):
    # Hard eviction, all blocks: what a pass begins with, and which pass speaks.
    D, S, logits = model.num_blocks, model.initial_state(len(tokens)).memory, []
    windows = tokens.split(L, dim=1)
    for i, window in enumerate(windows):
        embedded = h = model.embed(window)
        start = S
        for _ in range(W):
            h, state = model.run(h, fresh(model, start, len(h)), 0, D)
        logits.append(model.head(h))
        for _ in range(N - 1 if i < len(windows) - 1 else 0):
            begin = start if reset == "S" else state.memory
            h, state = model.run(embedded if reset == "h" else h, fresh(model, begin, len(h)), 0, D)
        S = state.memory
    return torch.cat(logits, dim=1), S


@pytest.mark.parametrize("reset", [None, "S", "h"])
@pytest.mark.parametrize(("N", "W"), [(3, 1), (1, 3), (3, 2)])
def test_resets_and_looped_wake_passes_by_hand(model, tokens, reset, N, W):
    logits, S = other_carries_by_hand(model, tokens, N=N, W=W, reset=reset)
    out = sleep_forward(model, tokens, everything(tokens), sleeping(passes=N, wake_passes=W, reset=reset))
    assert close(out.logits, logits)
    assert same_memory(out.memory, S)
    expected = gradients(cross_entropy(logits, tokens, everything(tokens)), model)
    assert all(close(a, b, 1e-11) for a, b in zip(gradients(out.loss, model), expected, strict=True))


def test_each_reset_and_looped_wake_passes_change_the_result(model, tokens):
    options = [{}, {"reset": "S"}, {"reset": "h"}, {"passes": 1}, {"passes": 1, "wake_passes": 3}]
    memories = [sleep_forward(model, tokens, None, sleeping(**o)).memory for o in options]
    for i, a in enumerate(memories):
        assert not any(same_memory(a, b, 1e-3) for b in memories[:i])


@pytest.mark.parametrize("k", [1, 2, 3])
@EVICTIONS
@pytest.mark.parametrize("options", [{}, {"reinject": True, "loop": (1, 3)}], ids=["plain", "reinject"])
def test_backprop_passes_cut_the_gradient_before_the_last_k(model, tokens, k, eviction, options):
    sliding = {"kept": L - 1, "span": L} if eviction == "sliding" else {}
    config = sleeping(eviction=eviction, **options)
    assert_by_hand(model, tokens, config, k=k, **options, **sliding)


def test_fewer_backprop_passes_give_another_gradient(model, tokens):
    mask = answers_only(tokens, 2 * L)
    found = [
        gradients(sleep_forward(model, tokens, mask, sleeping(), backprop_passes=k).loss, model)
        for k in (1, 2, 3, None)
    ]
    flat = [torch.cat([g.flatten() for g in each]) for each in found]
    assert torch.equal(flat[2], flat[3])
    assert not close(flat[0], flat[1], 1e-2)
    assert not close(flat[1], flat[2], 1e-2)


# What N = 1, the window and the eviction mean


@pytest.mark.parametrize("options", [{"window": 15}, {"window": 40}, {"window": None, "passes": 3}], ids=str)
@EVICTIONS
def test_one_window_is_bit_equal_to_the_plain_model(model, tokens, options, eviction):
    out = sleep_forward(model, tokens, None, SleepConfig(eviction=eviction, **options))
    assert torch.equal(out.logits, model(tokens))
    assert out.loss is None
    assert not out.sleeps.any()


@pytest.mark.parametrize("passes", [1, 2, 3])
@EVICTIONS
def test_wake_logits_are_those_of_the_first_pass(model, tokens, passes, eviction):
    state = sleep_forward(model, tokens[:, :L], None, sleeping(eviction=eviction), evict_last=True).state
    config = sleeping(eviction=eviction)
    logits, after = read_window(model, tokens[:, L : 2 * L], state, config, passes=passes)
    awake, awake_after = read_window(model, tokens[:, L : 2 * L], state, config, passes=1)
    assert torch.equal(logits, awake)
    assert same_memory(after.memory, awake_after.memory) == (passes == 1)
    nothing, same = read_window(model, tokens[:, L : 2 * L], state, config, passes=passes, logits=False)
    assert nothing is None
    assert same_memory(same.memory, after.memory, 0.0)


# A window keeps L - 1 tokens for the convolution too, so it needs at least its taps.
@pytest.mark.parametrize(("window", "conv_size"), [(1, 0), (2, 0), (5, 0), (4, 4), (5, 4), (7, 4)])
def test_one_pass_with_sliding_eviction_is_the_sliding_window_hybrid(tokens, window, conv_size):
    model = lively(tiny(*BLOCKS, conv_size=conv_size))
    out = sleep_forward(model, tokens, None, SleepConfig(window=window, eviction="sliding"))
    h, state = model.run(model.embed(tokens), model.initial_state(3), 0, 4, span=window)
    assert close(out.logits, model.head(h))
    assert same_memory(out.memory, state.memory)


def test_hard_eviction_restarts_attention_and_convolution(model, tokens):
    out = sleep_forward(model, tokens, None, sleeping(passes=1))
    state, logits = model.initial_state(3), []
    for window in tokens.split(L, dim=1):
        h, state = model.run(model.embed(window), fresh(model, state.memory, 3), 0, 4)
        logits.append(model.head(h))
    assert torch.equal(out.logits, torch.cat(logits, dim=1))


def test_after_hard_eviction_the_past_acts_through_memory_alone(model, tokens):
    later = tokens[:, 2 * L :]
    with_memory, without = [], []
    for past in (tokens[:, : 2 * L], random_tokens(3, 2 * L, seed=9)):
        state = sleep_forward(model, past, None, sleeping(), evict_last=True).state
        assert state.cache.nbytes == 0
        blank = State(state.memory.map(torch.zeros_like), state.cache)
        with_memory.append(sleep_forward(model, later, None, sleeping(), state=state).logits)
        without.append(sleep_forward(model, later, None, sleeping(), state=blank).logits)
    assert torch.equal(without[0], without[1])
    assert torch.equal(without[0], model(later))
    assert (with_memory[0] - with_memory[1]).abs().max() > 0.1


class Watched:
    # The model, with its embeddings as leaves of the graph and its calls counted.

    def __init__(self, model):
        self.model, self.num_blocks, self.initial_state = model, model.num_blocks, model.initial_state
        self.embeddings, self.heads, self.spans = [], 0, []

    def embed(self, tokens):
        self.embeddings.append(self.model.embed(tokens).detach().requires_grad_())
        return self.embeddings[-1]

    def run(self, h, state, start, stop, *, valid=None, span=None):
        self.spans.append((start, stop, h.shape[1]))
        return self.model.run(h, state, start, stop, valid=valid, span=span)

    def head(self, h):
        self.heads += 1
        return self.model.head(h)


@pytest.mark.parametrize("cut", [False, True])
def test_gradient_reaches_earlier_windows_through_memory_alone(model, tokens, cut):
    watched = Watched(model)
    state = sleep_forward(watched, tokens[:, : 2 * L], None, sleeping(), evict_last=True).state
    if cut:
        state = State(state.memory.detach(), state.cache)
    later = tokens[:, 2 * L :]
    loss = sleep_forward(watched, later, everything(later), sleeping(), state=state).loss
    *earlier, _ = torch.autograd.grad(loss, watched.embeddings, allow_unused=True)
    assert len(earlier) == 2
    for gradient in earlier:
        assert gradient is None if cut else (gradient.abs().amax(-1) > 0).all()


def test_logits_that_nobody_needs_are_not_computed(model, tokens):
    watched = Watched(model)
    sleep_forward(watched, tokens, answers_only(tokens, 2 * L), sleeping(), return_logits=False)
    assert watched.heads == 1
    watched = Watched(model)
    out = sleep_forward(watched, tokens, None, sleeping(), return_logits=False)
    assert (watched.heads, out.logits, out.loss) == (0, None, None)


def test_only_the_looped_blocks_run_again(model, tokens):
    watched = Watched(model)
    sleep_forward(watched, tokens[:, : L + 2], None, sleeping(loop=(1, 3)), return_logits=False)
    asleep, awake = [(0, 1), (1, 3), (1, 3), (1, 3), (3, 4)], [(0, 4)]
    expected = [(*span, L) for span in asleep] + [(*span, 2) for span in awake]
    assert [span for span in watched.spans if span[0] < span[1]] == expected


@EVICTIONS
@pytest.mark.parametrize("t", [1, L - 1, L, 2 * L, 3 * L - 1])
@pytest.mark.parametrize("wake_passes", [1, 3])
def test_nothing_depends_on_later_tokens(model, tokens, eviction, t, wake_passes):
    config = sleeping(eviction=eviction, wake_passes=wake_passes)
    changed = tokens.clone()
    changed[:, t:] = (changed[:, t:] + 1) % VOCAB
    before = sleep_forward(model, tokens, None, config).logits
    after = sleep_forward(model, changed, None, config).logits
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t], after[:, t])


@EVICTIONS
@pytest.mark.parametrize("windows", [1, 2])
def test_a_sequence_may_be_continued_from_its_state(model, tokens, eviction, windows):
    config, cut = sleeping(eviction=eviction), windows * L
    whole = sleep_forward(model, tokens, None, config)
    start = sleep_forward(model, tokens[:, :cut], None, config, evict_last=True)
    rest = sleep_forward(model, tokens[:, cut:], None, config, state=start.state)
    assert torch.equal(torch.cat([start.logits, rest.logits], dim=1), whole.logits)
    assert same_memory(rest.memory, whole.memory, 0.0)


@EVICTIONS
def test_evict_last_sleeps_on_a_part_of_a_window_too(model, tokens, eviction):
    x, config = tokens[:, : L + 3], sleeping(eviction=eviction)
    awake = sleep_forward(model, x, None, config)
    asleep = sleep_forward(model, x, None, config, evict_last=True)
    start = sleep_forward(model, x[:, :L], None, config, evict_last=True).state
    _, after = read_window(model, x[:, L:], start, config, passes=3)
    assert torch.equal(asleep.logits, awake.logits)
    assert same_memory(asleep.memory, after.memory, 0.0)
    assert not same_memory(asleep.memory, awake.memory, 1e-3)
    assert (asleep.sleeps - awake.sleeps).tolist() == [1, 1, 1]
    if eviction == "hard":
        assert asleep.state.cache.nbytes == 0
    for evicted, read in zip(asleep.state.cache.layers, after.cache.layers, strict=True):
        for kept, before in zip(evicted, read, strict=True):
            t = 0 if eviction == "hard" else min(L - 1, before.shape[1])
            assert torch.equal(kept, before[:, before.shape[1] - t :])


def test_without_a_window_questions_see_the_whole_context(model, tokens):
    config = SleepConfig(window=None, passes=3)
    context = sleep_forward(model, tokens[:, :9], None, config, evict_last=True)
    questions = sleep_forward(model, tokens[:, 9:], None, config, state=context.state)
    assert close(torch.cat([context.logits, questions.logits], dim=1), model(tokens))
    assert not context.sleeps.any()


# Loss


@EVICTIONS
@pytest.mark.parametrize("T", [1, L, 2 * L, 2 * L + 1, 3 * L - 1])
def test_a_last_token_that_is_only_predicted_changes_no_loss(model, tokens, eviction, T):
    x, sleep = tokens[:, :T], sleeping(eviction=eviction)
    lengths = torch.tensor([T, max(T - 3, 0), T])
    for given_lengths in (None, lengths):
        read = sleep_forward(model, x, everything(x), sleep, lengths=given_lengths)
        spared = sleep_forward(model, x, everything(x), sleep, lengths=given_lengths, read_last=False)
        if T == 1:
            assert read.loss is spared.loss is None
            continue
        assert close(read.loss, spared.loss)
        assert close(read.logits[:, :-1], spared.logits)
        before = None if given_lengths is None else lengths.clamp(max=T - 1)
        prefix = sleep_forward(model, x[:, :-1], None, sleep, lengths=before)
        assert same_memory(spared.memory, prefix.memory)
        assert spared.sleeps.tolist() == prefix.sleeps.tolist()


@EVICTIONS
def test_loss_counts_each_marked_token_once_from_the_position_before(model, tokens, eviction):
    mask = random_tokens(3, 3 * L, seed=5) < 4
    mask[:, [0, L]] = True  # the first token has nothing before it; L is predicted from the window before
    out = sleep_forward(model, tokens, mask, sleeping(eviction=eviction))
    assert close(out.loss, cross_entropy(out.logits, tokens, mask))
    quiet = sleep_forward(model, tokens, mask, sleeping(eviction=eviction), return_logits=False)
    # Only marked rows go through the head here; how a product rounds a row depends on how many there are.
    assert quiet.logits is None and close(quiet.loss, out.loss)


def test_a_mask_that_marks_nothing_gives_no_loss(model, tokens):
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, 0] = True
    assert sleep_forward(model, tokens, mask, sleeping()).loss is None


# Batches


@EVICTIONS
def test_a_row_does_not_influence_another(model, tokens, eviction):
    config, mask = sleeping(eviction=eviction), answers_only(tokens, 2 * L)
    changed = tokens.clone()
    changed[1] = (changed[1] + 1) % VOCAB
    before, after = (sleep_forward(model, x, mask, config) for x in (tokens, changed))
    others = [0, 2]
    assert torch.equal(before.logits[others], after.logits[others])
    assert same_memory(before.memory[others], after.memory[others], 0.0)
    assert not torch.equal(before.logits[1], after.logits[1])


@EVICTIONS
def test_permuting_the_batch_permutes_the_result(model, tokens, eviction):
    order, lengths = torch.tensor([2, 0, 1]), torch.tensor([15, 7, 11])
    config, mask = sleeping(eviction=eviction), everything(tokens)
    plain = sleep_forward(model, tokens, mask, config, lengths=lengths)
    permuted = sleep_forward(model, tokens[order], mask, config, lengths=lengths[order])
    assert close(permuted.logits, plain.logits[order])
    assert same_memory(permuted.memory, plain.memory[order])
    assert torch.equal(permuted.sleeps, plain.sleeps[order])
    assert close(permuted.loss, plain.loss)


@EVICTIONS
@pytest.mark.parametrize("evict_last", [False, True])
@example(lengths=[3, 15, 9, 5], pad_seed=1, passes=3)
@given(
    lengths=st.lists(st.integers(1, 3 * L), min_size=1, max_size=4), pad_seed=st.integers(0, 99),
    passes=st.integers(1, 3),
)  # fmt: skip
def test_padding_never_changes_memory(model, eviction, evict_last, lengths, pad_seed, passes):
    config = sleeping(eviction=eviction, passes=passes)
    x = random_tokens(len(lengths), 3 * L)
    real = torch.arange(3 * L) < torch.tensor(lengths)[:, None]
    x = torch.where(real, x, random_tokens(len(lengths), 3 * L, seed=pad_seed))
    padded = sleep_forward(
        model, x, everything(x), config, lengths=torch.tensor(lengths), evict_last=evict_last
    )
    loss, count = 0.0, 0
    for row, length in enumerate(lengths):
        mine = x[row : row + 1, :length]
        alone = sleep_forward(model, mine, everything(mine), config, evict_last=evict_last)
        assert same_memory(padded.memory[[row]], alone.memory)
        assert close(padded.logits[[row], :length], alone.logits)
        assert padded.sleeps[row] == alone.sleeps[0] == (-(-length // L) if evict_last else (length - 1) // L)
        loss += 0.0 if alone.loss is None else alone.loss * (length - 1)
        count += length - 1
    assert (padded.loss is None) if count == 0 else close(padded.loss, loss / count)


@EVICTIONS
@pytest.mark.parametrize("evict_last", [False, True])
@pytest.mark.parametrize("passes", [1, 3])
def test_questions_after_a_padded_context_see_none_of_its_padding(
    model, tokens, eviction, evict_last, passes
):
    config, questions, lengths = (
        sleeping(eviction=eviction, passes=passes),
        random_tokens(3, 4, seed=7),
        [15, 4, 9],
    )
    padded = sleep_forward(model, tokens, None, config, lengths=torch.tensor(lengths), evict_last=evict_last)
    after = sleep_forward(model, questions, None, config, state=padded.state)
    for row, length in enumerate(lengths):
        own = sleep_forward(model, tokens[[row], :length], None, config, evict_last=evict_last).state
        alone = sleep_forward(model, questions[[row]], None, config, state=own)
        assert close(after.logits[[row]], alone.logits)
        assert same_memory(after.memory[[row]], alone.memory)


@EVICTIONS
def test_rows_at_different_places_of_their_windows_read_on_as_alone(model, tokens, eviction):
    # A part of a window each, joined, then read on twice, once with padding: as no sleep_forward could.
    config, lengths = sleeping(eviction=eviction, passes=1), [5, 1, 3]
    states = [sleep_forward(model, tokens[[r], :n], None, config).state for r, n in enumerate(lengths)]
    joined = State.join(states)
    valid = torch.tensor([[True, False], [True, True], [False, False]])
    first, second = random_tokens(3, 2, seed=1), random_tokens(3, 3, seed=2)
    with torch.no_grad():
        _, joined = read_window(model, first, joined, config, passes=1, valid=valid)
        logits, joined = read_window(model, second, joined, config, passes=1)
        for row, (state, count) in enumerate(zip(states, valid.sum(1).tolist(), strict=True)):
            if count:
                _, state = read_window(model, first[[row], :count], state, config, passes=1)
            alone, state = read_window(model, second[[row]], state, config, passes=1)
            assert close(logits[[row]], alone)
            mine = joined.split()[row]
            assert same_memory(mine.memory, state.memory)
            for a, b in zip(mine.cache.layers, state.cache.layers, strict=True):
                assert all(close(x[:, -t.shape[1] :], t) for x, t in zip(a, b, strict=True))


def test_a_padded_batch_has_the_gradients_of_its_rows(model, tokens):
    config, lengths = sleeping(eviction="sliding", passes=2), [12, 7, 3]
    padded = sleep_forward(model, tokens, everything(tokens), config, lengths=torch.tensor(lengths))
    total = sum(
        sleep_forward(model, tokens[[r], :n], everything(tokens[[r], :n]), config).loss * (n - 1)
        for r, n in enumerate(lengths)
    )
    expected = gradients(total / sum(n - 1 for n in lengths), model)
    assert all(close(a, b, 1e-10) for a, b in zip(gradients(padded.loss, model), expected, strict=True))


def test_an_empty_row_keeps_its_memory(model, tokens):
    before = sleep_forward(model, tokens, None, sleeping(), evict_last=True).state
    after = sleep_forward(
        model, tokens, None, sleeping(), state=before, lengths=torch.tensor([0, 5, 0]), evict_last=True
    )
    assert after.sleeps.tolist() == [0, 1, 0]
    assert same_memory(after.memory[[0, 2]], before.memory[[0, 2]], 0.0)
    assert not same_memory(after.memory[[1]], before.memory[[1]], 1e-3)


@EVICTIONS
def test_forked_memories_answer_as_if_each_had_read_the_context(model, tokens, eviction):
    config, questions = sleeping(eviction=eviction), random_tokens(5, 4, seed=7)
    rows = [0, 0, 2, 1, 0]
    state = sleep_forward(model, tokens, None, config, evict_last=True).state
    forked = sleep_forward(model, questions, everything(questions), config, state=state.rows(rows))
    for question, row in enumerate(rows):
        own = sleep_forward(model, tokens[[row]], None, config, evict_last=True).state
        alone = sleep_forward(model, questions[[question]], None, config, state=own)
        assert close(forked.logits[[question]], alone.logits)
        assert same_memory(forked.memory[[question]], alone.memory)


# Gradients


@EVICTIONS
def test_gradient_matches_finite_differences(tokens, eviction):
    model = lively(tiny(*BLOCKS, qk_norm=True))
    config = sleeping(eviction=eviction, normalize=True, reinject=True)
    mask, step = answers_only(tokens, 2 * L), 1e-6

    def loss() -> Tensor:
        return sleep_forward(model, tokens, mask, config).loss

    expected = gradients(loss(), model)
    size = torch.stack([g.norm() for g in expected]).norm()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for (name, p), gradient in zip(model.named_parameters(), expected, strict=True):
            direction = torch.randn(p.shape, generator=rng, dtype=p.dtype)
            direction /= direction.norm()
            p.add_(step * direction)
            above = loss()
            p.sub_(2 * step * direction)
            below = loss()
            p.add_(step * direction)
            difference = ((above - below) / (2 * step) - (gradient * direction).sum()).abs()
            assert difference <= 1e-6 * max((gradient * direction).sum().abs(), 0.01 * size), name


@EVICTIONS
def test_gradient_of_the_initial_memory_matches_finite_differences(model, tokens, eviction):
    config, mask = sleeping(eviction=eviction), answers_only(tokens, 2 * L)
    empty = model.initial_state(3)
    rng = torch.Generator().manual_seed(0)

    def random_memory() -> Memory:
        return empty.memory.map(lambda s: torch.randn(s.shape, generator=rng, dtype=s.dtype))

    S, direction, step = random_memory().map(Tensor.requires_grad_), random_memory(), 1e-6

    def loss(scale: float) -> Tensor:
        moved = [
            None if s is None else s + scale * d for s, d in zip(S.layers, direction.layers, strict=True)
        ]
        return sleep_forward(model, tokens, mask, config, state=State(Memory(tuple(moved)), empty.cache)).loss

    leaves = [s for s in S.layers if s is not None]
    slope = sum(
        (g * d).sum()
        for g, d in zip(
            torch.autograd.grad(loss(0.0), leaves),
            (d for d in direction.layers if d is not None),
            strict=True,
        )
    )
    assert abs((loss(step) - loss(-step)) / (2 * step) - slope) <= 1e-6 * abs(slope)


@EVICTIONS
@pytest.mark.parametrize(
    ("options", "k"),
    [({}, None), ({}, 1), ({"loop": (1, 3)}, None), ({"normalize": True, "reinject": True}, None)],
    ids=str,
)
@pytest.mark.parametrize("lengths", [None, torch.tensor([15, 4, 9])], ids=["full", "padded"])
def test_checkpointing_is_bit_equal(model, tokens, eviction, options, k, lengths):
    mask, config = everything(tokens), sleeping(eviction=eviction, **options)
    found = []
    for checkpoint in (False, True):
        out = sleep_forward(
            model, tokens, mask, config, lengths=lengths, backprop_passes=k, checkpoint=checkpoint
        )
        found.append((out, gradients(out.loss, model)))
    (plain, plain_gradients), (checked, checked_gradients) = found
    assert torch.equal(plain.loss, checked.loss)
    assert torch.equal(plain.logits, checked.logits)
    assert all(torch.equal(a, b) for a, b in zip(plain_gradients, checked_gradients, strict=True))


def test_checkpointing_keeps_no_activations(model, tokens):
    held = []
    for checkpoint in (False, True):
        saved = 0

        def pack(t):
            nonlocal saved
            saved += t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            sleep_forward(
                model,
                tokens,
                answers_only(tokens, 2 * L),
                sleeping(),
                return_logits=False,
                checkpoint=checkpoint,
            )
        held.append(saved)
    assert held[1] < held[0] / 20


# Any backbone


class Outer:
    # Two blocks, each `h <- tanh(h W + h S)`, where `S` adds up the outer products of what was read.

    num_blocks, vocab_size, width = 2, 7, 4
    device = torch.device("cpu")

    def __init__(self):
        rng = torch.Generator().manual_seed(0)
        self.table = torch.randn(self.vocab_size, self.width, generator=rng, dtype=torch.float64)
        self.weights = torch.randn(2, self.width, self.width, generator=rng, dtype=torch.float64)

    def initial_state(self, batch_size):
        shape = (batch_size, 1, self.width, self.width)
        S = Memory((torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)))
        return State(S, Cache(((), ())))

    def embed(self, tokens):
        return self.table[tokens]

    def run(self, h, state, start, stop, *, valid=None, span=None):
        for i in range(start, stop):
            S = state.memory.layers[i] + (h.mT @ h)[:, None] / 10
            h = torch.tanh(h @ self.weights[i] + h @ S[:, 0])
            state = state.replace(i, [(S, ())])
        return h, state

    def head(self, h):
        return h @ self.table.T


def test_any_backbone_can_sleep():
    backbone, x = Outer(), random_tokens(2, 12, vocab=7)
    mask = answers_only(x, 8)
    out = sleep_forward(backbone, x, mask, SleepConfig(window=4, passes=3))
    S = [torch.zeros(2, 4, 4, dtype=torch.float64) for _ in range(2)]
    for window, passes in zip(x.split(4, dim=1), (3, 3, 1), strict=True):
        h = backbone.table[window]
        for _ in range(passes):
            for i in range(2):
                S[i] = S[i] + h.mT @ h / 10
                h = torch.tanh(h @ backbone.weights[i] + h @ S[i])
    assert all(close(a[:, 0], b) for a, b in zip(out.memory.layers, S, strict=True))
    assert close(out.loss, cross_entropy(h @ backbone.table.T, x[:, 8:], mask[:, 8:]))


def test_the_algorithm_imports_no_model():
    nodes = [
        node
        for file in Path(lmsleep.sleep.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
    ]
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    ours = {name for name in imported if name.startswith("lmsleep")}
    elsewhere = {name for name in ours if name.split(".")[:2] != ["lmsleep", "sleep"]}
    assert elsewhere == {"lmsleep.state", "lmsleep.plugins", "lmsleep.plain", "lmsleep.ops.matching"}


# Bad arguments


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("window", {"window": 0}),
        ("passes", {"passes": 0}),
        ("eviction", {"eviction": 3}),
        ("consolidator", {"consolidator": None}),
        ("wake_passes", {"wake_passes": 0}),
        ("reset", {"reset": "s"}),
        ("loop", {"loop": (2, 2)}),
        ("loop", {"loop": (-1, 2)}),
    ],
)
def test_an_invalid_option_is_named(name, options):
    with pytest.raises(ValueError, match=rf"^{name} must"):
        sleeping(**options)


@pytest.mark.parametrize("option", ["normalize", "reinject"])
def test_an_h_that_is_reset_takes_no_other_changes(option):
    with pytest.raises(ValueError, match=r"^reset='h'"):
        sleeping(reset="h", **{option: True})


def test_options_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        sleeping().passes = 1


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokens", lambda x: {"tokens": x[0]}),
        ("tokens", lambda x: {"tokens": x[:0]}),
        ("loss_mask", lambda x: {"loss_mask": everything(x)[:, 1:]}),
        ("lengths", lambda x: {"lengths": torch.tensor([3, 3])}),
        ("lengths", lambda x: {"lengths": torch.tensor([3, 3, 16])}),
        ("lengths", lambda x: {"lengths": torch.tensor([3, 3, -1])}),
        ("loop", lambda x: {"sleep": sleeping(loop=(1, 5))}),
    ],
)
def test_an_argument_that_does_not_fit_is_named(model, tokens, name, change):
    arguments = {"tokens": tokens, "loss_mask": None, "sleep": sleeping(), **change(tokens)}
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        sleep_forward(model, **arguments)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_state_of_another_batch_size_is_refused(model, tokens, rows):
    with pytest.raises(ValueError, match="state"):
        sleep_forward(model, tokens, None, sleeping(), state=model.initial_state(rows))
