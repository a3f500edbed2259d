from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from threading import Barrier, Event

import pytest
import torch
from conftest import VOCAB, close, lively, random_tokens, same_memory, tiny
from hypothesis import given
from hypothesis import strategies as st
from test_sleep import Outer

import lmsleep
from lmsleep import BrokenSleep, Memory, Session, SessionBatch, SleepConfig, fingerprint, sleep_forward
from lmsleep.session import Answer, Sampling
from lmsleep.tasks import Depo, Rule110, Variables
from lmsleep.text.tokenizers import Bytes, Spelled, Words

BLOCKS = ("attention", "gated_delta_net", "gated_linear", "attention")
L = 5
EVICTIONS = pytest.mark.parametrize("eviction", ["hard", "sliding"])


@pytest.fixture(scope="module")
def model():
    return lively(tiny(*BLOCKS))


def sleeping(**options) -> SleepConfig:
    return SleepConfig(**{"window": L, "passes": 3, **options})


def reading(model, tokens=(), **options) -> Session:
    session = Session(model, sleeping(**options))
    session.read(tokens)
    return session


def consolidated(session: Session) -> Memory:
    # What the last sleep left.
    return session.stream.start.memory


# Reading: token by token = chunked = sleep_forward


@EVICTIONS
@pytest.mark.parametrize("T", [3, L, L + 1, 4 * L, 4 * L + 2])
@pytest.mark.parametrize("options", [{"passes": 1}, {"passes": 3}, {"loop": (1, 3)}], ids=str)
def test_reading_at_once_is_sleep_forward_bit_for_bit(model, eviction, T, options):
    x, config = random_tokens(T), sleeping(eviction=eviction, **options)
    session = reading(model, x, eviction=eviction, **options)
    whole = sleep_forward(model, x[None], None, config)
    assert same_memory(session.memory, whole.memory, 0.0)
    assert session.stats.sleeps == whole.sleeps.item() == (T - 1) // L
    assert session.stats.tokens == T and session.stats.window_tokens == (T - 1) % L + 1
    for mine, other in zip(session.working.layers, whole.state.cache.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@given(cuts=st.lists(st.integers(0, 3 * L + 2), max_size=6))
def test_a_stream_may_be_cut_anywhere(model, eviction, cuts):
    x = random_tokens(3 * L + 2)
    session, whole = Session(model, sleeping(eviction=eviction)), reading(model, x, eviction=eviction)
    cuts = sorted(cuts)
    for a, b in zip([0, *cuts], [*cuts, len(x)], strict=True):
        session.read(x[a:b])
    assert same_memory(
        consolidated(session), consolidated(whole), 0.0
    )  # a sleep sees the window, not the cuts
    assert same_memory(session.memory, whole.memory)
    assert session.stats.sleeps == whole.stats.sleeps
    assert torch.equal(session.stream.window, whole.stream.window)


@EVICTIONS
def test_logits_are_those_of_sleep_forward_and_leave_the_session_alone(model, eviction):
    x, session = random_tokens(4 * L), reading(model, (), eviction=eviction)
    session.read(x[:3])
    before = session.stream
    whole = sleep_forward(model, x[None], None, sleeping(eviction=eviction)).logits[0]
    assert close(session.logits(x[3:]), whole[3:])
    assert session.stream is before


@EVICTIONS
@pytest.mark.parametrize("read_before", [0, 2, L, L + 1])
def test_score_is_the_log_likelihood_of_what_could_follow(model, eviction, read_before):
    x, session = random_tokens(2 * L + 3), Session(model, sleeping(eviction=eviction))
    session.read(x[:read_before])
    logp = sleep_forward(model, x[None], None, sleeping(eviction=eviction)).logits[0].log_softmax(-1)
    first = max(read_before, 1)  # nothing predicts the first token of a stream
    expected = logp[torch.arange(first - 1, len(x) - 1), x[first:]].sum()
    before = session.stream
    assert close(torch.tensor(session.score(x[read_before:]), dtype=torch.float64), expected)
    assert session.stream is before
    assert session.score([]) == 0.0


def test_sleep_on_a_part_of_a_window_is_evict_last(model):
    x, session = random_tokens(L + 3), reading(model, random_tokens(L + 3))
    session.sleep()
    asleep = sleep_forward(model, x[None], None, sleeping(), evict_last=True)
    assert same_memory(session.memory, asleep.memory, 0.0)
    assert session.stats.sleeps == 2 and session.stats.window_tokens == 0 and session.working.nbytes == 0
    before = session.stream
    session.sleep()  # nothing to sleep on
    assert session.stream is before
    longer, other = reading(model, x), reading(model, x)
    longer.sleep(passes=3), other.sleep(passes=2)
    assert same_memory(longer.memory, session.memory, 0.0) and not same_memory(
        other.memory, session.memory, 1e-3
    )


def test_without_a_window_nothing_is_evicted(model):
    x, session = random_tokens(12), Session(model, SleepConfig())
    session.read(x[:5]), session.read(x[5:])
    assert close(session.logits([1]), model(torch.cat([x, torch.tensor([1])])[None])[0, -1:])
    with pytest.raises(ValueError, match="never sleeps"):
        session.sleep()


def test_a_loop_that_no_sleep_could_use_is_refused_before_the_reading(model):
    for passes in (1, 2):
        with pytest.raises(ValueError, match="no block with fast weights"):
            Session(model, sleeping(passes=passes, loop=(0, 1)))
    Session(model, SleepConfig(passes=1, loop=(0, 1)))  # never sleeps
    session = reading(model, [1, 2])
    with pytest.raises(ValueError, match="at most 10,000"):
        session.sleep(10**12)
    assert session.stats.window_tokens == 2


def test_any_backbone_has_sessions():
    backbone, x = Outer(), random_tokens(12, vocab=7)
    sleep = SleepConfig(window=4, passes=3)
    session = Session(backbone, sleep)
    session.read(x[:6]), session.read(x[6:])
    whole = sleep_forward(backbone, x[None], None, sleep)
    assert same_memory(consolidated(session), sleep_forward(backbone, x[None, :8], None, sleep,
                                                            evict_last=True).memory, 0.0)  # fmt: skip
    # its blocks sum over what they are given at once, so cuts within a window show; sleeps do not
    assert session.stats.sleeps == whole.sleeps.item() == 2


def test_peaks_do_not_grow_with_the_stream(model):
    peaks = set()
    session = Session(model, sleeping(eviction="sliding"))
    for _ in range(12):
        session.read(random_tokens(2 * L + 1))
        peaks.add(session.stats.peak_bytes)
    assert len(set(list(peaks)[1:])) <= 1 and max(peaks) == session.stats.peak_bytes
    state = session.stream.state
    assert session.stats.peak_bytes >= state.memory.nbytes + state.cache.nbytes > 0


# Forks, resets, layers


def test_forks_and_sessions_do_not_change_each_other(model):
    x = random_tokens(2 * L + 2)
    session = reading(model, x)
    snapshot = session.memory.clone()
    child = session.fork()
    child.read(random_tokens(3 * L, seed=4))
    child.generate([1], 4)
    assert same_memory(session.memory, snapshot, 0.0) and session.stats.tokens == len(x)
    assert child.memory.origin.parents == (session.memory.origin.id,)
    session.read([1, 2, 3])
    assert same_memory(session.memory, reading(model, torch.cat([x, torch.tensor([1, 2, 3])])).memory)


def test_reset_is_a_new_life(model):
    session = reading(model, random_tokens(2 * L))
    old = session.memory.origin.id
    session.reset()
    assert session.memory.norms().sum() == 0 and session.stats.tokens == session.stats.sleeps == 0
    assert session.stats.seconds_awake == 0 and session.memory.origin.id != old


def test_only_working_and_consolidated_memory_change(model):
    before = fingerprint(model)
    session = reading(model, random_tokens(3 * L))
    assert session.working.nbytes == session.stats.working_bytes > 0
    assert session.memory.norms().min() > 0
    assert fingerprint(model) == before == session.memory.origin.model
    assert sum(w.nbytes for w in session.permanent.values()) == session.stats.permanent_bytes
    assert session.memory.origin.rule == (None, "gated_delta_net", "gated_linear", None)


def test_a_session_begins_with_a_memory(model):
    x = random_tokens(3 * L)
    first = reading(model, x[: 2 * L])
    first.sleep()
    second = Session(model, sleeping(), memory=first.memory)
    second.read(x[2 * L :])
    assert same_memory(second.memory, reading(model, x).memory, 0.0)
    assert (second.stats.tokens, second.stats.sleeps) == (3 * L, 2)
    with pytest.raises(ValueError, match="one row, got 2"):
        Session(model, sleeping(), memory=first.memory[[0, 0]])
    with pytest.raises(ValueError, match="has fast weights"):
        Session(lively(tiny("gated_linear")), sleeping(), memory=first.memory)


# Writing


class Counted:
    # The model, with the shapes it runs on counted.

    def __init__(self, model):
        self.model, self.num_blocks, self.config = model, model.num_blocks, model.config
        self.kinds, self.vocab_size, self.device = model.kinds, model.vocab_size, model.device
        self.initial_state, self.embed, self.head = model.initial_state, model.embed, model.head
        self.lengths = []

    def run(self, h, state, start, stop, *, valid=None, span=None):
        if stop > start:
            self.lengths.append(h.shape[1])
        return self.model.run(h, state, start, stop, valid=valid, span=span)


def test_an_answer_takes_one_forward_pass_a_token(model):
    counted = Counted(model)
    session = Session(counted, SleepConfig(window=20, passes=3))
    session.read(random_tokens(4))
    counted.lengths.clear()
    session.generate([1, 2], 9)
    assert counted.lengths == [1, 1] + [1] * 9  # the prompt, but for its last token; that; each new one
    assert session.stats.sleeps == 0
    counted.lengths.clear()
    session.generate([1, 2, 3, 4], 7)  # 4 + 2 + 9 + 4 = 19: the window fills with the first, and sleeps
    assert counted.lengths == [3, 1, 1, 20, 20, 20] + [1] * 6


def greedy(model, tokens, n, **options) -> list[int]:
    # From scratch for every token, as sleep_forward reads it.
    tokens = list(tokens)
    for _ in range(n):
        logits = sleep_forward(model, torch.tensor([tokens]), None, sleeping(**options)).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[-n:]


@EVICTIONS
def test_writing_is_reading_what_was_written(model, eviction):
    x, session = random_tokens(L + 1), reading(model, random_tokens(L + 1), eviction=eviction)
    answer = session.generate([3, 4], 2 * L)
    assert answer == greedy(model, [*x.tolist(), 3, 4], 2 * L, eviction=eviction)
    again = reading(model, [*x.tolist(), 3, 4, *answer], eviction=eviction)
    assert same_memory(consolidated(session), consolidated(again), 0.0)
    assert same_memory(session.memory, again.memory)
    more = session.generate((), 3)  # no prompt: it goes on
    assert more == greedy(model, [*x.tolist(), 3, 4, *answer], 3, eviction=eviction)


def test_a_seed_gives_the_same_draw_again(model):
    session = reading(model, random_tokens(7))

    def draw(seed):
        return session.fork().generate([1], 12, temperature=1.0, seed=seed)

    assert draw(1) == draw(1) != draw(2)


def test_what_was_shown_has_been_read_even_if_nobody_wants_more(model):
    session, whole = Session(model, sleeping()), Session(model, sleeping())
    pieces = session.generate([1, 2], 8, stream=True)
    shown = [next(pieces), next(pieces)]
    pieces.close()
    assert shown == whole.generate([1, 2], 8)[:2]
    assert session.stats.tokens == 4


def test_draws_follow_the_options():
    logits, rng = torch.tensor([0.0, 3.0, 2.0, 1.0]), torch.Generator().manual_seed(0)

    def drawn(**options):
        return {Sampling(**options).draw(logits, rng) for _ in range(300)}

    assert drawn() == drawn(temperature=5.0, top_k=1) == drawn(temperature=5.0, top_p=1e-6) == {1}
    assert drawn(temperature=5.0) == {0, 1, 2, 3}
    assert drawn(temperature=5.0, top_k=2) == {1, 2}
    p = logits.softmax(0)
    assert drawn(temperature=1.0, top_p=float(p[1] + p[2]) - 1e-6) == {1, 2}
    counts = sum(Sampling(temperature=1.0).draw(logits, rng) == 1 for _ in range(2000))
    assert abs(counts / 2000 - p[1]) < 5 * (p[1] * (1 - p[1]) / 2000) ** 0.5


def test_pieces_of_text_are_whole_and_sum_to_the_answer():
    answer = Answer(Bytes(), ["END"])
    shown = []
    for byte in "é wörd→ENnEND and more".encode():
        answer.add(byte)
        shown += answer.pieces(last=False)
        if answer.stopped:
            break
    assert "".join(shown) == answer.whole() == "é wörd→ENn"
    assert all("\\x" not in piece for piece in shown)
    cut = Answer(Bytes(), [])
    cut.add(0xC3)
    assert cut.pieces(last=False) == [] and cut.pieces(last=True) == ["\\xc3"]


def test_answers_stop_at_tokens_and_texts(model):
    free = reading(model, [1]).generate([2], 8)
    assert reading(model, [1]).generate([2], 8, stop=[free[3]]) == free[: free.index(free[3])]
    words = Words([chr(97 + i) for i in range(VOCAB)])
    session = Session(model, sleeping(), words)
    session.read("b")
    text = words.decode(free)
    assert session.fork().generate("c", 8) == text
    assert session.fork().generate("c", 8, stop=[text[4]]) == text[: text.index(text[4])]
    assert "".join(session.generate("c", 8, stream=True)) == text


# Taking back


@EVICTIONS
def test_rewind_takes_back_the_last_call_bit_for_bit(model, eviction, tmp_path):
    session = Session(model, sleeping(eviction=eviction), history=3)
    calls = [
        lambda: session.read(random_tokens(2 * L + 2)),
        lambda: session.generate([1, 2], 2 * L),
        lambda: session.sleep(),
        lambda: session.read([3, 4]),
    ]
    streams = []
    for call in calls:
        streams.append(session.stream)
        call()
        session.read(()), session.generate([1], 1, stream=True)  # which change nothing
    session.save(tmp_path / "a.mem")
    spent = session.stats.seconds_awake
    for stream in streams[:0:-1]:
        session.rewind()
        assert session.stream is stream
    assert session.stats.seconds_awake == spent > 0 and session.memory.origin.tokens == 2 * L + 2
    with pytest.raises(ValueError, match=r"nothing to take back.*history=3 keeps no more"):
        session.rewind()
    assert session.stream is streams[1]
    with pytest.raises(ValueError, match="nothing to take back"):
        Session.load(tmp_path / "a.mem", model).rewind()


def test_what_broke_off_can_be_taken_back(model):
    session = Session(Poisoned(model), sleeping())
    session.read([1, 2])
    before = session.stream
    with pytest.raises(BrokenSleep):
        session.read([7, 1, 2, 3])
    assert session.stats.tokens == 0  # the window is lost, with what was read before
    session.rewind()
    assert session.stream is before
    pieces = session.generate([3], 8, stream=True)
    next(pieces), pieces.close()
    session.rewind()
    assert session.stream is before
    pieces = session.generate([7, 1], 8, stop=[99], stream=True)
    with pytest.raises(ValueError, match="logits are NaN"):
        next(pieces)
    session.rewind()
    assert session.stream is before


def test_a_text_has_no_likelihood_where_logits_are_nan(model):
    broken = Counted(model)
    broken.head = lambda h: model.head(h) * torch.nan
    with pytest.raises(ValueError, match="logits are NaN"):
        Session(broken, sleeping()).score([3, 1, 2])


def test_a_call_that_fails_in_its_first_step_leaves_nothing_to_take_back(model, monkeypatch):
    session = Session(model, sleeping())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model, "run", lambda *args, **rows: (_ for _ in ()).throw(KeyboardInterrupt))
        session.read([1, 2])
    with pytest.raises(ValueError, match="nothing to take back"):
        session.rewind()


