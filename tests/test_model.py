import json
import math
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import VOCAB, close, lively, random_tokens, same_memory, tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from lmsleep import HybridConfig, HybridLM
from lmsleep.layers import FastWeights

MIXED = ("attention", "gated_delta_net", "gated_linear", "attention")
OVERRIDES = {
    0: {"num_heads": 4, "num_kv_heads": 2, "rope_theta": None, "mlp_dim": 0},
    1: {"conv_size": 0, "value_dim": 3, "forget": (0.2, 0.5)},
    2: {"num_heads": 4, "negative_eigenvalues": True, "conv_size": 2},
}
CONFIGS = {
    "attention": tiny("attention", "attention"),
    "gated_delta_net": tiny("gated_delta_net", "gated_delta_net"),
    "gated_linear": tiny("gated_linear", "gated_linear"),
    "kda": tiny("kda", "kda"),
    "raven": tiny("raven", "raven"),
    "jet": tiny("jet", "attention", "jet"),
    "mixed": tiny(*MIXED),
    "reference": tiny(*MIXED, backend="reference"),
    "qk_norm": tiny(*MIXED, qk_norm=True),
    "grouped": tiny(*MIXED, num_heads=4, num_kv_heads=2),
    "multi-query": tiny(*MIXED, num_heads=4, num_kv_heads=1),
    "tied": tiny(*MIXED, tie_embeddings=True),
    "no positions": tiny(*MIXED, rope_theta=None),
    "no convolution": tiny(*MIXED, conv_size=0),
    "no mlp": tiny(*MIXED, mlp_dim=0),
    "reflecting": tiny(*MIXED, negative_eigenvalues=True),
    "head sizes": tiny(*MIXED, head_dim=6, value_dim=5),
    "overrides": tiny(*MIXED, overrides=OVERRIDES),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@torch.no_grad()
def read_in_pieces(model, tokens, cuts, span=None):
    state, logits = model.initial_state(len(tokens)), []
    for a, b in zip([0, *cuts], [*cuts, tokens.shape[1]], strict=True):
        h, state = model.run(model.embed(tokens[:, a:b]), state, 0, model.num_blocks, span=span)
        logits.append(model.head(h))
    return torch.cat(logits, dim=1), state


def assert_same_reading(actual, expected):
    assert close(actual[0], expected[0])
    assert same_memory(actual[1].memory, expected[1].memory)
    for mine, other in zip(actual[1].cache.layers, expected[1].cache.layers, strict=True):
        assert all(close(x, y) for x, y in zip(mine, other, strict=True))


@every_config
@pytest.mark.parametrize("span", [None, 5])
def test_decoding_token_by_token_equals_one_prefill(config, span):
    model, x = lively(config), random_tokens(2, 70)  # longer than a chunk of the recurrence
    whole = read_in_pieces(model, x, [], span)
    assert_same_reading(read_in_pieces(model, x, range(1, 70), span), whole)
    if span is None:
        assert torch.equal(model(x), whole[0])


@given(
    name=st.sampled_from(sorted(CONFIGS)), span=st.sampled_from([None, 1, 3, 8]), T=st.integers(1, 20),
    cuts=st.lists(st.integers(0, 20), max_size=5),
)  # fmt: skip
def test_a_prefill_may_be_cut_anywhere(name, span, T, cuts):
    model, x = lively(CONFIGS[name]), random_tokens(2, T)
    cuts = sorted(min(cut, T) for cut in cuts)
    assert_same_reading(read_in_pieces(model, x, cuts, span), read_in_pieces(model, x, [], span))


@every_config
def test_no_token_sees_a_later_one(config):
    model, x = lively(config), random_tokens(1, 20)
    with torch.no_grad():
        before = model(x)
        for t in (1, 7, 19):
            changed = x.clone()
            changed[:, t] = (x[:, t] + 1) % VOCAB
            after = model(changed)
            assert torch.equal(after[:, :t], before[:, :t])
            assert not torch.equal(after[:, t:], before[:, t:])


def test_a_forward_pass_without_gradients_leaves_nothing_behind():
    # What is cached between calls must not be marked as unusable in training.
    model, x = lively(tiny(*MIXED, rope_theta=777.0)), random_tokens(2, 9)
    with torch.inference_mode():
        before = model(x).clone()
    after = model(x)
    after.sum().backward()
    assert torch.equal(after, before)
    assert all(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("kind", ["attention", "gated_delta_net", "gated_linear", "kda", "raven", "jet"])
@pytest.mark.parametrize("conv_size", [0, 4])
def test_every_token_sees_all_earlier_ones(kind, conv_size):
    least = int(kind == "jet")  # whose kernels are made by each token
    model, x = lively(tiny(kind, conv_size=max(conv_size, least))), random_tokens(1, 20)
    h = model.embed(x).detach().requires_grad_()
    out, _ = model.run(h, model.initial_state(1), 0, 1)
    (gradient,) = torch.autograd.grad(out[0, -1].sum(), h)
    assert (gradient.abs().amax(-1) > 0).all()


@pytest.mark.parametrize("span", [1, 2, 5, 30])
@pytest.mark.parametrize("theta", [None, 100.0])
def test_span_is_the_reach_of_one_attention_block(span, theta):
    model, T = lively(tiny("attention", rope_theta=theta)), 14
    h = model.embed(random_tokens(1, T)).detach().requires_grad_()
    out, _ = model.run(h, model.initial_state(1), 0, 1, span=span)
    for t in range(T):
        (gradient,) = torch.autograd.grad(out[0, t].sum(), h, retain_graph=True)
        reach = gradient[0].abs().amax(-1) > 0
        assert reach.tolist() == [t - span < s <= t for s in range(T)]


@pytest.mark.parametrize("span", [1, 4])
def test_attention_within_a_span_is_attention_over_that_span_alone(span):
    model, x = lively(tiny("attention", qk_norm=True)), random_tokens(1, 14)
    logits, _ = read_in_pieces(model, x, [], span)
    for t in range(14):
        alone, _ = read_in_pieces(model, x[:, max(t - span + 1, 0) : t + 1], [])
        assert close(logits[:, t], alone[:, -1])


def test_attention_is_the_textbook_formula():
    model, T, H, D = lively(tiny("attention", num_heads=4, num_kv_heads=2, rope_theta=50.0)), 6, 4, 4
    layer = model.blocks[0].mixer
    x = torch.randn(T, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def rotated(y, t):  # pairs (i, i + D/2) as complex numbers, turned by t / theta^(2i/D)
        turn = torch.exp(1j * t * 50.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D))
        z = torch.complex(y[: D // 2], y[D // 2 :]) * turn
        return torch.cat([z.real, z.imag])

    out = torch.zeros(T, H * D, dtype=torch.float64)
    for head in range(H):
        mine, shared = slice(head * D, (head + 1) * D), slice(head // 2 * D, (head // 2 + 1) * D)
        q, k, v = (
            x @ layer.q_proj.weight[mine].T,
            x @ layer.k_proj.weight[shared].T,
            x @ layer.v_proj.weight[shared].T,
        )
        for t in range(T):
            scores = torch.stack([rotated(q[t], t) @ rotated(k[s], s) for s in range(t + 1)]) / math.sqrt(D)
            out[t, mine] = scores.softmax(0) @ v[: t + 1]
    got, _, _ = layer(x[None], None, layer.empty_cache(1), None, None)
    assert close(got[0], out @ layer.o_proj.weight.T)


def test_fast_weights_are_the_gated_delta_net():
    model, T, K = lively(tiny("gated_delta_net", negative_eigenvalues=True)), 6, 8
    layer = model.blocks[0].mixer
    x = torch.randn(T, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    qkv = torch.cat([x @ p.weight.T for p in (layer.q_proj, layer.k_proj, layer.v_proj)], dim=1)
    rows = torch.zeros_like(qkv)
    for t in range(T):
        for back in range(min(t + 1, 4)):
            rows[t] += layer.conv[:, 3 - back] * qkv[t - back]
    rows = rows * rows.sigmoid()
    S, out = torch.zeros(2, K, K, dtype=torch.float64), torch.zeros(T, 16, dtype=torch.float64)
    for t in range(T):
        alpha = (-layer.A_log.exp() * F.softplus(layer.a_proj.weight @ x[t] + layer.dt_bias)).exp()
        beta = 2 * (layer.b_proj.weight @ x[t] + layer.b_proj.bias).sigmoid()
        for head, (q, k, v) in enumerate(zip(*(y.view(2, K) for y in rows[t].split(16)), strict=True)):
            q, k = q / q.norm(), k / k.norm()
            S[head] = alpha[head] * S[head] @ (torch.eye(K) - beta[head] * torch.outer(k, k))
            S[head] += beta[head] * torch.outer(v, k)
            o = S[head] @ q / math.sqrt(K)
            out[t, head * K : (head + 1) * K] = o / (o.square().mean() + 1e-6).sqrt() * layer.norm.weight
    gate = x @ layer.g_proj.weight.T
    memory = torch.zeros(1, 2, K, K, dtype=torch.float64)
    got, memory, _ = layer(x[None], memory, layer.empty_cache(1), None, None)
    assert close(got[0], (out * gate * gate.sigmoid()) @ layer.o_proj.weight.T)
    assert close(memory[0], S.mT)


@pytest.mark.parametrize("block", sorted(OVERRIDES))
def test_an_override_is_the_option_set_for_one_block(block):
    model, h = lively(CONFIGS["overrides"]), torch.randn(2, 9, 16, dtype=torch.float64)
    other = lively(tiny(*MIXED, **OVERRIDES[block]), seed=1)
    other.blocks[block].load_state_dict(model.blocks[block].state_dict())
    out, _ = model.run(h, model.initial_state(2), block, block + 1)
    expected, _ = other.run(h, other.initial_state(2), block, block + 1)
    assert torch.equal(out, expected)


def test_padding_writes_nothing_into_memory():
    model, x = lively(tiny(*MIXED)), random_tokens(2, 12)
    valid = torch.arange(12) < torch.tensor([[12], [7]])
    _, padded = model.run(model.embed(x), model.initial_state(2), 0, 4, valid=valid)
    _, alone = model.run(model.embed(x[1:, :7]), model.initial_state(1), 0, 4)
    assert same_memory(padded.memory[1:], alone.memory)


def test_memory_of_a_low_precision_model_is_float32():
    model = lively(tiny(*MIXED), dtype=torch.bfloat16)
    _, state = read_in_pieces(model, random_tokens(1, 6), [3])
    assert [s.dtype for s in state.memory.layers if s is not None] == [torch.float32, torch.float32]


# Files


@pytest.fixture
def saved(tmp_path):
    model = lively(tiny(*MIXED, overrides=OVERRIDES), dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


@pytest.mark.parametrize("name", ["mixed", "tied", "grouped", "overrides"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_saved_and_loaded_models_are_bit_equal(tmp_path, name, dtype):
    model, x = lively(CONFIGS[name], dtype=dtype), random_tokens(2, 12)
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = HybridLM.from_pretrained(tmp_path / "new" / "folder")
    assert loaded(x).dtype == dtype
    assert torch.equal(loaded(x), model(x))
    assert (loaded.lm_head.weight is loaded.embedding.weight) == (name == "tied")


def test_saving_replaces_an_older_model(saved):
    _, folder = saved
    other = lively(tiny("gated_linear"), seed=1, dtype=torch.float32)
    other.save_pretrained(folder)
    assert torch.equal(HybridLM.from_pretrained(folder)(random_tokens(1, 4)), other(random_tokens(1, 4)))
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(saved, name):
    (saved[1] / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{saved[1]} holds no model: {name}")):
        HybridLM.from_pretrained(saved[1])


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none"))):
        HybridLM.from_pretrained(tmp_path / "none")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_cut_short_is_named(saved, name, share):
    path = saved[1] / name
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        HybridLM.from_pretrained(saved[1])


@pytest.mark.parametrize(
    "content",
    [
        "null", "[]", "3", '"model"', '{"d_modle": 3}', '{"d_model": "wide"}', '{"blocks": 5}',
        '{"forget": [0.1]}', '{"forget": 0.1}', '{"overrides": []}', '{"overrides": {"0": 5}}',
        '{"overrides": {"first": {}}}', '{"blocks": ["mamba"]}', "\0\xff",
    ],
)  # fmt: skip
def test_a_foreign_configuration_is_named(saved, content):
    path = saved[1] / "config.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        HybridLM.from_pretrained(saved[1])


def test_foreign_weights_are_named(saved):
    path = saved[1] / "model.safetensors"
    path.write_bytes(b"not a safetensors file at all")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        HybridLM.from_pretrained(saved[1])


@pytest.mark.parametrize(
    "other", [tiny(*MIXED), tiny("attention"), tiny(*MIXED, overrides=OVERRIDES, vocab_size=12)],
    ids=["options", "blocks", "vocabulary"],
)  # fmt: skip
def test_weights_of_another_configuration_are_rejected(saved, tmp_path, other):
    lively(other, dtype=torch.float32).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", saved[1])
    with pytest.raises(ValueError, match=re.escape(str(saved[1]))):
        HybridLM.from_pretrained(saved[1])


@pytest.mark.parametrize("change", ["missing", "extra", "none"])
def test_weights_must_be_exactly_those_of_the_model(saved, change):
    path = saved[1] / "model.safetensors"
    tensors = load_file(path)
    if change == "missing":
        del tensors["blocks.1.mixer.A_log"]
    elif change == "extra":
        tensors["blocks.9.mixer.A_log"] = torch.zeros(2)
    else:
        tensors = {}
    save_file(tensors, path)
    with pytest.raises(ValueError, match=re.escape(str(saved[1]))):
        HybridLM.from_pretrained(saved[1])


# Initialisation


def assert_normal(weight, std):
    # Five standard errors of a sample mean and of a sample standard deviation.
    n = weight.numel()
    assert abs(weight.mean().item()) <= 5 * std / math.sqrt(n)
    assert abs(weight.std().item() / std - 1) <= 5 / math.sqrt(2 * n)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("residual_init", [1.0, 0.25])
def test_weights_begin_with_the_stated_scale(tied, residual_init):
    torch.manual_seed(0)
    blocks = ("attention", "gated_delta_net", "gated_linear")
    model = HybridLM(
        HybridConfig(
            vocab_size=200, d_model=64, blocks=blocks, tie_embeddings=tied, residual_init=residual_init
        )
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.RMSNorm):
            assert (module.weight == 1).all()
        if isinstance(module, nn.Linear) and not name.endswith(("a_proj", "b_proj")):
            writes = name.endswith(("o_proj", "down_proj"))
            assert_normal(module.weight, module.in_features**-0.5 * (residual_init if writes else 1))
            assert module.bias is None
    assert_normal(model.embedding.weight, 64**-0.5 if tied else 1.0)


def test_gates_begin_with_the_stated_rates():
    model = HybridLM(tiny("gated_delta_net", "gated_linear", num_heads=4, forget=(0.01, 0.64)))
    for layer in (block.mixer for block in model.blocks):
        assert isinstance(layer, FastWeights)
        assert not layer.a_proj.weight.any()
        assert not layer.b_proj.weight.any()
        assert (layer.b_proj.bias == 1).all()
        decay = layer.A_log.exp() * F.softplus(layer.dt_bias)
        assert torch.allclose(decay, torch.tensor([0.01, 0.04, 0.16, 0.64]), rtol=1e-5, atol=0)
        assert torch.equal(layer.conv, torch.tensor([0.0, 0, 0, 1]).expand(3 * 16, 4))


def test_the_older_taps_of_the_convolution_start_where_they_are_told():
    conv = HybridLM(tiny("gated_delta_net", conv_init=0.5)).blocks[0].mixer.conv
    assert torch.equal(conv, torch.tensor([0.5, 0.5, 0.5, 1]).expand_as(conv))


def test_residual_init_of_a_block_is_honoured_or_refused():
    try:
        config = tiny("attention", d_model=64, overrides={0: {"residual_init": 0.01}})
    except ValueError:
        return
    assert_normal(HybridLM(config).blocks[0].mixer.o_proj.weight, 0.01 / 8)


# Configuration


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_configuration_survives_json(config):
    assert HybridConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("blocks", ()),
        ("blocks", ("attention", "mamba")),
        ("vocab_size", 0),
        ("d_model", 0),
        ("d_model", 17),  # no multiple of the heads
        ("num_heads", 0),
        ("num_heads", 3),
        ("head_dim", -4),
        ("head_dim", 5),  # rotary positions pair the halves of a head
        ("value_dim", -1),
        ("num_kv_heads", 3),
        ("num_kv_heads", -1),
        ("mlp_dim", -8),
        ("conv_size", -1),
        ("conv_init", -0.5),
        ("norm_eps", -1.0),
        ("residual_init", -1.0),
        ("rope_theta", -1.0),
        ("forget", (0.0, 0.1)),
        ("forget", (0.2, 0.1)),
        ("backend", "cuda"),
        ("overrides", {4: {"mlp_dim": 0}}),
        ("overrides", {0: {"d_model": 8}}),
        ("overrides", {0: {"mlp_size": 8}}),
        ("overrides", {0: {"num_kv_heads": 3}}),
    ],
)
def test_an_invalid_option_is_named(name, value):
    with pytest.raises(ValueError, match=name):
        HybridConfig(**{"blocks": MIXED, "d_model": 16, "num_heads": 4, name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("conv_size", 0), ("conv_init", 0.5), ("negative_eigenvalues", True)]
)
def test_an_option_that_jet_blocks_do_not_have_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}={value}: blocks of the kind jet .*; block 1 is one"):
        HybridConfig(blocks=("attention", "jet"), **{name: value})
    with pytest.raises(ValueError, match=f"^overrides of block 1: {name}={value}: blocks of the kind jet"):
        HybridConfig(blocks=("attention", "jet"), overrides={1: {name: value}})
    # What is said of another block, or taken back for this one, is no matter of it.
    HybridConfig(blocks=("gated_delta_net", "jet"), overrides={0: {name: value}})
    usual = {"conv_size": 4, "conv_init": 0.0, "negative_eigenvalues": False}[name]
    HybridConfig(blocks=("gated_delta_net", "jet"), overrides={1: {name: usual}}, **{name: value})


def test_an_unknown_field_is_named():
    with pytest.raises(ValueError, match="d_modle"):
        HybridConfig.from_dict({"d_modle": 3})


def test_the_default_mlp_is_eight_thirds_rounded_up_to_eight():
    assert [HybridConfig(d_model=d).hidden_dim for d in (16, 64, 96, 256)] == [48, 176, 256, 688]
