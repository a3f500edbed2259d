import base64
import json
import math
import re
from dataclasses import dataclass, replace
from itertools import takewhile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import close, lively, random_tokens, run_command, same_memory, tiny

import lmsleep
from lmsleep import Compact, HybridLM, Memory, Session, SleepConfig, State, fingerprint, sleep_forward
from lmsleep.cli import main
from lmsleep.evaluation import evaluate
from lmsleep.microscope import watch, words
from lmsleep.microscope.ablation import ablated, ablation_rows, all_heads, reliance_rows
from lmsleep.microscope.figures import figures
from lmsleep.microscope.heads import head_rows, hypnogram_rows, norm
from lmsleep.microscope.page import page
from lmsleep.microscope.probe import probe_rows, probed, ridge
from lmsleep.microscope.readback import readback, readback_rows
from lmsleep.microscope.subject import Subject, cut, from_session
from lmsleep.ops import RULES
from lmsleep.sleep import GradientSteps, GradMem, InPlace, MemoryTokens, Passes
from lmsleep.tasks import MQAR, TASKS, Depo, GSMInfinite, Rule110, Text, batch_rng
from lmsleep.tasks.base import Batch
from lmsleep.tasks.reading import read_batch
from lmsleep.text.tokenizers import Bytes
from lmsleep.training import RunConfig, RunFolder, TrainConfig

SLEEP = SleepConfig(window=6, passes=3)
X = random_tokens(2, 15)
PNG = re.compile(r'src="data:image/png;base64,([A-Za-z0-9+/=]+)"')


def windows(model, sleep=SLEEP, tokens=X):
    return list(watch(model, tokens, sleep))


# Watching


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize(("N", "loop"), [(3, None), (3, (1, 3)), (1, None), (1, "middle")])
def test_watching_a_stream_is_reading_it(eviction, N, loop):
    kinds = ("gated_delta_net", "attention", "gated_linear", "gated_delta_net")
    model, sleep = lively(tiny(*kinds)), replace(SLEEP, eviction=eviction, passes=N, loop=loop)
    seen = windows(model, sleep)
    assert [w.tokens.shape[1] for w in seen] == [6, 6, 3] and all(len(w.passes) == N for w in seen)
    for end, window in zip((6, 12, 15), seen, strict=True):
        read = sleep_forward(model, X[:, :end], None, sleep, evict_last=True)
        assert same_memory(window.after.memory, read.memory, 0)
        assert same_memory(window.passes[-1].memory, read.memory, 0)
        assert all(
            torch.equal(a, b)
            for mine, its in zip(window.after.cache.layers, read.state.cache.layers, strict=True)
            for a, b in zip(mine, its, strict=True)
        )


OTHERS = {
    "memory-tokens": (MemoryTokens(3), {"memory_tokens": 2}),
    "gradmem": (GradMem(3), {"memory_tokens": 2}),
    "in-place": (InPlace(3), {"mlp_dim": 8, "in_place_mlp": True}),
    "gradient-steps": (GradientSteps(3), {"mlp_dim": 8, "trained_mlp": True}),
}


@torch.no_grad()
@pytest.mark.parametrize("method", OTHERS)
def test_a_sleep_of_another_kind_is_watched_at_its_ends(method):
    by, options = OTHERS[method]
    model, sleep = lively(tiny("attention", "attention", **options)), SleepConfig(window=6, consolidator=by)
    state = None
    for window in windows(model, sleep):
        read, slept = (
            sleep_forward(
                model, window.tokens, None, sleep.with_passes(n), state=state, evict_last=True
            ).state
            for n in (1, 3)
        )
        awake, asleep = window.passes
        assert same_memory(awake.memory, read.memory, 0) and same_memory(asleep.memory, slept.memory, 0)
        assert not same_memory(awake.memory, asleep.memory, 1e-6) and awake.writes == {} == asleep.writes
        state = window.after
        assert same_memory(state.memory, slept.memory, 0) and not state.cache.length


@dataclass(frozen=True)
class Twice(Passes):
    """One's own: the window is read, and what is left is read again from the beginning."""

    def sleep_on(self, model, window, *, logits=True):
        said, state = self.read(model, window, logits=logits)
        return said, self.read(model, replace(window, began=State(state.memory, window.began.cache)))[1]


@pytest.mark.parametrize("by", [Passes(1, wake_passes=2), Passes(3, wake_passes=2), Twice(2)])
def test_looped_models_and_ways_of_ones_own_are_watched_at_the_ends_of_a_sleep(by):
    model, sleep = lively(tiny()), SleepConfig(window=6, consolidator=by)
    for window in windows(model, sleep):
        assert len(window.passes) == min(by.passes, 2)
    read = sleep_forward(model, X, None, sleep, evict_last=True)
    assert same_memory(window.after.memory, read.memory, 0)