def test_a_sleep_that_breaks_when_an_answer_is_left_is_told(model):
    class Late(Poisoned):
        # NaN when a window of its own words is slept on: tokens are read one by one, asleep all at once.
        def embedded(self, tokens):
            self.seen = torch.full_like(tokens, 7 if tokens.shape[1] == L else 0)
            return self.model.embed(tokens)

    session = Session(Late(model), sleeping())
    pieces = session.generate([1, 2, 3, 4], 8, stream=True)
    next(pieces), next(pieces)  # the window is full, and the second token is not read
    with pytest.raises(BrokenSleep):
        pieces.close()
    assert session.stats.tokens == 0


def test_a_fork_shares_the_past_and_a_reset_has_none(model):
    session = reading(model, [1, 2, 3])
    child = session.fork()
    child.rewind()
    assert child.stats.tokens == 0 and session.stats.tokens == 3
    child.read([4])
    session.rewind()  # its own past, whatever the child did
    assert session.stats.tokens == 0
    child.rewind()
    session.read([5])
    session.reset()
    for empty in (session, child, Session(model, sleeping(), history=0)):
        with pytest.raises(ValueError, match="nothing to take back"):
            empty.rewind()


def test_the_past_is_bounded_and_its_bytes_are_told(model):
    session, held = Session(model, sleeping(eviction="sliding"), history=2), []
    assert session.stats.history_bytes == 0
    for _ in range(20):
        session.read(random_tokens(L + 1))
        held.append(session.stats.history_bytes)
    most = 2 * 2 * session.stats.peak_bytes + 2 * 8 * L  # two states and a window's tokens each
    assert 0 < max(held) <= most and len(set(held[5:])) <= L
    without = Session(model, sleeping(), history=0)
    without.read([1, 2])
    assert without.stats.history_bytes == 0
    within = reading(model, [1, 2])
    within.read([3])  # in one window: its beginning is held once
    first = within.stream.start
    assert within.stats.history_bytes == within.past[0].state.memory.nbytes + (
        within.past[0].state.cache.nbytes + within.past[0].window.nbytes
    )
    assert within.past[0].start is first


