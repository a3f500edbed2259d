import json
from dataclasses import dataclass, replace

import pytest
import torch
from benchmarks import __main__ as benchmarks
from conftest import close, lively, random_tokens, run_command, same_memory, tiny

from lmsleep import (
    Cache,
    Compact,
    Eviction,
    GradientSteps,
    HybridLM,
    Memory,
    Session,
    SessionBatch,
    SleepConfig,
    State,
    inspect,
    sleep_forward,
)
from lmsleep.ops.matching import METHODS, few
from lmsleep.session import saving
from lmsleep.sleep import EVICTIONS, evict

L = 6
HEADS = {"d_model": 32, "num_heads": 4, "num_kv_heads": 2}
HYBRID = ("gated_delta_net", "attention", "gated_linear", "attention")


@pytest.fixture(scope="module")
def attentive():
    return lively(tiny("attention", "attention", **HEADS))


@pytest.fixture(scope="module")
def hybrid():
    return lively(tiny(*HYBRID, **HEADS))


def compacting(keys=5, passes=1, window=L, **options):
    return SleepConfig(window=window, passes=passes, eviction=Compact(keys=keys, **options))


def read(model, x, sleep, **options):
    with torch.no_grad():
        return sleep_forward(model, x, None, sleep, **options)


@dataclass(frozen=True)
class KeysAndValues(Eviction):
    # The whole cache of attention, and nothing of convolutions: what compaction leaves out of nothing.
    def keep(self, cache, L):
        return cache

    def keep_by(self, model, tokens, state, L):
        kept = zip(model.kinds, state.cache.layers, strict=True)
        return Cache(tuple(c if kind == "attention" else tuple(t[:, :0] for t in c) for kind, c in kept))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"rope_theta": None}, {"qk_norm": True}, {"num_kv_heads": 4}])
def test_all_keys_are_the_whole_cache_however_many_windows(method, options):
    model, x = lively(tiny("attention", "attention", **{**HEADS, **options})), random_tokens(2, 5 * L + 2)
    with torch.no_grad():
        assert close(read(model, x, compacting(99, method=method)).logits, model(x))


@pytest.mark.parametrize("passes", [1, 3])
def test_in_a_hybrid_all_keys_are_those_that_an_eviction_of_nothing_leaves(hybrid, passes):
    x, whole = random_tokens(2, 3 * L + 2), SleepConfig(window=L, passes=passes, eviction=KeysAndValues())
    out, expected = read(hybrid, x, compacting(99, passes)), read(hybrid, x, whole)
    assert close(out.logits, expected.logits) and same_memory(out.memory, expected.memory)


@pytest.mark.parametrize("method", METHODS)
def test_keys_that_are_all_the_same_leave_a_fit_nothing_to_choose(method):
    # One token, and no positions: the least squares are of rank one. Any key does what all of them do.
    model, x = lively(tiny("attention", rope_theta=None, **HEADS)), torch.ones(1, 3 * L, dtype=torch.int64)
    with torch.no_grad():
        assert close(read(model, x, compacting(2, method=method)).logits, model(x))


def turned(x, position, theta=10_000.0):
    # Rotary positions as complex numbers: the first half of a head is real, the second imaginary.
    D = x.shape[-1]
    angle = position[..., None] * theta ** (-torch.arange(0, D, 2).double() / D)
    z = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], dim=-1)


