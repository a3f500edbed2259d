"""The layer that recalls what was slept on, and what it takes over from an attention."""

import pytest
import torch
import torch.nn.functional as F
from conftest import close
from hf_models import family, with_memory
from hypothesis import given, settings
from hypothesis import strategies as st

from lmsleep import Session, SessionBatch, SleepConfig, adapt, sleep_forward
from lmsleep.hf import insert_memory_layers
from lmsleep.layers import Recall
from lmsleep.sleep import Window

TOKENS = torch.arange(1, 25)[None]
RULES = pytest.mark.parametrize("rule", ["gated_delta_rule", "kda"])


def made(rule="gated_delta_rule", groups=2, seed=0):
    torch.manual_seed(seed)
    layer = Recall(12, 2, groups, 4, rule=rule, bias=True, out_bias=False).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return layer


def by_token(layer, x, S, recalled):
    """The definition, token by token: convolve, read what is recalled, forget, write."""
    d = layer.key_dim
    q, k, v = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    qk, weight = torch.cat([q, k], -1), layer.conv
    said = []
    for t in range(x.shape[1]):
        mixed = sum(weight[:, 3 - j] * qk[:, t - j] for j in range(4) if t - j >= 0)
        q_t, k_t = mixed[:, : q.shape[-1]], mixed[:, q.shape[-1] :]
        q_t = F.normalize(q_t.view(len(x), 2, layer.groups, d), dim=-1)
        k_t, v_t = F.normalize(k_t.view(len(x), 2, d), dim=-1), v[:, t].view(len(x), 2, d)
        dt = F.softplus(layer.a_proj(x[:, t]) + layer.dt_bias) * layer.A_log.exp()
        beta = layer.b_proj(x[:, t]).sigmoid()
        S = (-dt).exp()[..., None, None] * S
        error = v_t - torch.einsum("bhk,bhkv->bhv", k_t, S)
        S = S + torch.einsum("bh,bhk,bhv->bhkv", beta, k_t, error)
        seen = S if recalled is None else recalled
        y = torch.einsum("bhgk,bhkv->bhgv", q_t, seen).flatten(1, 2) * layer.gate
        said.append(layer.o_proj(y.flatten(1)))
    return torch.stack(said, 1), S


@settings(max_examples=12, deadline=None)
@given(T=st.integers(1, 9), groups=st.integers(1, 3), inline=st.booleans(), seed=st.integers(0, 99))
def test_it_is_what_it_says_token_by_token(T, groups, inline, seed):
    layer = made(groups=groups, seed=seed)
    x, S, old = torch.randn(2, T, 12).double(), *torch.randn(2, 2, 2, 4, 4).double()
    recalled = None if inline else old
    for t in (x, S, old):
        t.requires_grad_(True)
    y, after, _ = layer(x, S, layer.empty_cache(2), recalled)
    wanted, left = by_token(layer, x, S, recalled)
    assert close(y, wanted, 1e-9) and close(after, left, 1e-9)
    own = [*layer.parameters(), x, S]
    grads = [
        torch.autograd.grad((a * a).sum() + b.sum(), own, allow_unused=True)
        for a, b in ((y, after), (wanted, left))
    ]
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None) and (a is None or close(a, b, 1e-8))


@RULES
@settings(max_examples=10, deadline=None)
@given(cuts=st.lists(st.integers(1, 10), max_size=3), silent=st.booleans(), inline=st.booleans())
def test_read_in_pieces_or_at_once(rule, cuts, silent, inline):
    layer = made(rule)
    x, S = torch.randn(2, 11, 12).double(), torch.randn(2, 2, 4, 4).double()
    recalled = None if inline else S * (not silent)
    whole, after, (tail,) = layer(x, S, layer.empty_cache(2), recalled)
    assert (whole is None) == (silent and not inline)
    said, S, cache = [], S, layer.empty_cache(2)
    for part in x.tensor_split(sorted(cuts), dim=1):
        y, S, cache = layer(part, S, cache, recalled)
        said.append(y)
    assert close(S, after, 1e-9) and close(cache[0], tail, 1e-12)
    assert whole is None or close(torch.cat(said, 1), whole, 1e-9)


def test_it_recalls_what_was_slept_on_and_nothing_of_its_window():
    backbone = adapt(with_memory(family("llama"), 2, "gated_delta_net"))
    plain = adapt(with_memory(family("llama"), 2, "gated_delta_net")).model
    with torch.no_grad():
        out = sleep_forward(backbone, TOKENS, None, SleepConfig(window=12, passes=1))
        first, second = out.logits.split(12, dim=1)
        assert torch.equal(first, plain(TOKENS[:, :12], use_cache=False).logits)
        assert not close(second, plain(TOKENS[:, 12:], use_cache=False).logits, 1e-2)


def test_a_frozen_model_needs_no_gradient_in_its_first_window():
    model = with_memory(family("llama"), 2, "gated_delta_net")
    model.requires_grad_(False)
    for i in (1, 3):
        model.model.layers[i].memory.requires_grad_(True)
    backbone, seen = adapt(model), []
    for i in (1, 3):
        model.model.layers[i].register_forward_hook(lambda block, args, out: seen.append(out.requires_grad))
    sleep_forward(backbone, TOKENS[:, :12], None, SleepConfig(window=12), evict_last=True)
    assert seen == [False, False]
    seen.clear()
    sleep_forward(backbone, TOKENS, None, SleepConfig(window=12), evict_last=True)
    assert seen == [False, False, True, True]