def test_a_batch_takes_back_its_last_call_on_all_rows(model):
    sessions = [reading(model, random_tokens(n, seed=n)) for n in (1, 3)]
    batch, before = SessionBatch(sessions), [s.stream for s in sessions]
    batch.read([[1, 2, 3], []])
    batch.rewind()
    assert [s.stream for s in sessions] == before
    sessions[0].read([1])
    with pytest.raises(ValueError, match="nothing to take back"):
        batch.rewind()
    assert sessions[0].stats.tokens == 2


def test_an_answer_ends_where_the_session_was_changed_beside_it(model):
    session = reading(model, [1, 2])
    pieces = session.generate([3], 8, stream=True)
    next(pieces)
    session.rewind()
    with pytest.raises(RuntimeError, match="changed since this call began"):
        next(pieces)
    assert session.stats.tokens == 2
    pieces = session.generate([3], 8, stream=True)
    next(pieces)
    session.read([4])
    pieces.close()
    assert session.stats.tokens == 4


CHANGES = {
    "read": lambda session: session.read([4]),
    "sleep": lambda session: session.sleep(),
    "rewind": lambda session: session.rewind(),
    "reset": lambda session: session.reset(),
    "generate": lambda session: session.generate([4], 2),
    "batch": lambda session: SessionBatch([session]).read([[4]]),
    "stream": lambda session: next(session.generate([4], 2, stream=True)),
}


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_no_stream_outlives_a_change_of_its_session(model, change, begun):
    session = reading(model, [1, 2])
    pieces = session.generate([3], 8, stream=True)
    if begun:
        next(pieces)
    CHANGES[change](session)
    after = session.stream
    with pytest.raises(RuntimeError, match="changed since this call began"):
        next(pieces)
    pieces.close()
    assert session.stream is after