def test_after_pass_n_of_a_loop_over_all_blocks_stands_what_n_passes_leave():
    model = lively(tiny())
    for n, each in enumerate(windows(model)[0].passes, start=1):
        after = sleep_forward(model, X[:, :6], None, replace(SLEEP, passes=n), evict_last=True)
        assert same_memory(each.memory, after.memory, 0)


def test_what_tokens_write_explains_what_every_pass_leaves():
    model = lively(tiny("attention", "gated_delta_net", "gated_linear"))
    rules = {1: RULES["gated_delta_rule"].reference, 2: RULES["gated_linear_rule"].reference}
    for window in windows(model):
        before = window.before.memory
        for each in window.passes:
            assert set(each.writes) == {1, 2}
            for block, writes in each.writes.items():
                _, S = rules[block](*writes, 1.0, before.layers[block])
                assert close(S, each.memory.layers[block])
            before = each.memory


def test_nobody_else_is_heard_while_a_stream_is_watched(monkeypatch):
    model, read_window = lively(tiny()), lmsleep.microscope.trace.read_window
    alone, session = windows(model), Session(model, SLEEP)

    def beside(*args, **options):
        # Another session reads on the model between what is watched.
        assert not any(module._forward_pre_hooks for module in model.modules())
        session.read(random_tokens(9, seed=5))
        seen = read_window(*args, **options)
        session.read(random_tokens(4, seed=6))
        return seen

    monkeypatch.setattr(lmsleep.microscope.trace, "read_window", beside)
    for one, other in zip(alone, windows(model), strict=True):
        for a, b in zip(one.passes, other.passes, strict=True):
            assert all(
                torch.equal(x, y) for i in a.writes for x, y in zip(a.writes[i], b.writes[i], strict=True)
            )
            assert a.writes.keys() == b.writes.keys() and same_memory(a.memory, b.memory, 0)
    assert session.stats.tokens == 3 * 13


def test_a_watched_model_is_not_copied():
    model = lively(tiny())
    heard = {}
    copy = lmsleep.microscope.trace._listening(model, heard)
    assert copy is not model and all(
        a is b for a, b in zip(model.parameters(), copy.parameters(), strict=True)
    )


# Figures of heads


def test_figures_of_heads_are_those_computed_by_hand():
    model = lively(tiny("attention", "gated_delta_net"))
    window = windows(model)[1]
    rows = {(r["pass"], r["head"]): r for r in head_rows(1, window)}
    assert set(rows) == {(n, head) for n in (1, 2, 3) for head in (0, 1)}
    S = [window.before.memory.layers[1], *(each.memory.layers[1] for each in window.passes)]
    S = [s.numpy() for s in S]
    for (n, head), row in rows.items():
        now, old = S[n][:, head], S[n - 1][:, head]
        change = now - old

        def cosine(a, b):
            return np.mean(
                [np.sum(x * y) / np.sqrt(np.sum(x * x) * np.sum(y * y)) for x, y in zip(a, b, strict=True)]
            )

        assert math.isclose(row["norm"], np.mean(np.sqrt((now**2).sum((1, 2)))), rel_tol=1e-12)
        assert math.isclose(row["change"], np.mean(np.sqrt((change**2).sum((1, 2)))), rel_tol=1e-12)
        assert math.isclose(row["cosine_S"], cosine(now, old), rel_tol=1e-9)
        if n == 1:
            assert row["cosine_change"] is None
        else:
            assert math.isclose(row["cosine_change"], cosine(change, old - S[n - 2][:, head]), rel_tol=1e-9)
        share = [np.linalg.svd(s)[1] / np.linalg.svd(s)[1].sum() for s in now]
        rank = np.mean([np.exp(-(p * np.log(p)).sum()) for p in share])
        assert math.isclose(row["effective_rank"], rank, rel_tol=1e-9)


def test_gates_are_those_of_the_layer():
    model = lively(tiny("gated_delta_net"))
    layer = model.blocks[0].mixer
    h = model.blocks[0].norm(model.embed(X[:, :6]))
    with torch.no_grad():
        alpha = torch.exp(-layer.A_log.exp() * torch.nn.functional.softplus(layer.a_proj(h) + layer.dt_bias))
        beta = layer.b_proj(h).sigmoid()
    for row in list(head_rows(0, windows(model)[0]))[:2]:
        assert math.isclose(row["forgotten"], float((1 - alpha)[..., row["head"]].mean()), rel_tol=1e-9)
        assert math.isclose(row["written"], float(beta[..., row["head"]].mean()), rel_tol=1e-9)


def test_a_cosine_with_nothing_is_none():
    first = next(head_rows(0, windows(lively(tiny()))[0]))
    assert first["cosine_S"] is None and first["cosine_change"] is None