def test_a_window_and_the_next_one_by_hand():
    # One block of attention alone: its keys and values depend on tokens alone, so all can be written out.
    model, t = lively(tiny("attention", mlp_dim=0, d_model=16, num_heads=4, num_kv_heads=2)), 3
    block = model.blocks[0]
    x = random_tokens(1, 2 * L)[0]
    with torch.no_grad():
        h = block.norm(model.embedding(x))
        q, k, v = (
            (h @ p.weight.T).view(2 * L, -1, 4)
            for p in (block.mixer.q_proj, block.mixer.k_proj, block.mixer.v_proj)
        )
        out = []
        for head in range(4):
            old, shared = head // 2, [head // 2 * 2, head // 2 * 2 + 1]
            stands = torch.arange(L).double()
            # The window is read again behind itself: its tokens are where those of the next window will be.
            again = torch.cat([turned(q[:L, i], L + stands) for i in shared]) / 2
            keys = turned(k[:L, old], stands)
            found = few(again[None], keys[None], v[None, :L, old], torch.zeros(1, L).double(), t)
            kept, bias, values = keys[found.chosen[0]], found.bias[0], found.values[0]
            mine, near = turned(q[L:, head], L + stands) / 2, turned(k[L:, old], L + stands)
            seen = torch.ones(L, L).tril().log()
            scores = torch.cat([mine @ kept.T + bias.float(), mine @ near.T + seen], dim=1)
            out.append(scores.softmax(-1) @ torch.cat([values, v[L:, old]]))
        said = model.head(model.embedding(x[L:]) + torch.cat(out, dim=1) @ block.mixer.o_proj.weight.T)
        assert close(read(model, x[None], compacting(t)).logits[0, L:], said, 1e-6)


def test_fewer_keys_say_less_and_any_say_more_than_none(attentive):
    x = random_tokens(8, 4 * L)
    with torch.no_grad():
        whole = attentive(x)

    def error(sleep):
        return float((read(attentive, x, sleep).logits - whole)[:, L:].norm() / whole[:, L:].norm())

    errors = [error(compacting(keys)) for keys in (99, 16, 8, 4)]
    assert errors == sorted(errors) and errors[-1] < error(SleepConfig(window=L))


def test_sessions_compact_at_their_own_places_however_they_read(hybrid):
    texts, sleep = (
        [random_tokens(n, seed=n) for n in (3 * L + 1, 2 * L, 5, 4 * L + 3)],
        compacting(4, passes=2),
    )
    together = [Session(hybrid, sleep) for _ in texts]
    batch = SessionBatch(together)
    batch.read([text[:5] for text in texts])
    together[1].sleep()  # early: it keeps keys while others keep none
    said = batch.read_with_logits([text[5:] for text in texts])
    for i, text in enumerate(texts):
        alone = Session(hybrid, sleep)
        alone.read(text[:5])
        if i == 1:
            alone.sleep()
        for j in range(5, len(text)):
            assert close(said[i][j - 5 : j - 4], alone.logits(text[j : j + 1]), 1e-9)
            alone.read(text[j : j + 1])
        assert same_memory(together[i].memory, alone.memory, 1e-9)


def test_a_session_is_forked_taken_back_saved_and_loaded_with_what_it_kept(hybrid, tmp_path):
    session, sleep = Session(hybrid, compacting(4, passes=2)), compacting(4, passes=2)
    session.read(random_tokens(3 * L + 2))
    before, more = session.fork(), random_tokens(2 * L, seed=1)
    session.save(tmp_path / "a.mem")
    loaded = Session.load(tmp_path / "a.mem", hybrid)
    assert loaded.sleep_config == sleep
    said = session.logits(more)
    assert torch.equal(loaded.logits(more), said) and torch.equal(before.logits(more), said)
    session.read(more)
    session.rewind()
    assert torch.equal(session.logits(more), said)
    empty = Session(hybrid, sleep)
    empty.read(more[:L])
    empty.sleep()  # its window is empty: all that it holds is what it kept
    empty.save(tmp_path / "b.mem")
    assert torch.equal(Session.load(tmp_path / "b.mem", hybrid).logits(more), empty.logits(more))


def test_keys_that_were_kept_are_refused_by_a_sleep_that_keeps_none(hybrid, tmp_path):
    session = Session(hybrid, compacting(4))
    session.read(random_tokens(2 * L))
    session.sleep()
    origin = session._signed(session.origin, session.stream)
    saving.write(tmp_path / "a.mem", session.stream, origin, SleepConfig(window=L), None)
    with pytest.raises(ValueError, match="keys that eviction=Compact kept, and its sleep evicts by Hard"):
        Session.load(tmp_path / "a.mem", hybrid)
    # A memory alone has no keys, and goes on under any eviction.
    session.memory.save(tmp_path / "b.mem", hybrid)
    assert Session.load(tmp_path / "b.mem", hybrid, sleep=SleepConfig(window=L)).working.kept == ()