# Threads


@pytest.mark.parametrize("change", CHANGES)
def test_another_thread_is_refused_while_a_call_goes_on(model, change, monkeypatch):
    session, inside, go_on, advance = reading(model), Event(), Event(), lmsleep.session.owner.advance

    def slow(*args):
        inside.set()
        assert go_on.wait(60)
        return advance(*args)

    x = random_tokens(3 * L)
    monkeypatch.setattr(lmsleep.session.owner, "advance", slow)
    with ThreadPoolExecutor(1) as pool:
        reads = pool.submit(session.read, x)
        assert inside.wait(60)
        with pytest.raises(RuntimeError, match="used by another thread"):
            CHANGES[change](session)
        copies = session.fork(), deepcopy(session)  # of what it was
        go_on.set()
        reads.result()
    assert all(copy.stats.tokens == 0 for copy in copies)
    for copy in copies:
        copy.read(x)
        assert same_memory(copy.memory, session.memory, 0.0)


def test_no_token_is_lost_between_threads(model):
    session, together = reading(model), Barrier(4)

    def life(_):
        together.wait()
        done = 0
        for _ in range(30):
            with suppress(RuntimeError):
                session.read([1, 2, 3])
                done += 3
        return done

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(life, range(4))) == session.stats.tokens > 0