def test_the_hypnogram_is_the_stream_read_token_by_token():
    model = lively(tiny("attention", "gated_delta_net", "gated_linear"))
    layers = {1: model.blocks[1].mixer, 2: model.blocks[2].mixer}
    first = windows(model)[0]
    rows = list(hypnogram_rows(0, first, layers))
    assert [(r["token"], r["fill"], r["pass"]) for r in rows] == [
        (0, 0, 0), *((t, t, 1) for t in range(1, 7)), (6, 6, 2), (6, 6, 3)
    ]  # fmt: skip
    for row in rows[1:7]:
        read = sleep_forward(model, X[:, : row["token"]], None, SLEEP).memory.detach()
        assert math.isclose(row["norm"], norm(read), rel_tol=1e-12)
    assert math.isclose(rows[-1]["norm"], norm(first.after.memory), rel_tol=1e-12)


# Readback


def by_hand(*, forget: float = 1.0):
    # Orthonormal keys, values far apart: S holds every pair exactly.
    k = torch.eye(4, dtype=torch.float64)[None, :, None]
    v = torch.tensor([[3.0, 1, 0], [0, -2, 1], [1, 0, 4], [-1, -1, -1]], dtype=torch.float64)[None, :, None]
    S = torch.einsum(
        "blhk,blhv->bhkv", k * forget ** torch.arange(4.0, dtype=torch.float64)[None, :, None, None], v
    )
    return S, k, v


@pytest.mark.parametrize("forget", [1.0, 0.1])
def test_orthonormal_keys_are_read_back_exactly_however_weak(forget):
    cosine, rank = readback(*by_hand(forget=forget))
    assert close(cosine, torch.ones_like(cosine)) and (rank == 1).all()


def test_what_was_never_written_is_not_read_back():
    S, k, v = by_hand()
    S[:, :, 2] = 0  # the third key's row
    cosine, rank = readback(S, k, v)
    assert rank[0, :, 0].tolist() == [1, 1, 4, 1] and cosine[0, 2, 0] == 0


def test_a_token_that_wrote_over_another_takes_its_rank():
    S, k, v = by_hand()
    S[:, :, 0] = S[:, :, 1]  # the second value under the first key, too
    cosine, rank = readback(S, k, v)
    assert rank[0, 1, 0] == 1 and rank[0, 0, 0] > 1
    a, b = v[0, 0, 0], v[0, 1, 0]
    assert math.isclose(float(cosine[0, 0, 0]), float(a @ b / (a.norm() * b.norm())), rel_tol=1e-12)


def test_readback_rows_name_tokens_and_ask_the_end_of_the_stream_too():
    model = lively(tiny())
    seen = windows(model, tokens=X[:1])
    nothing = seen[-1].after.memory.map(torch.zeros_like)
    rows = list(readback_rows([(1, seen[1])], nothing, lambda t: f"<{t[0]}>"))
    assert [r["token"] for r in rows[::2]] == X[0, 6:12].tolist() and rows[0]["text"] == f"<{int(X[0, 6])}>"
    cosine, rank = readback(seen[1].passes[-1].memory.layers[1], *seen[1].passes[-1].writes[1][1:3])
    for r in rows:
        assert math.isclose(r["cosine"], float(cosine[0, r["place"], r["head"]]), rel_tol=1e-12)
        assert r["rank"] == int(rank[0, r["place"], r["head"]])
        assert (r["cosine_end"], r["retrieved_end"]) == (0, 0)


# Probes


def test_a_probe_finds_a_planted_linear_code_and_nothing_in_noise():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(5, (3000, 2), generator=g)
    code = torch.randn(2, 5, 40, generator=g, dtype=torch.float64)
    noise = torch.randn(3000, 40, generator=g, dtype=torch.float64)
    x = noise + 3 * code[0, y[:, 0]] + 5  # the second question is not in it
    right = (ridge(x[:2000], y[:2000], 5)(x[2000:]) == y[2000:]).double().mean(0)
    assert right[0] > 0.98 and abs(right[1] - 0.2) < 0.06


def test_the_probe_reads_a_token_off_its_embedding_and_not_where_hops_lead():
    task = Depo(
        nodes=5, hops=2, names=6, name_lengths=(1, 1), node_distribution="fixed", ask="fork", queries=2
    )
    model = lively(tiny("attention", "gated_delta_net", vocab_size=task.vocab_size, d_model=32))
    fit = [task.batch(batch_rng(0, "train", i), 64, "train").context for i in range(4)]
    test = task.batch(batch_rng(0, "test", 0), 64, "test").context
    rows = list(probe_rows(model, task, SleepConfig(window=10, passes=2), fit, test))
    assert [(r["window"], r["pass"], r["steps"]) for r in rows] == [
        (0, n, j) for n in range(3) for j in range(3)
    ]
    assert rows[0]["accuracy"] == 1 and rows[0]["targets"] == 64 * 5
    assert rows[1]["accuracy"] < 0.4 and rows[2]["accuracy"] < 0.4