def test_a_damaged_file_is_refused(hybrid, tmp_path):
    session = Session(hybrid, compacting(4))
    session.read(random_tokens(L))
    session.sleep()
    start, origin = session.stream.start, session._signed(session.origin, session.stream)
    keys, *others = start.cache.kept[1]
    for bad, said in ((keys[..., :-1], "kept.1.0 has shape"), (keys[:, 1:], "does not fit together")):
        kept = (start.cache.kept[0], (bad, *others), *start.cache.kept[2:])
        stream = replace(session.stream, start=State(start.memory, replace(start.cache, kept=kept)))
        saving.write(tmp_path / "a.mem", stream, origin, compacting(4), None)
        with pytest.raises(ValueError, match=said):
            Session.load(tmp_path / "a.mem", hybrid)


def test_keys_stand_no_further_back_than_they_reach(attentive):
    # After one window nothing reaches its limit; later, old keys stand where those at the limit stand.
    x = random_tokens(1, 6 * L)
    near, far = (read(attentive, x, compacting(99, reach=reach)) for reach in (2 * L, 99))
    assert close(near.logits[:, : 3 * L], far.logits[:, : 3 * L])
    assert not close(near.logits[:, 3 * L :], far.logits[:, 3 * L :], 1e-3)
    for out, reach in ((near, 2 * L), (far, 5 * L)):
        ages = out.state.cache.kept[0][3][0, :, 0].tolist()
        assert ages == [min(age, reach) for age in range(5 * L, 0, -1)]