def test_a_sliding_window_reads_what_is_written():
    backbone = adapt(with_memory(family("llama"), 2, "gated_delta_net"))
    sliding = SleepConfig(window=4, passes=2, eviction="sliding")
    with torch.no_grad():
        whole = sleep_forward(backbone, TOKENS, None, sleep=sliding).logits
        batch = SessionBatch([Session(backbone, sliding)])
        parts = [batch.read_with_logits([part.tolist()])[0] for part in TOKENS[0].split(3)]
    assert close(torch.cat(parts), whole[0], 1e-4)


def test_rows_at_different_places_of_their_windows_share_a_step():
    backbone = adapt(with_memory(family("llama"), 2, "gated_delta_net"))
    sleep = SleepConfig(window=6, passes=2)
    texts = [TOKENS[0, :n].tolist() for n in (3, 6, 7, 12, 17)]
    alone = []
    for text in texts:
        session = Session(backbone, sleep)
        session.read(text)
        alone.append(session.generate([5, 6], max_new_tokens=9))
    batch = SessionBatch([Session(backbone, sleep) for _ in texts])
    batch.read(texts)
    assert batch.generate([[5, 6]] * len(texts), max_new_tokens=9) == alone


@pytest.mark.parametrize("kind", ["gated_delta_net", "kda"])
@pytest.mark.parametrize(
    "sleep", [SleepConfig(window=6, passes=2), SleepConfig(window=6, eviction="sliding")]
)
@pytest.mark.parametrize("group", [1, 1000])
def test_rows_of_different_length_run_together_as_they_would_alone(kind, sleep, group, monkeypatch):
    backbone = adapt(with_memory(family("llama"), 2, kind))
    lengths = torch.tensor([13, 4, 6, 9, 1])
    rows = torch.randint(1, 60, (5, 13), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(rows, dtype=torch.bool)

    def read(rows, mask, lengths):
        out = sleep_forward(backbone, rows, mask, sleep, lengths=lengths)
        return sleep_forward(backbone, rows[:, :4], None, sleep, state=out.state), out

    monkeypatch.setattr("lmsleep.hf.backbone.GROUP", group)
    with torch.no_grad():
        after, out = read(rows, mask, lengths)
        for i, n in enumerate(lengths.tolist()):
            later, alone = read(rows[i : i + 1, :n], mask[i : i + 1, :n], None)
            assert close(out.logits[i, :n], alone.logits[0], 1e-4)
            for a, b in zip(out.memory.tensors(), alone.memory.tensors(), strict=True):
                assert close(a[i], b[0], 1e-4)
            T = later.logits.shape[1]
            assert close(after.logits[i, :T], later.logits[0], 1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "ouro"])
def test_it_begins_as_the_attention_behind_it(name):
    model = family(name)
    blocks = model.model.layers
    insert_memory_layers(model, 2)
    for i, behind in ((1, 2), (3, 3)):
        attention, mixer = blocks[behind].self_attn, blocks[i].memory.mixer
        for map_ in ("v_proj", "o_proj"):
            assert torch.equal(getattr(mixer, map_).weight, getattr(attention, map_).weight)
        scale = attention.q_norm.weight.repeat(4)[:, None] if name == "qwen3" else 1.0
        assert torch.equal(mixer.q_proj.weight, attention.q_proj.weight * scale)
        assert torch.equal(blocks[i].memory.norm.weight, blocks[behind].input_layernorm.weight)
        assert mixer.conv[:, :-1].eq(0.5).all() and mixer.conv[:, -1].eq(1).all() and mixer.gate.eq(0).all()


def test_heads_that_are_not_there_begin_random():
    # As of a model whose maps to queries, keys and values are one.
    model = family("llama")
    for block in model.model.layers:
        block.self_attn.qkv_proj = block.self_attn.q_proj
        del block.self_attn.q_proj
    assert insert_memory_layers(model, 2).after == (1, 3)
    for place in (1, 3):
        mixer = model.model.layers[place].memory.mixer
        assert not any(
            torch.equal(mixer.q_proj.weight, b.self_attn.qkv_proj.weight) for b in model.model.layers
        )
        assert mixer.q_proj.weight.std() > 0 and mixer.conv[:, :-1].eq(0.5).all()


def test_passes_read_what_the_pass_before_them_wrote():
    backbone = adapt(with_memory(family("llama"), 2, "gated_delta_net"))
    window = Window(TOKENS[:, :8], backbone.initial_state(1))
    with torch.no_grad():
        one = sleep_forward(backbone, window.tokens, None, SleepConfig(window=8), evict_last=True).memory
        two = SleepConfig(window=8, passes=2)
        both = sleep_forward(backbone, window.tokens, None, two, evict_last=True).memory
        # By hand: the second pass begins with an empty window and with what the first wrote.
        h, state = backbone.run(backbone.embed(window.tokens), window.began, 0, 4)
        _, state = backbone.run(h, type(state)(state.memory, window.began.cache), 0, 4)
    assert all(torch.equal(a, b) for a, b in zip(both.tensors(), state.memory.tensors(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(both.tensors(), one.tensors(), strict=True))