def test_intermediate_nodes_are_those_that_solving_passes_through():
    for task in (
        Depo(nodes=7, hops=3, names=9, ask="fork", queries=2),
        Depo(nodes=6, hops=2, names=5, queries=3),
    ):
        batch = task.batch(batch_rng(3, "train", 0), 20, "train")
        tokens = batch.tokens if batch.context is None else batch.context
        ahead = task.intermediate(tokens)
        for row, context in enumerate(tokens.tolist()):
            read = list(takewhile(task.ans.__gt__, context))
            for place in (ahead[row, :, 0] >= 0).nonzero()[:, 0].tolist():
                begin = place
                while begin and 0 < context[begin - 1] <= task.names:
                    begin -= 1
                name = context[begin : place + 1]
                for j in range(task.hops + 1):
                    node = [name] if j == 0 else task.solve([*read, task.ans + j, *name, -1])
                    assert ahead[row, place, j] == node[0][-1] - task.names - 1
        nodes = (ahead[..., 0] >= 0).sum(1)
        assert (nodes >= 3).all() and (nodes <= task.nodes).all()


def test_an_edge_that_leads_out_of_what_was_read_has_no_target():
    task = Depo(nodes=3, hops=2, names=4, name_lengths=(1, 1))
    ahead = task.intermediate(torch.tensor([[5, 6, 6, 7]]))  # 1 -> 2 -> 3 -> ?
    assert ahead.tolist() == [[[-1] * 3, [1, 2, -1], [-1] * 3, [2, -1, -1]]]


def test_intermediate_states_end_in_the_answer():
    task = Rule110(width=6, states=2, t=3, asked=6)
    batch = task.batch(batch_rng(0, "test", 0), 5, "test")
    states = task.intermediate(batch.tokens)
    assert torch.equal(states[:, :12, 0], batch.tokens[:, :12]) and (states[:, 12:] == -1).all()
    assert torch.equal(states[:, :12, 3], batch.tokens[:, 13:])
    part = task.intermediate(batch.tokens[:, :8])
    assert torch.equal(part[:, :6], states[:, :6]) and (part[:, 6:] == -1).all()


def test_a_task_without_an_intermediate_quantity_is_told_which_have_one():
    assert {name for name, task in TASKS.items() if hasattr(task, "intermediate")} == {"depo", "rule110"}
    with pytest.raises(ValueError, match=r"MQAR offers no intermediate quantity.*depo, rule110"):
        probed(MQAR())


# Ablation


class Lookup:
    """A backbone whose one block with fast weights answers by head 0 alone; head 1 holds noise."""

    num_blocks = 1

    def initial_state(self, batch_size):
        zeros = torch.zeros(batch_size, 2, 4, 4, dtype=torch.float64)
        return State(Memory((zeros,)), lmsleep.Cache(((),)))

    def embed(self, tokens):
        return torch.nn.functional.one_hot(tokens, 9).double()

    def run(self, h, state, start, stop, *, valid=None, span=None):
        for _ in range(start, stop):
            S, keys, values = state.memory.layers[0].clone(), h[..., :4], h[..., 4:8]
            read = torch.einsum("bkv,btk->btv", S[:, 0], keys)
            pairs = torch.einsum("btk,btv->bkv", keys[:, ::2], values[:, 1::2]) if h.shape[1] > 1 else 0
            S[:, 0] += pairs
            S[:, 1] += 1
            h = torch.cat([h[..., :4], h[..., 4:8] + 20 * read, h[..., 8:]], -1)
            state = State(Memory((S,)), state.cache)
        return h, state

    def head(self, h):
        return torch.cat([torch.zeros_like(h[..., :4]), h[..., 4:8], h[..., 8:]], -1)


def lookup_subject(model=None, n=16) -> Subject:
    rng = torch.Generator().manual_seed(1)
    values = torch.stack([torch.randperm(4, generator=rng) for _ in range(n)])
    context = torch.stack([torch.arange(4).expand(n, 4), 4 + values], -1).flatten(1)
    asked = torch.arange(4).repeat(n)
    rows = torch.stack([asked, 4 + values.flatten()], 1)
    answers = torch.full_like(rows, -1)
    answers[:, 1] = torch.arange(len(rows))
    row = torch.arange(n).repeat_interleave(4)
    batch = Batch(rows, answers >= 0, answers, torch.zeros(len(rows), dtype=torch.int64), context, row)
    model = model or Lookup()
    return Subject("by hand", model, SleepConfig(window=8), model.initial_state(n), context, batch, None, str)


def test_without_the_only_head_that_matters_the_answer_is_gone():
    rows = {(r["block"], r["head"], r["how"]): r for r in ablation_rows(lookup_subject())}
    assert rows[None, None, None]["accuracy"] == 1
    assert rows[0, 0, "zero"]["accuracy"] <= 0.25 and rows[0, 0, "zero"]["nats_lost"] > 1
    values = lookup_subject().batch.context[:, 1::2]
    shared = float(
        (values == values.roll(1, 0)).double().mean()
    )  # pairs that the two sequences have in common
    assert rows[0, 0, "swap"]["accuracy"] == shared < 0.6
    assert rows[0, 1, "zero"]["accuracy_lost"] == rows[0, 1, "swap"]["accuracy_lost"] == 0
    assert rows[0, 0, "swap"]["nats"] == rows[None, None, "swap"]["nats"]


