import pytest
import torch
import transformers as t
from conftest import close, random_tokens, run_command
from hf_models import FOUR, HEADS, SMALL, TURNING, VOCAB, TurnsUnknown, family, turning
from test_compact import KeysAndValues as OfAttention

from lmsleep import Cache, Compact, Session, SleepConfig, adapt, sleep_forward
from lmsleep.hf import sleepify
from lmsleep.text.tokenizers import Bytes

L = 8


def compacting(keys=5, passes=1, **options):
    return SleepConfig(window=L, passes=passes, eviction=Compact(keys=keys, **options))


def text(*shape, seed=0):
    return 1 + random_tokens(*shape, seed=seed, vocab=VOCAB - 1)


def logits(model, x, sleep):
    with torch.no_grad():
        return sleep_forward(model, x, None, sleep).logits


class KeysAndValues(OfAttention):
    def keep_by(self, model, tokens, state, L):
        # Keys, values and ordinals stay; tails of convolutions and what is recalled go.
        kept = zip(model.layouts, state.cache.layers, strict=True)
        return Cache(
            tuple(tuple(y if x.kv and j < 3 else y[:, :0] for j, y in enumerate(c)) for x, c in kept)
        )


@pytest.fixture(scope="module")
def llama():
    return adapt(family("llama"), attention_alone=True)


@pytest.fixture(scope="module")
def hybrid():
    return adapt(family("qwen3_5"))


def test_in_a_hybrid_all_keys_are_those_that_an_eviction_of_nothing_leaves(hybrid):
    x = text(2, 3 * L + 3)
    kept, few, whole, none = (
        logits(hybrid, x, SleepConfig(window=L, passes=2, eviction=eviction))
        for eviction in (Compact(keys=99), Compact(keys=4), KeysAndValues(), "hard")
    )
    assert close(kept, whole, 1e-4)
    assert not close(few, none, 1e-2) and not close(few, whole, 1e-2)


def test_with_all_keys_attention_alone_reads_as_if_nothing_were_evicted(llama):
    x = text(2, 4 * L + 3)
    with torch.no_grad():
        assert close(logits(llama, x, compacting(99)), llama.model(x, use_cache=False).logits, 1e-4)


@pytest.mark.parametrize("kind", [kind for kind in TURNING if kind != "GptOss"])
def test_keys_are_turned_as_the_model_turns_them(kind):
    model, x = adapt(turning(kind), attention_alone=True), text(1, 4 * L)
    assert close(logits(model, x, compacting(99)), logits(model, x, SleepConfig()), 1e-4)


def test_one_token_at_a_time_sees_what_was_kept(llama):
    x = text(3 * L + 3)
    session = Session(llama, compacting(5))
    whole = session.logits(x)
    for i in range(len(x)):
        assert close(session.logits(x[i : i + 1])[0], whole[i], 1e-4)
        session.read(x[i : i + 1])


def test_rows_of_any_length_compact_as_each_does_alone(hybrid):
    sleep = compacting(4, passes=2)
    x, lengths = text(3, 3 * L), torch.tensor([3 * L, 3, 2 * L + 2])
    with torch.no_grad():
        together = sleep_forward(hybrid, x, None, sleep, lengths=lengths).logits
    for row, n in enumerate(lengths.tolist()):
        assert close(together[row, :n], logits(hybrid, x[row : row + 1, :n], sleep)[0], 1e-4)


def test_a_session_is_saved_and_loaded_with_what_it_kept(llama, tmp_path):
    session = Session(llama, compacting(5))
    session.read(text(2 * L + 3))
    session.save(tmp_path / "a.mem")
    loaded = Session.load(tmp_path / "a.mem", llama)
    assert torch.equal(loaded.logits(text(L, seed=1)), session.logits(text(L, seed=1)))
    assert loaded.stats.working_bytes == session.stats.working_bytes
    assert session.memory.nbytes == 0


def test_a_model_with_attention_alone_sleeps_by_itself_if_it_keeps_something():
    model = family("llama")
    with pytest.raises(ValueError, match="llama cannot sleep: no block has fast weights"):
        sleepify(model, SleepConfig(window=L))
    x, sleep = text(1, 2 * L + 2), compacting(5)
    session = Session(adapt(model, attention_alone=True), sleep)
    sleepify(model, sleep)
    said = model.generate(x, max_new_tokens=L, do_sample=False)[0, x.shape[1] :]
    session.read(x[0, :-1])
    assert list(session.generate(x[0, -1:], max_new_tokens=L)) == said.tolist()


def test_half_precision_keeps_keys_in_its_own_dtype():
    model = adapt(family("llama").bfloat16(), attention_alone=True)
    with torch.no_grad():
        out = sleep_forward(model, text(1, 6 * L), None, compacting(5, reach=2 * L))
    assert {x.dtype for kept in out.state.cache.kept for x in kept[:2]} == {torch.bfloat16}
    assert bool(out.logits.isfinite().all())


def test_what_it_cannot_serve_is_refused_in_one_line():
    strange, eager = family("llama"), family("llama")
    strange.model.rotary_emb = TurnsUnknown(strange.model.rotary_emb)
    eager.set_attn_implementation("eager")
    for model, said in (
        (family("qwen3"), "qwen3: block 2 forgets by a sliding window of its own"),
        (family("kimi_linear"), r"kimi_linear: block 1 attends to other keys .* \(latent attention\)"),
        (strange, "llama: block 0 rotates its keys neither by halves nor in pairs"),
        (eager, "llama has attn_implementation='eager'"),
    ):
        with pytest.raises(ValueError, match=f"^eviction=Compact: {said}"):
            Session(adapt(model, attention_alone=True), compacting())


def test_probe_takes_a_model_with_attention_alone_where_it_compacts(tmp_path, capsys):
    config = t.LlamaConfig(**{**SMALL, "vocab_size": Bytes().vocab_size}, **HEADS, **FOUR)
    t.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    (tmp_path / "text.txt").write_text("A text goes on and on, and on it goes. " * 20)
    given = (
        "probe", tmp_path / "llama", "--text", tmp_path / "text.txt", "--tokenizer", "bytes", "--window", 150,
        "--windows", 2, "--samples", 1,
    )  # fmt: skip
    code, _, err = run_command(capsys, *given)
    assert code == 2 and err.count("\n") == 1 and "its blocks have attention alone" in err
    assert "--eviction compact" in err
    code, out, err = run_command(capsys, *given, "--compact", 10)
    assert code == 0, err
    assert out.splitlines()[3].startswith("attention 1/10")
    # Sessions do too, and a file that says so need not be told again.
    llama, text, memory = tmp_path / "llama", tmp_path / "text.txt", tmp_path / "a.mem"
    argv = ["read", llama, text, "--memory", memory, "--tokenizer", "bytes", "--window", 150]
    code, _, err = run_command(capsys, *argv)
    assert code == 2 and "its blocks have attention alone" in err and not memory.exists()
    code, _, err = run_command(capsys, *argv, "--eviction", "compact,keys=9")
    assert code == 0, err
    code, _, err = run_command(capsys, "ask", llama, "A text", "--memory", memory, "--tokenizer", "bytes")
    assert code == 0, err
    _, out, _ = run_command(capsys, "memory", "show", memory)
    assert "9 keys a head" in out and "N = 1" in out  # further passes would write nothing