# Batches


@EVICTIONS
@pytest.mark.parametrize("lengths", [(0, 0, 0), (3, L, 2 * L + 1), (1, 2, 3)])
def test_a_row_of_an_unaligned_batch_is_as_if_alone(model, eviction, lengths):
    sessions = [reading(model, random_tokens(n, seed=n), eviction=eviction) for n in lengths]
    alone = [s.fork() for s in sessions]
    batch = SessionBatch(sessions)
    texts = [random_tokens(n, seed=9 + n) for n in (2 * L + 2, 0, L)]
    batch.read(texts)
    prompts = [[1, 2], [3], [4, 5, 6]]
    answers = batch.generate(prompts, 8, temperature=1.0, seeds=[1, 2, 3])
    batch.sleep(passes=2)
    for row, session in enumerate(alone):
        session.read(texts[row])
        assert session.generate(prompts[row], 8, temperature=1.0, seed=row + 1) == answers[row]
        session.sleep(passes=2)
        assert same_memory(sessions[row].memory, session.memory)
        for name in ("tokens", "sleeps", "window_tokens", "working_bytes", "peak_bytes"):
            assert getattr(sessions[row].stats, name) == getattr(session.stats, name)


def test_rows_that_sleep_at_different_times_are_bit_equal_to_rows_alone(model):
    # A sleep reads its window from the tokens, and here no two rows are due at once.
    sessions = [reading(model, random_tokens(n, seed=n)) for n in (0, 1, 2)]
    alone = [s.fork() for s in sessions]
    x = random_tokens(3 * L, 3, seed=5)
    for tokens in x:
        SessionBatch(sessions).read([t[None] for t in tokens])
    for row, session in enumerate(alone):
        session.read(x[:, row])
        assert sessions[row].stats.sleeps == session.stats.sleeps >= 2
        assert same_memory(consolidated(sessions[row]), consolidated(session), 0.0)
        assert same_memory(sessions[row].memory, session.memory)