def test_zeroing_every_head_is_having_no_memory():
    model = lively(tiny("attention", "gated_delta_net", "gated_linear"))
    context, rows = X[:, :6], X[:, 6:11]
    batch = Batch(rows, torch.ones_like(rows).bool(), torch.arange(10).view(2, 5), torch.zeros(10), context,
                  torch.arange(2))  # fmt: skip
    memory = sleep_forward(model, context, None, SLEEP, evict_last=True).memory
    erased = read_batch(
        model, batch, SLEEP, between=lambda m: ablated(m, all_heads(memory), "zero"), return_logits=True
    )
    fresh = read_batch(model, replace(batch, context=None, context_row=None), SLEEP, return_logits=True)
    intact = read_batch(model, batch, SLEEP, return_logits=True)
    assert torch.equal(erased.logits, fresh.logits) and not close(intact.logits, fresh.logits, 1e-3)


def test_swapping_takes_the_next_row_and_leaves_the_memory_it_was_given():
    memory = Memory((None, torch.randn(3, 2, 2, 2)))
    before = memory.clone()
    swapped = ablated(memory, [(1, 0)], "swap")
    assert torch.equal(swapped.layers[1][:, 0], memory.layers[1][[2, 0, 1], 0])
    assert torch.equal(swapped.layers[1][:, 1], memory.layers[1][:, 1])
    assert same_memory(memory, before, 0)


def test_readings_differ_in_how_the_memory_was_made():
    rows = {r["reading"]: r for r in reliance_rows(lookup_subject())}
    assert (
        rows["evicted after N = 1 passes"]["accuracy"] == 1 and "evicted after 1 pass, no sleep" not in rows
    )
    assert rows["memory erased"]["accuracy"] <= 0.25


@pytest.mark.parametrize("sleep_on_loss", [True, False])
def test_cutting_a_batch_at_its_last_eviction_changes_no_prediction_after_it(sleep_on_loss):
    task = Rule110(width=6, states=2, t=2, asked=2)
    model = lively(tiny("attention", "gated_delta_net", vocab_size=3))
    sleep = SleepConfig(window=6, passes=2, sleep_on_loss=sleep_on_loss)
    batch = task.batch(batch_rng(0, "test", 0), 4, "test")
    divided = cut(batch, sleep)
    assert divided.context.shape == (4, 12)
    whole, parts = (read_batch(model, b, sleep, return_logits=True).logits for b in (batch, divided))
    assert close(parts, whole[:, 12:])


def test_windows_that_carry_loss_are_not_context_where_they_do_not_sleep(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(256)) * 4)
    batch = Text(data=(tmp_path / "a.txt",), length=20).batch(batch_rng(0, "test", 0), 2, "test")
    assert cut(batch, SLEEP).context.shape == (2, 18)
    assert cut(batch, replace(SLEEP, sleep_on_loss=False)).context.shape == (2, 0)


# Everything together


def session_that_read(tokens: int) -> Session:
    model = lively(tiny("attention", "gated_delta_net", vocab_size=256), dtype=torch.float32)
    session = Session(model, SLEEP, Bytes())
    session.read("It sleeps on what it reads."[:tokens])
    return session


def snapshot(session):
    state = session.stream.state
    tensors = [
        t.clone()
        for t in (*state.memory.layers, *(t for c in state.cache.layers for t in c))
        if t is not None
    ]
    return fingerprint(session.model), session.stream.window.tolist(), session.stats.tokens, tensors


@pytest.mark.parametrize("read", [0, 3, 6, 20])
def test_a_session_is_looked_at_without_being_changed(read):
    session = session_that_read(read)
    before = snapshot(session)
    seen = lmsleep.inspect(session, "Then it forgets the words.")
    after = snapshot(session)
    assert before[:3] == after[:3] and all(
        torch.equal(a, b) for a, b in zip(before[3], after[3], strict=True)
    )
    assert seen.about["slow_weights_before"] == seen.about["slow_weights_after"] == before[0]
    assert seen.hypnogram[-1]["token"] == read + 26


def test_the_memory_of_a_session_is_asked_what_follows_the_last_eviction():
    session, text = session_that_read(9), "Then it"
    seen = lmsleep.inspect(
        session, text
    )  # 3 tokens in the window and 7: cut after 6, the first is not predicted
    assert seen.about["asked"] == 3
    fork = session.fork()
    fork.read("The")
    fork.sleep()
    assert math.isclose(seen.ablation[0]["nats"] * 3, fork.score("n it"), rel_tol=1e-5)
    within = lmsleep.inspect(session, "Th")  # nothing is evicted before it
    assert within.about["asked"] == 2
    assert math.isclose(within.ablation[0]["nats"] * 2, session.score("Th"), rel_tol=1e-5)


