import subprocess
import sys

import pytest
import torch
from conftest import close, random_tokens, same_memory
from hf_models import FAMILIES, TURNING, VOCAB, WINDOWED, TurnsUnknown, family, turning, windowed
from transformers import MambaConfig, MambaForCausalLM

from lmsleep import Cache, Memory, Session, SessionBatch, SleepConfig, State, adapt, sleep_forward
from lmsleep.hf import positions, trial
from lmsleep.sleep import evict

EACH = pytest.mark.parametrize("name", FAMILIES)
EVICTIONS = pytest.mark.parametrize("eviction", ["hard", "sliding"])
L = 5


class _Doubled:
    """torch, for a modelling file that casts to float32 here and there: to float64 instead."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def doubled(monkeypatch):
    # The families in float64 throughout, so that errors of rounding do not hide others.
    def model(name, seed=0):
        made = family(name, seed).double()
        made.set_experts_implementation("eager")  # grouped matrix products have no float64
        files = {c.__module__ for c in type(made).__mro__ if ".modeling_" in c.__module__}
        for file in {type(made).__module__, *files} - {"transformers.modeling_utils"}:
            monkeypatch.setattr(sys.modules[file], "torch", _Doubled())
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        return made

    return model


def text(*shape, seed=0):
    return 1 + random_tokens(
        *shape, seed=seed, vocab=VOCAB - 1
    )  # 0 is padding, whose embedding learns nothing


def sleeping(**options):
    return SleepConfig(**{"window": L, "passes": 3, **options})


@EACH
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_one_pass_over_a_window_that_holds_all_is_bit_equal_to_the_model(name, attention):
    model, x = family(name), text(2, 24)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for passes in (1, 4):  # the window is never evicted, so nobody sleeps
            out = sleep_forward(adapt(model), x, None, SleepConfig(window=24, passes=passes))
            assert torch.equal(out.logits, model(x, use_cache=False).logits)


def token_by_token(model, x, config):
    # Every pass reads its window one token at a time, from the working memory that the window began with.
    first, last = config.consolidator.loop_range(model.num_blocks)
    D, state, logits = model.num_blocks, model.initial_state(len(x)), []

    def steps(h, state, start, stop):
        out = []
        for t in range(h.shape[1]):
            y, state = model.run(
                h[:, t : t + 1], state, start, stop, span=config.eviction.span(config.window)
            )
            out.append(y)
        return torch.cat(out, dim=1), state

    windows = x.split(L, dim=1)
    for i, window in enumerate(windows):
        before = state.cache
        h, state = steps(model.embed(window), state, 0, first)
        for n in range(1, 1 + (config.passes if i < len(windows) - 1 else 1)):
            layers = state.cache.layers
            looped = Cache(layers[:first] + before.layers[first:last] + layers[last:])
            h, state = steps(h, State(state.memory, looped), first, last)
            if n == 1:
                seen, awake = steps(h, state, last, D)
                logits.append(model.head(seen))
        state = steps(h, state, last, D)[1] if n > 1 else awake
        if i < len(windows) - 1:
            state = evict(config.eviction, model, window, state, config.window)
    return torch.cat(logits, dim=1), state


@EACH
@EVICTIONS
@pytest.mark.parametrize(("passes", "loop"), [(4, None), (2, "middle")])
def test_windows_equal_one_token_at_a_time(doubled, name, eviction, passes, loop):
    model, config = adapt(doubled(name)), sleeping(passes=passes, eviction=eviction, loop=loop)
    x = text(2, 2 * L + 3)
    with torch.no_grad():
        logits, state = token_by_token(model, x, config)
        out = sleep_forward(model, x, None, config)
    assert close(out.logits, logits, 1e-9)
    assert same_memory(out.memory, state.memory, 1e-9)


@EACH
def test_a_window_goes_on_after_one_token_or_many(doubled, name):
    model, x = adapt(doubled(name)), text(2, 9)
    with torch.no_grad():
        whole, ends = model.run(model.embed(x), model.initial_state(2), 0, model.num_blocks)
        for parts in ((1, 0, 8), (1, 2, 6), (5, 1, 3), (2, 1, 1, 5), (8, 1)):
            state, found = model.initial_state(2), []
            for part in x.split(parts, dim=1):
                h, state = model.run(model.embed(part), state, 0, model.num_blocks)
                found.append(h)
            assert close(torch.cat(found, dim=1), whole, 1e-9)
            assert same_memory(state.memory, ends.memory, 1e-9)


@EACH
def test_passes_and_memory_matter(doubled, name):
    # Else the comparisons above would hold for a model that ignores S.
    model, x = adapt(doubled(name)), text(2, 3 * L)
    with torch.no_grad():
        found = [sleep_forward(model, x, None, sleeping(passes=N)) for N in (1, 2, 4)]
    for a, b in ((0, 1), (1, 2)):
        assert not close(found[a].logits[:, -L:], found[b].logits[:, -L:], 1e-3)
        assert torch.equal(found[a].logits[:, :L], found[b].logits[:, :L])


@EACH
def test_gradients_match_finite_differences(doubled, name):
    # Three windows, two of them slept on in three passes, the last of them of one token.
    model, x, step = adapt(doubled(name)), text(2, 2 * L + 1), 1e-6
    mask = torch.zeros_like(x, dtype=torch.bool)
    mask[:, -2:] = True
    config = sleeping()

    def loss():
        return sleep_forward(model, x, mask, config, read_last=False, checkpoint=True).loss

    named = [(n, p) for n, p in model.named_parameters() if p.dtype == torch.float64]
    gradients = torch.autograd.grad(loss(), [p for _, p in named], allow_unused=True)
    rng = torch.Generator().manual_seed(1)
    directions = [torch.randn(p.shape, generator=rng, dtype=p.dtype) * p.abs().mean() for _, p in named]
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None)
    with torch.no_grad():

        def moved(by):
            for (_, p), d in zip(named, directions, strict=True):
                p.add_(by * d)
            value = loss()
            for (_, p), d in zip(named, directions, strict=True):
                p.sub_(by * d)
            return value

        difference = (moved(step) - moved(-step)) / (2 * step)
    assert abs(difference - slope) <= 1e-5 * abs(slope)
    touched = {n for (n, _), g in zip(named, gradients, strict=True) if g is not None and g.abs().max() > 0}
    assert any("A_log" in n for n in touched) and any("q_proj" in n for n in touched)


@EACH
def test_one_token_after_others_has_a_gradient(doubled, name):
    # One-token kernels of transformers overwrite S, which would break the backward pass.
    model, x = adapt(doubled(name)), text(1, 4)
    _, state = model.run(model.embed(x[:, :3]), model.initial_state(1), 0, model.num_blocks)
    h, after = model.run(model.embed(x[:, 3:]), state, 0, model.num_blocks)
    weights = [p for n, p in model.named_parameters() if n.endswith("A_log")]
    found = torch.autograd.grad(
        model.head(h).square().sum() + sum(s.square().sum() for s in after.memory.layers if s is not None),
        weights,
    )
    whole, ends = model.run(model.embed(x), model.initial_state(1), 0, model.num_blocks)
    wanted = torch.autograd.grad(
        model.head(whole)[:, 3:].square().sum()
        + sum(s.square().sum() for s in ends.memory.layers if s is not None),
        weights,
    )
    assert all(close(a, b, 1e-8) for a, b in zip(found, wanted, strict=True))


@EACH
@EVICTIONS
def test_rows_of_other_lengths_and_padding_change_nothing(doubled, name, eviction):
    model, config, lengths = adapt(doubled(name)), sleeping(eviction=eviction), [13, 6, 0, 4]
    x, questions = text(4, 13), text(4, 3, seed=1)
    with torch.no_grad():
        padded = sleep_forward(model, x, None, config, lengths=torch.tensor(lengths), evict_last=True)
        after = sleep_forward(model, questions, None, config, state=padded.state)
        for row, length in enumerate(lengths):
            own = sleep_forward(model, x[[row], :length], None, config, evict_last=True)
            alone = sleep_forward(model, questions[[row]], None, config, state=own.state)
            assert length == 0 or close(padded.logits[[row], :length], own.logits, 1e-9)
            assert close(after.logits[[row]], alone.logits, 1e-9)
            assert same_memory(after.memory[[row]], alone.memory, 1e-9)


@EACH
@EVICTIONS
def test_sessions_at_different_places_of_their_windows_are_those_alone(doubled, name, eviction):
    model, config = adapt(doubled(name)), sleeping(eviction=eviction)
    parts = [[text(3 + 4 * i).tolist() for i in range(3)], [text(2).tolist(), [], text(9).tolist()]]
    together = [Session(model, config) for _ in range(3)]
    batch = SessionBatch(together)
    for part in parts:
        batch.read(part)
    for i, session in enumerate(together):
        alone = Session(model, config)
        for part in parts:
            alone.read(part[i])
        assert session.stats.sleeps == alone.stats.sleeps
        assert close(session.logits([1, 2]), alone.logits([1, 2]), 1e-9)


@EACH
def test_a_session_goes_on_after_a_window_of_one_token(name):
    model, x = adapt(family(name)), text(9).tolist()
    for first in (1, L + 1):  # the only token of a stream, or of a window after a sleep
        session, config = Session(model, sleeping()), sleeping()
        session.read(x[:first])
        wanted = Session(model, config).logits(x[: first + 2]).log_softmax(-1)
        score = sum(float(wanted[t - 1, x[t]]) for t in (first, first + 1))
        assert abs(session.score(x[first : first + 2]) - score) < 1e-3
        assert session.fork().generate((), 3) == Session(model, config).generate(x[:first], 3)


def test_what_a_session_has_read_token_by_token_serves_training():
    # One token without gradients is computed in inference mode, whose tensors autograd does not take.
    model, x = adapt(family("qwen3_5")), text(1, 12)
    session = Session(model, SleepConfig(window=16, passes=2))
    for token in x[0]:
        session.read(token[None])
    state = session.stream.state
    assert not any(t.is_inference() for t in state.tensors())
    sleep_forward(model, x, torch.ones_like(x, dtype=torch.bool), sleeping(), state=state).loss.backward()
    with torch.no_grad():
        h, after = model.run(model.embed(x[:, :1]), state, 0, model.num_blocks)
    assert not h.is_inference() and not any(t.is_inference() for t in after.tensors())


def test_greedy_answers_are_those_of_generate():
    for name in ("qwen3_5", "bamba"):
        model, x = family(name), text(1, 7)
        wanted = model.generate(
            x,
            attention_mask=torch.ones_like(x),
            max_new_tokens=9,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )[0, 7:]
        session = Session(adapt(model), SleepConfig(window=64, passes=4))
        assert session.generate(x[0], 9) == wanted.tolist()


def test_a_memory_goes_to_a_file_and_back(tmp_path):
    model = adapt(family("olmo_hybrid"))
    session = Session(model, sleeping())
    session.read(text(12)[:])
    session.sleep()
    session.memory.save(tmp_path / "a.mem")
    again = Session(adapt(family("olmo_hybrid")), sleeping(), memory=Memory.load(tmp_path / "a.mem", model))
    assert torch.equal(session.logits([3, 4]), again.logits([3, 4]))
    with pytest.raises(ValueError, match="another model"):
        Memory.load(tmp_path / "a.mem", adapt(family("olmo_hybrid", seed=1)))


@EVICTIONS
@pytest.mark.parametrize("scaling", [1.0, 1.3])  # YaRN scales rotated keys and queries
def test_positions_may_start_again_on_a_long_stream(doubled, monkeypatch, eviction, scaling):
    rotated, x = doubled("qwen3_5"), text(2, 6 * L)
    monkeypatch.setattr(rotated.model.rotary_emb, "attention_scaling", scaling)
    model = adapt(rotated)
    with torch.no_grad():
        wanted = sleep_forward(model, x, None, sleeping(eviction=eviction)).logits
        monkeypatch.setattr(positions, "REBASE_AFTER", 2)
        found = sleep_forward(model, x, None, sleeping(eviction=eviction))
    assert close(found.logits, wanted, 1e-9)
    if eviction == "sliding":
        assert found.state.cache.layers[1][2].max() < 3 * L


@pytest.mark.parametrize("kind", [*TURNING, "unknown"])
def test_keys_that_stay_are_turned_as_the_model_turned_them(kind, monkeypatch):
    model, x = turning("Llama" if kind == "unknown" else kind), text(2, 6 * L)
    if kind == "unknown":  # such keys stay where they are
        model.model.rotary_emb = TurnsUnknown(model.model.rotary_emb)
    backbone, sleep = adapt(model, attention_alone=True), SleepConfig(window=L, eviction="sliding")
    with torch.no_grad():
        wanted = sleep_forward(backbone, x, None, sleep).logits
        monkeypatch.setattr(positions, "REBASE_AFTER", 2)
        found = sleep_forward(backbone, x, None, sleep)
    assert close(found.logits, wanted, 1e-5)
    ends = found.state.cache.layers[0][2].max()
    assert ends == 6 * L if kind == "unknown" else ends < 3 * L


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "way"), TURNING.items())
def test_a_trial_sees_how_keys_turn_though_a_few_numbers_are_large_and_hardly_do(kind, way, dtype):
    model = turning(kind)
    with torch.no_grad():
        for block in model.model.layers:
            wide = block.self_attn.k_proj
            wide.bias = torch.nn.Parameter(torch.zeros(wide.out_features))
            wide.bias.view(2, -1)[:, -1] = 300.0
    assert tuple(x.turns for x in adapt(model.to(dtype), attention_alone=True).layouts) == way


@pytest.mark.parametrize(
    ("make", "name"),
    [(family, n) for n in FAMILIES] + [(turning, n) for n in TURNING] + [(windowed, n) for n in WINDOWED],
)
def test_a_block_like_an_earlier_one_has_the_layout_that_a_run_of_its_own_shows(make, name, monkeypatch):
    model = make(name)
    tried = adapt(model, attention_alone=True).layouts
    monkeypatch.setattr(trial, "_alike", lambda model: [*range(len(model.get_decoder().layers))])
    assert adapt(model, attention_alone=True).layouts == tried


def test_fast_weights_that_are_numbered_apart_from_blocks_are_found():
    model, wanted = family("qwen3_5"), adapt(family("qwen3_5")).layouts
    writers = [i for i, x in enumerate(wanted) if x.memory is not None]
    for number, i in enumerate(writers):
        model.model.layers[i].linear_attn.layer_idx = number
    assert [x.writer for x in adapt(model).layouts if x.memory is not None] == [*range(len(writers))]


def test_the_model_is_left_as_it_was():
    model, x = family("falcon_h1").train(), text(1, 9)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    backbone = adapt(model)
    assert model.training and backbone.training
    sleep_forward(backbone, x, None, sleeping())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert backbone.kinds == ("attention+fast_weights",) * 4


@pytest.mark.parametrize("kind", WINDOWED)
def test_windows_of_the_models_own_are_heeded(kind):
    model, x = windowed(kind), text(2, 14)
    for attention in {model.config._attn_implementation, "eager"}:
        model.set_attn_implementation(attention)
        with torch.no_grad():
            backbone, wanted = adapt(model), model(x, use_cache=False).logits
            assert model.config.sliding_window == 5 and any(layout.slides for layout in backbone.layouts)
            out = sleep_forward(backbone, x, None, SleepConfig())
            assert torch.equal(out.logits, wanted)
            session = Session(backbone, SleepConfig(window=14))  # longer than its own
            assert close(session.logits(x[0]), wanted[0], 1e-4)
    # Longer than the trial: how it will be heeded is known all the same.
    model.config.sliding_window = 4096
    assert adapt(model).layouts == backbone.layouts and model.config.sliding_window == 4096


def test_a_window_that_no_mask_shows_is_refused():
    model = windowed("Mistral")
    for block in model.model.layers:  # one that hides by itself what only the configuration says
        forward = block.self_attn.forward

        def hiding(*args, forward=forward, attention_mask=None, **kwargs):
            T = kwargs["hidden_states"].shape[1]
            near = torch.ones(T, T, dtype=torch.bool).tril().triu(1 - model.config.sliding_window)
            return forward(*args, attention_mask=near[None, None], **kwargs)

        block.self_attn.forward = hiding
    model.config.layer_types = ["full_attention"] * 4
    with pytest.raises(ValueError, match="mistral cannot sleep"):
        adapt(model)


def test_what_cannot_sleep_says_why(monkeypatch):
    with pytest.raises(ValueError, match=r"jamba cannot sleep: .*not a matrix per head"):
        adapt(family("jamba"))
    with pytest.raises(
        ValueError, match=r"llama cannot sleep: no block has fast weights.*insert_memory_layers"
    ):
        adapt(family("llama"))
    # Recurrent, and yet memory layers cannot be the advice. Its state is no matrix per head, and is not where
    # transformers keeps keys and values before 5.24.
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "eos_token_id": 0}
    with pytest.raises(ValueError, match=r"mamba cannot sleep: .*matrix per head") as caught:
        adapt(MambaForCausalLM(MambaConfig(**small, bos_token_id=0)))
    assert "insert" not in str(caught.value)
    with pytest.raises(ValueError, match="no decoder with a list of blocks"):
        adapt(torch.nn.Linear(1, 1))
    model = family("qwen3_5")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"flash_attention_2.*sdpa"):
        adapt(model)
    model = family("qwen3_5")
    model.model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(ValueError, match="dynamic"):
        adapt(model)


def test_a_family_that_loses_its_state_is_refused(monkeypatch):
    model = family("bamba")
    modelling = sys.modules[type(model).__module__]
    scan = modelling.mamba2_chunk_scan
    monkeypatch.setattr(
        modelling,
        "mamba2_chunk_scan",
        lambda *a, initial_states=None, **kw: scan(*a, initial_states=None, **kw),
    )
    with pytest.raises(ValueError, match=r"bamba cannot sleep: .*(several calls|ignores the fast weights)"):
        adapt(model)


def test_a_model_that_does_more_than_its_blocks_is_refused(monkeypatch):
    model = family("olmo_hybrid")
    forward = type(model).forward

    def scaled(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    monkeypatch.setattr(type(model), "forward", scaled)
    with pytest.raises(ValueError, match="do not compute what the model computes"):
        adapt(model)


def test_gradient_checkpointing_that_drops_the_state_is_refused():
    model = family("qwen3_5").train()
    backbone = adapt(model)
    # The name from transformers 5.22 on, and the one before it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    with pytest.raises(ValueError, match=r"drops.*checkpoint=True of sleep_forward"):
        sleep_forward(backbone, text(1, 9), None, sleeping())


def test_a_loop_without_fast_weights_is_refused():
    model = adapt(family("qwen3_5"))
    with pytest.raises(ValueError, match=r"loop=\(1, 2\).*fast weights"):
        sleep_forward(model, text(1, 12), None, sleeping(loop=(1, 2)))
    sleep_forward(model, text(1, 12), None, sleeping(loop=(1, 3)))


def test_nothing_heavy_is_imported_with_the_package():
    code = "import sys, lmsleep; print({'transformers', 'peft', 'triton', 'fla'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_the_memory_of_an_adapted_model_knows_its_kinds(tmp_path):
    model = adapt(family("qwen3_5"))
    session = Session(model, sleeping())
    session.read(text(1, 2 * L)[0])
    session.save(tmp_path / "a.mem")
    for origin in (session.memory.origin, Memory.load(tmp_path / "a.mem", model).clone().origin):
        assert origin.rule == ("fast_weights", None, "fast_weights", None)