def test_what_a_row_reads_changes_no_bit_of_another(model):
    found = []
    for seed in (1, 2):
        sessions = [Session(model, sleeping()) for _ in range(3)]
        texts = [random_tokens(3 * L + 1, seed=7) for _ in range(3)]
        texts[1] = random_tokens(3 * L + 1, seed=seed)
        SessionBatch(sessions).read(texts)
        found.append(sessions)
    for row in (0, 2):
        assert same_memory(found[0][row].memory, found[1][row].memory, 0.0)
    assert not same_memory(found[0][1].memory, found[1][1].memory, 1e-3)


def test_float32_rows_agree_to_rounding():
    model = lively(tiny(*BLOCKS), dtype=torch.float32)
    sessions = [reading(model, random_tokens(n, seed=n)) for n in (1, 4, 8)]
    alone = [s.fork() for s in sessions]
    x = random_tokens(2 * L)
    SessionBatch(sessions).read([x, x, x])
    for row, session in enumerate(alone):
        session.read(x)
        assert same_memory(sessions[row].memory, session.memory, 1e-4)


# Faults


class Poisoned(Counted):
    # Reading the token 7 leaves NaN in the fast weights.

    def run(self, h, state, start, stop, *, valid=None, span=None):
        h, state = super().run(h, state, start, stop, valid=valid, span=span)
        hit = (self.seen == 7).any(dim=1).to(h.dtype)
        nan = torch.where(hit > 0, torch.nan, 0.0)[:, None, None, None].to(h.dtype)
        layers = tuple(None if S is None else S + nan for S in state.memory.layers)
        return h, type(state)(Memory(layers), state.cache)

    def __init__(self, model):
        super().__init__(model)
        self.embed = self.embedded

    def embedded(self, tokens):
        self.seen = tokens
        return self.model.embed(tokens)