def test_tables_are_flat_and_valid_json():
    seen = lmsleep.inspect(session_that_read(3), "Then it forgets the words.")
    document = json.loads(json.dumps(seen.to_dict(), allow_nan=False))
    for name in ("change", "heads", "hypnogram", "readback", "reliance", "ablation"):
        assert document[name], name
        for row in document[name]:
            assert row.keys() == document[name][0].keys()
            assert all(value is None or isinstance(value, int | float | str) for value in row.values())
    assert document["probe"] == [] and "no probe" in document["notes"][0]


def test_the_page_is_one_file_with_its_pictures_and_no_address_in_it(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    lmsleep.inspect(session_that_read(3), "Then it <b>forgets</b> the $words$.").html(path)
    page = path.read_text()
    pictures = PNG.findall(page)
    assert len(pictures) == 4
    # The letters of a picture in base64 spell anything by chance, so the text is looked at without them.
    text = PNG.sub("", page)
    assert not any(part in text for part in ("http", "<script", "<b>", "src="))
    assert all(base64.b64decode(data, validate=True).startswith(b"\x89PNG") for data in pictures)
    assert "before and after" in page and "costs most" in page
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


class Opaque:
    """A backbone that is no module and whose layers are not ours to look into."""

    def __init__(self, model: HybridLM) -> None:
        self._model = SimpleNamespace(inner=model)
        self.num_blocks, self.initial_state = model.num_blocks, model.initial_state
        self.embed, self.run, self.head = model.embed, model.run, model.head
        self.kinds, self.vocab_size, self.device = model.kinds, model.vocab_size, model.device


def test_any_backbone_can_be_looked_at_and_what_needs_our_layers_says_so():
    model = lively(tiny(), dtype=torch.float32)
    known, opaque = (lmsleep.inspect(Session(m, SLEEP), X[0].tolist()) for m in (model, Opaque(model)))
    assert "readback need FastWeights layers" in opaque.notes[0] and not opaque.readback and known.readback
    without = ("forgotten", "written")
    for mine, its in zip(known.heads, opaque.heads, strict=True):
        assert all(its[name] is None for name in without)
        assert {k: v for k, v in mine.items() if k not in without} == {
            k: v for k, v in its.items() if k not in without
        }
    assert known.ablation == opaque.ablation and opaque.about["slow_weights_before"] is None
    assert set(figures(opaque)) == {"hypnogram", "heads", "ablation"}
    assert "cannot be hashed" in words.changes(opaque)[0]


def test_what_cannot_be_looked_at_is_refused():
    session = session_that_read(3)
    for text in (None, "", []):
        with pytest.raises(ValueError, match="text"):
            lmsleep.inspect(session, text)
    with pytest.raises(ValueError, match="never sleeps"):
        lmsleep.inspect(Session(session.model, SleepConfig()), [1, 2, 3])
    attention = Session(lively(tiny("attention"), dtype=torch.float32), SLEEP)
    with pytest.raises(ValueError, match="no block of this model has fast weights"):
        lmsleep.inspect(attention, [1, 2, 3])


def test_a_memory_that_is_empty_or_not_asked_is_said_to_be():
    for text, why in (("Then", "it is empty"), ("T", "no token predicts")):
        seen = lmsleep.inspect(session_that_read(0), text)
        assert why in seen.notes[0] and seen.ablation == [] == seen.reliance
        assert "heads" not in " ".join(words.reliability(seen))


def test_a_session_that_read_nothing_has_its_last_window_as_the_question():
    subject = from_session(session_that_read(0), "It sleeps on it.")
    assert subject.batch.context.shape == (1, 12) and subject.batch.tokens.shape == (1, 4)
    assert subject.windows.shape == (1, 16)


# Runs and the command


def untrained(path, task, sleep=SLEEP, blocks=("attention", "gated_delta_net"), **options) -> RunFolder:
    architecture = tiny(*blocks, vocab_size=task.vocab_size, **options)
    config = RunConfig(task=task, model=architecture, sleep=sleep, train=TrainConfig(steps=1))
    folder = RunFolder.create(path, config)
    folder.save_checkpoint(folder.checkpoint(1), HybridLM(architecture).save_pretrained, {})
    return folder


FORK = Depo(nodes=4, hops=2, names=5, name_lengths=(1, 1), node_distribution="fixed", ask="fork", queries=2)
BLOCK = Depo(nodes=6, hops=2, names=6, name_lengths=(1, 1), node_distribution="fixed", queries=2)
AUTOMATON = Rule110(width=6, states=2, t=2, asked=2)


@pytest.mark.parametrize("task", [FORK, BLOCK, AUTOMATON])
def test_a_run_is_looked_at_on_samples_of_its_task(task, tmp_path):
    seen = lmsleep.inspect(untrained(tmp_path / "run", task), samples=8)
    evicted = {FORK: 8, BLOCK: 12, AUTOMATON: 12}[task]
    assert seen.about["tokens"] == evicted and seen.about["sequences"] == 8 and seen.notes == []
    assert {(r["pass"], r["steps"]) for r in seen.probe} == {(n, j) for n in range(4) for j in range(3)}
    assert len(seen.ablation) == 1 + 2 * 3 and len(seen.reliance) == 4
    assert seen.reliance[0]["accuracy"] == seen.ablation[0]["accuracy"]
    assert set(figures(seen)) == {"hypnogram", "heads", "readback", "probe", "ablation"}


def test_the_accuracy_in_the_report_is_that_of_evaluation(tmp_path):
    run = untrained(tmp_path / "run", FORK)
    score = evaluate(run.model(), FORK, SLEEP, batches=1, batch_size=16)
    assert lmsleep.inspect(run, samples=16).ablation[0]["accuracy"] == score.accuracy


def test_a_run_without_a_probe_says_so_and_shows_the_rest(tmp_path):
    seen = lmsleep.inspect(untrained(tmp_path / "run", MQAR(pairs=6, keys=8, values=4, queries=2)), samples=4)
    assert "these do: depo, rule110" in seen.notes[0] and seen.probe == [] and seen.ablation


@pytest.mark.parametrize("method", OTHERS)
def test_a_run_of_another_method_says_what_its_sleep_did_and_what_is_not_seen(tmp_path, method):
    by, options = OTHERS[method]
    sleep = SleepConfig(window=SLEEP.window, consolidator=by)
    run = untrained(tmp_path / "run", FORK, sleep, blocks=("attention", "attention"), **options)
    seen = lmsleep.inspect(run, samples=4)
    assert seen.probe == [] == seen.readback and [f"this is {method}" in note for note in seen.notes] == [
        True
    ]
    reading = f"the sleep ({method}, N = 3) moved them on by"
    assert reading in words.changes(seen)[1] and f"written by {method} with N = 3" in words.layers(seen)[1]
    assert seen.reliance[0]["reading"] == f"evicted after {method}, N = 3"
    assert {r["pass"] for r in seen.heads} == {1, 2} and set(figures(seen)) == {
        "hypnogram",
        "heads",
        "ablation",
    }
    assert all(r["moved_awake"] == 0 < r["moved_asleep"] for r in seen.change)
    # Tokens are one "head", and are erased once.
    names = [(r["block"], r["head"], r["how"]) for r in seen.ablation]
    assert len({*names}) == len(names) and names[1] == (None, None, "zero")
    heads = {(r["block"], r["head"]) for r in seen.heads}
    assert f"Of {len(heads)} heads" in words.reliability(seen)[1] and "sleep of another kind" in page(seen)


def test_a_share_of_nothing_is_not_told():
    by, options = OTHERS["in-place"]
    model = lively(tiny("attention", "attention", **options), dtype=torch.float32)
    one, two = (lmsleep.inspect(Session(model, SleepConfig(window=L, consolidator=by)), X[0].tolist())
                for L in (20, 8))  # fmt: skip
    assert one.change[0]["cosine"] is None and "%" not in words.changes(one)[1]
    assert [r["cosine"] is None for r in two.change] == [True, False] and "cosine of" in words.changes(two)[1]


def test_a_looped_model_is_named_and_a_memory_that_slept_on_nothing_is_empty():
    model = lively(tiny(), dtype=torch.float32)
    session = SimpleNamespace(**vars(Session(model, SLEEP)), tokens=Session(model, SLEEP).tokens)
    session.sleep_config = replace(SLEEP, passes=2, wake_passes=2)  # a session itself wakes in one pass
    seen = lmsleep.inspect(session, X[0].tolist())
    assert "this is looped, W = 2: of each window there is what reading" in seen.notes[0]
    assert [r["reading"] for r in seen.reliance][:2] == [
        "evicted after looped, W = 2, N = 2", "evicted after reading, no sleep",
    ]  # fmt: skip
    by, options = OTHERS["memory-tokens"]
    tokens = lively(tiny("attention", "attention", **options), dtype=torch.float32)
    seen = lmsleep.inspect(Session(tokens, SleepConfig(window=6, consolidator=by)), [1, 2, 3])
    assert "it is empty" in seen.notes[1] and not seen.ablation


def test_runs_that_cannot_be_looked_at_are_refused(tmp_path):
    with pytest.raises(ValueError, match="window=None"):
        lmsleep.inspect(untrained(tmp_path / "a", FORK, SleepConfig()))
    with pytest.raises(ValueError, match="no block of this model has fast weights"):
        lmsleep.inspect(untrained(tmp_path / "b", FORK, blocks=("attention",)))
    with pytest.raises(ValueError, match="no window of its samples is slept on"):
        lmsleep.inspect(untrained(tmp_path / "c", BLOCK, SleepConfig(window=100, eviction="sliding")))
    ragged = GSMInfinite()
    with pytest.raises(ValueError, match="differ in length"):
        lmsleep.inspect(untrained(tmp_path / "f", ragged), samples=2)
    run = untrained(tmp_path / "d", FORK)
    with pytest.raises(ValueError, match="samples must be at least 1"):
        lmsleep.inspect(run, samples=0)
    with pytest.raises(ValueError, match="text is for a session"):
        lmsleep.inspect(run, "n1")


def command(capsys, *argv):
    return run_command(capsys, "inspect", *argv)


def test_the_command_answers_the_two_questions_and_writes_the_page(tmp_path, capsys):
    run = untrained(tmp_path / "run", FORK).path
    page = tmp_path / "page.html"
    code, out, err = command(capsys, run, "--samples", 8, "--html", page)
    assert (code, err) == (0, "") and page.exists()
    assert out.startswith("Three layers of memory\n  Working memory, keys and values of a window of ")
    assert "What does sleep change?\n  Not the slow weights" in out and "Can one rely on it?" in out
    assert "<h2>Three layers of memory</h2>" in page.read_text()
    code, out, _ = command(capsys, run, "--samples", 8, "--json")
    assert code == 0 and json.loads(out)["about"]["passes"] == 3


@pytest.mark.parametrize(
    ("eviction", "kept", "said"),
    [
        ("hard", 0, "none of which stay (hard)."),
        ("sliding", 3 * 2 * 16 * 8, "of which 768 stay (sliding: 3 tokens)."),
        # 2 heads of 2 keys: of 8 numbers in float64 with their values, two of float32 and an age of 4 bytes
        (Compact(keys=2), 2 * 2 * (2 * 8 * 8 + 3 * 4), "of which 560 stay (compact: 2 keys a head)."),
    ],
)
def test_the_layers_of_memory_are_counted(eviction, kept, said):
    # The embedding serves as head too, and stands in memory once.
    model = lively(tiny("attention", "gated_delta_net", conv_size=0, tie_embeddings=True))
    seen = lmsleep.inspect(Session(model, SleepConfig(window=4, passes=2, eviction=eviction)), [1, 2, 3] * 4)
    working, fast, slow = seen.layers
    assert working["kept_bytes"] == kept
    # A window of 4 tokens, each with keys and values of 16 numbers in float64, beside what was kept.
    assert working["bytes"] == 4 * 2 * 16 * 8 + kept
    assert (fast["bytes"], fast["blocks"], fast["method"]) == (2 * 8 * 8 * 8, [1], "passes")
    assert slow["bytes"] == sum(p.nbytes for p in model.parameters()) and not slow["adapter_bytes"]
    sentences = words.layers(seen)
    assert sentences[0].endswith(said)
    assert sentences[1] == "Fast weights, S of block 1, written by passes with N = 2: 1,024 bytes a sequence."


def test_the_command_reads_a_text_after_a_memory_file(tmp_path, capsys):
    run = untrained(tmp_path / "run", FORK).path
    code, out, _ = command(capsys, run, "--text", "n1 n2 n3 n4 n1 n5 n2 n1", "--json")
    fresh = json.loads(out)
    assert code == 0 and (fresh["about"]["tokens_before"], fresh["about"]["tokens"]) == (0, 8)
    main(["read", str(run), str(words_file(tmp_path)), "--memory", str(tmp_path / "m.mem"), "--sleep-at-end"])
    before = (tmp_path / "m.mem").read_bytes()
    capsys.readouterr()
    (tmp_path / "question.txt").write_text("HOP_2 n1 n3")
    code, out, _ = command(
        capsys, run, "--file", tmp_path / "question.txt", "--memory", tmp_path / "m.mem", "--json"
    )
    seen = json.loads(out)
    assert code == 0 and seen["about"]["tokens_before"] == 8 and seen["about"]["tokens"] == 3
    assert seen["ablation"][0]["nats"] != seen["ablation"][1]["nats"]
    assert (tmp_path / "m.mem").read_bytes() == before


def words_file(folder):
    (folder / "graph.txt").write_text("n1 n2 n2 n3 n3 n4 n4 n1")
    return folder / "graph.txt"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nowhere"], "there is no folder nowhere"),
        (["RUN", "--memory", "x.mem"], "--memory needs --text or --file"),
        (["RUN", "--passes", "2"], "a run has its own"),
        (["RUN", "--text", "n1", "--file", "x"], "exclude each other"),
        (["RUN", "--text", "elephant"], "not in the task's vocabulary"),
        (["RUN", "--file", "missing.txt"], "missing.txt"),
        (["RUN", "--text", "n1", "--memory", "missing.mem"], "missing.mem"),
        (["RUN", "--html", "no/such/folder/page.html"], "there is no folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv, says, tmp_path, capsys):
    run = untrained(tmp_path / "run", FORK).path
    code, out, err = command(capsys, *[run if a == "RUN" else a for a in argv])
    assert code == 2 and out == "" and says in err and err.count("\n") == 1