def test_bytes_are_as_many_keys_as_fit(hybrid):
    each = 2 * 2 * ((8 + 8) * 8 + 12)  # two blocks of two heads: key and value in float64, bias, age, worth
    x, S = random_tokens(1, 3 * L), hybrid.initial_state(1).memory.nbytes
    for given in (each, 3 * each - 1, S):
        out = read(hybrid, x, compacting(None, bytes=given), evict_last=True)
        assert out.state.cache.nbytes == min(given // each, 3 * L) * each
    with pytest.raises(ValueError, match=f"bytes={each - 1} keeps no key: one key a head takes {each} bytes"):
        Session(hybrid, compacting(None, bytes=each - 1))


def test_it_goes_along_with_any_sleep_and_with_training():
    x, mask = random_tokens(2, 3 * L), torch.ones(2, 3 * L, dtype=torch.bool)
    trained = lively(tiny("attention", "attention", trained_mlp=True, **HEADS))
    sleep = SleepConfig(window=L, consolidator=GradientSteps(3), eviction=Compact(keys=4))
    for model, how in ((trained, sleep), (lively(tiny(*HYBRID, **HEADS)), compacting(4, passes=2))):
        out = sleep_forward(model, x, mask, how)
        out.loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        assert not any(t.requires_grad for kept in out.state.cache.kept for t in kept)
        once = sleep_forward(model, x, mask, how.with_passes(1))
        assert not same_memory(out.memory, once.memory, 1e-3)


def test_the_microscope_looks_at_a_sleep_that_compacts(hybrid):
    seen = inspect(Session(hybrid, compacting(4, passes=2)), random_tokens(3 * L))
    assert seen.about["eviction"] == "compact" and seen.reliance


class Bare:
    """A backbone that reads no kept keys."""

    num_blocks, kinds, vocab_size, device = 1, ("attention",), 11, torch.device("cpu")

    def initial_state(self, batch_size):
        return State(Memory((None,)), Cache(((torch.zeros(batch_size, 0, 1),),)))


def test_what_it_cannot_serve_is_refused_in_one_line():
    without = lively(tiny("gated_delta_net", "gated_linear"))
    for model, said in (
        (without, "the model has no attention, .*; choose hard$"),
        (Bare(), "Bare cannot read keys that were kept; choose hard or sliding"),
    ):
        with pytest.raises(ValueError, match=said):
            Session(model, compacting())
        with pytest.raises(ValueError, match=said):
            sleep_forward(model, random_tokens(1, 2 * L), None, compacting())
    with pytest.raises(ValueError, match="reach=0 of Compact must be at least 1"):
        Compact(reach=0)
    for name in ("keys", "bytes"):
        with pytest.raises(ValueError, match=f"{name}=0 of Compact keeps nothing"):
            Compact(**{name: 0})
    with pytest.raises(ValueError, match="keys=4 and bytes=4096 of Compact say the same in two ways"):
        Compact(keys=4, bytes=4096)
    with pytest.raises(ValueError, match="method"):
        Compact(method="best")
    with pytest.raises(ValueError, match="with the model"):
        Compact().keep(Cache(()), L)


def test_it_is_named_in_configurations():
    assert EVICTIONS["compact"] is Compact and SleepConfig(eviction="compact").eviction == Compact()
    assert Compact() == Compact(keys=64)
    sleep = compacting(None, method="norm", bytes=4096, reach=100)
    assert SleepConfig.from_dict(json.loads(json.dumps(sleep.to_dict()))) == sleep


def test_an_eviction_drops_what_another_kept(attentive):
    x = random_tokens(1, 2 * L)
    state = read(attentive, x, compacting(4)).state
    for name in ("hard", "sliding"):
        eviction = SleepConfig(eviction=name).eviction
        assert evict(eviction, attentive, x[:, L:], state, L).cache.kept == ()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    lively(tiny("attention", "attention", vocab_size=256), dtype=torch.float32).save_pretrained(
        folder / "model"
    )
    (folder / "text.txt").write_text("A text goes on and on, and on it goes. " * 20)
    return folder


def test_probe_reads_compacted(folder, capsys):
    given = (
        "probe",
        folder / "model",
        "--text",
        folder / "text.txt",
        "--window",
        150,
        "--windows",
        2,
        "--samples",
        1,
    )
    options = ("--compact", 4, 10, "--method", "attention", "norm", "--json")
    code, out, err = run_command(capsys, *given, *options)
    assert code == 0, err
    found = {r["reading"]: r["perplexity"] for r in json.loads(out)["readings"]}
    names = [f"{method} 1/{times}" for method in ("attention", "norm") for times in (4, 10)]
    assert list(found) == ["nothing is evicted", "memory is dropped too", *names]  # no N: nothing to write to
    assert len(set(found.values())) == len(found)
    for bad in (1, 0, 301):
        code, _, err = run_command(capsys, *given, "--compact", bad)
        assert code == 2 and err.count("\n") == 1 and f"--compact {bad} must be more than 1" in err
    code, _, err = run_command(capsys, *given, "--method", "norm")
    assert code == 2 and err.count("\n") == 1 and "--method norm goes with --compact" in err
    code, _, err = run_command(capsys, *given, "--compact", 2, "--method", "best")
    assert code == 2 and err.count("\n") == 1 and "best" in err


def test_the_benchmark_reads_with_every_method(capsys):
    benchmarks.main(["compaction", "--tiny", "--repeats", "2", "--json"])
    found = json.loads(capsys.readouterr().out)["attention-alone"]
    assert [[*row] for row in found["rows"]] == [["keys kept", *METHODS]] and "8 planted" in found["note"]
    assert all(0 < float(cell.split()[0]) < 1000 for cell in [*found["rows"][0].values()][1:])


def test_a_saved_hybrid_is_probed_with_passes_and_compacted(tmp_path, folder, capsys):
    HybridLM(tiny("attention", "gated_delta_net", vocab_size=256)).save_pretrained(tmp_path / "hybrid")
    code, out, err = run_command(
        capsys, "probe", tmp_path / "hybrid", "--text", folder / "text.txt", "--window", 150, "--windows", 2,
        "--samples", 1, "--passes", 1, 2, "--compact", 10,
    )  # fmt: skip
    assert code == 0, err
    ways = [line[:22].strip() for line in out.splitlines()[3:7]]
    assert ways == ["N = 1", "N = 2", "N = 1, attention 1/10", "N = 2, attention 1/10"]