def test_a_broken_sleep_keeps_the_last_good_memory(model, tmp_path):
    good = [0, 1, 2, 3, 4]
    session = Session(Poisoned(model), sleeping())
    with pytest.raises(BrokenSleep, match=r"NaN or infinity.*token 5"):
        session.read([*good, 0, 1, 7, 3, 4, 0])
    assert session.stats.tokens == 5 and session.stats.window_tokens == 0
    expected = reading(model, [*good, 0])
    assert same_memory(session.memory, consolidated(expected), 0.0)
    session.read([0, 1])  # it goes on
    assert same_memory(session.memory, reading(model, [*good, 0, 1]).memory)
    session.read([7])
    with pytest.raises(BrokenSleep):
        session.sleep()
    assert same_memory(session.memory, consolidated(expected), 0.0)


class PoisonedKeys(Poisoned):
    # Reading the token 7 leaves infinity in the working memory alone.

    def run(self, h, state, start, stop, *, valid=None, span=None):
        h, after = self.model.run(h, state, start, stop, valid=valid, span=span)
        if bool((self.seen == 7).any()):
            after = type(after)(after.memory, after.cache.map(lambda t: t + torch.inf))
        return h, after


def test_a_sleep_that_would_keep_infinity_is_broken(model):
    session = Session(PoisonedKeys(model), sleeping(eviction="sliding"))
    with pytest.raises(BrokenSleep, match=r"NaN or infinity.*token 5"):
        session.read([0, 1, 2, 3, 4, 0, 1, 7, 3, 4, 0])
    assert same_memory(session.memory, consolidated(reading(model, [*range(5), 0], eviction="sliding")), 0.0)
    hard = Session(PoisonedKeys(model), sleeping())
    hard.read([0, 1, 7, 3, 4, 0])  # nothing of it is kept
    assert hard.stats.sleeps == 1


def test_a_broken_row_leaves_the_others_alone(model):
    poisoned = Poisoned(model)
    sessions = [Session(poisoned, sleeping()) for _ in range(2)]
    x = [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]
    with pytest.raises(BrokenSleep, match=r"\(row 1: token 0\)"):
        SessionBatch(sessions).read([x, [0, 7, *x]])
    assert same_memory(sessions[0].memory, reading(model, x).memory)
    assert sessions[1].stats.tokens == 0 and sessions[1].memory.norms().sum() == 0


@pytest.mark.parametrize(
    ("said", "call"),
    [
        ("no tokenizer", lambda s: s.read("text")),
        ("tokens must lie in 0 ... 10, got 11", lambda s: s.read([1, 11])),
        ("tokens must lie in 0 ... 10, got -1", lambda s: s.read([-1])),
        ("one row of whole numbers", lambda s: s.read(torch.zeros(2, 2, dtype=torch.int64))),
        ("one row of whole numbers", lambda s: s.read([1.5])),
        ("passes must be at least 1", lambda s: s.sleep(0)),
        ("the window is empty", lambda s: s.generate()),
        ("max_new_tokens must be at least 1", lambda s: s.generate([1], 0)),
        ("temperature must be finite", lambda s: s.generate([1], temperature=-1.0)),
        ("top_p must lie", lambda s: s.generate([1], top_p=0.0, stream=True)),
        ("top_k must be at least 1", lambda s: s.generate([1], top_k=0)),
        ("there is no tokenizer", lambda s: s.generate([1], stop=["."])),
        ("at least one token", lambda s: s.logits([])),
        ("at least one", lambda s: SessionBatch([])),
        ("must not hold one twice", lambda s: SessionBatch([s, s])),
        ("the same model and the same sleep",
         lambda s: SessionBatch([s, Session(s.model, SleepConfig(window=3))])),
        ("texts must be 1", lambda s: SessionBatch([s]).read([[1], [2]])),
        ("history must not be negative", lambda s: Session(s.model, sleeping(), history=-1)),
        ("seeds must be 1", lambda s: SessionBatch([s]).generate([[1]], seeds=[1, 2])),
        ("wake_passes=2", lambda s: Session(s.model, sleeping(wake_passes=2))),
        ("loop=", lambda s: Session(s.model, sleeping(loop=(0, 9)))),
    ],
)  # fmt: skip
def test_bad_arguments_are_named_and_change_nothing(model, said, call):
    session = Session(model, sleeping())
    before = session.stream
    with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)")):
        call(session)
    assert session.stream is before


@pytest.mark.parametrize(
    "task", [Depo(nodes=5, names=4), Variables(), Rule110()], ids=lambda t: type(t).__name__
)
def test_a_task_reads_its_own_spelling(task):
    spelled = Spelled(task.spell, task.vocab_size)
    tokens = random_tokens(40, vocab=task.vocab_size).tolist()
    assert spelled.encode(spelled.decode(tokens)) == tokens
    with pytest.raises(ValueError, match="'nosuch' is not in the task's vocabulary"):
        spelled.encode("nosuch")


def test_the_documented_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "sessions.md").read_text()
    sessions, rows = (block.split("```")[0] for block in page.split("```python\n")[1:])
    exec(compile(sessions, "sessions.md", "exec"), {})
    assert (tmp_path / "day-1.mem").exists() and "torch.Size([1, 1, 4])" in capsys.readouterr().out
    exec(compile(rows, "sessions.md", "exec"), {})
    assert capsys.readouterr().out.strip() == rows.strip().splitlines()[-1].split("# ")[1]


def test_the_bytes_of_taking_back_are_those_of_the_documentation():
    session = Session(*lmsleep.open("depo-N4"), history=16)
    for _ in range(20):
        session.read("n8 n4 n7 n8 n2 n5 n5 n1 n1 n6 n4 n3 n3 n2 n6 n7")
    page = (Path(__file__).parents[1] / "docs" / "sessions.md").read_text()
    assert f"{session.stats.history_bytes:,} bytes for 16 calls of `depo-N4`" in page
