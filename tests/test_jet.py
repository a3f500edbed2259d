import json
import logging

import pytest
import torch
import torch.nn.functional as F
from conftest import close
from hf_models import JET, family, held
from transformers import DynamicCache

from lmsleep.hf import load_pretrained
from lmsleep.hf.cache_name import named
from lmsleep.hf.jet_nemotron import JetNemotronConfig, JetNemotronForCausalLM, JetNemotronRMSNorm
from lmsleep.layers import JetBlock

H, K, V, W = 2, 6, 8, 4


@pytest.fixture
def block():
    torch.manual_seed(0)
    block = JetBlock(16, H, K, V, reduction=4).double()
    with torch.no_grad():
        for p in block.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return block


def inputs(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(p, x):
    # One row, one token and one head at a time, from the description; S is [V, K] as in the paper.
    generator = "dynamic_conv1d.kernel_generator."
    values, S, outputs = [], torch.zeros(H, V, K, dtype=x.dtype), []
    for t in range(len(x)):
        q, k = (F.silu(p[f"{n}_proj.weight"] @ x[t]).view(H, K) for n in "qk")
        values.append(p["v_proj.weight"] @ x[t])
        hidden = F.silu(p[generator + "w1.weight"] @ x[t])
        kernel = (p[generator + "w2.weight"] @ hidden + p[generator + "w2.bias"]).view(H * V, W)
        v = torch.zeros(H * V, dtype=x.dtype)
        for lag in range(min(W, t + 1)):
            v += kernel[:, W - 1 - lag] * values[t - lag]
        v = F.silu(v).view(H, V)
        alpha = torch.exp(-p["A_log"].exp() * F.softplus(p["a_proj.weight"] @ x[t] + p["dt_bias"]))
        beta = torch.sigmoid(p["b_proj.weight"] @ x[t])
        heads = []
        for i in range(H):
            unit = k[i] / (k[i].square().sum() + 1e-6).sqrt()
            asked = q[i] / (q[i].square().sum() + 1e-6).sqrt()
            S[i] = alpha[i] * S[i] @ (torch.eye(K, dtype=x.dtype) - beta[i] * torch.outer(unit, unit))
            S[i] += beta[i] * torch.outer(v[i], unit)
            o = S[i] @ asked / K**0.5
            heads.append(p["o_norm.weight"] * o / (o.square().mean() + 1e-5).sqrt())
        outputs.append(p["o_proj.weight"] @ (torch.cat(heads) * F.silu(p["g_proj.weight"] @ x[t])))
    return torch.stack(outputs), S.mT


def test_a_jet_block_is_its_description(block):
    x = inputs(2, 9, 16)
    with torch.no_grad():
        y, S, _ = block(x, None, block.empty_cache(2))
        for row in range(2):
            expected, memory = naive(block.state_dict(), x[row])
            assert close(y[row], expected) and close(S[row], memory)


def test_its_recurrence_is_that_of_fla(block):
    fla = pytest.importorskip("fla.ops.gated_delta_rule.naive", exc_type=ImportError)
    from lmsleep import ops

    q, k = (F.normalize(inputs(2, 9, H, K, seed=s), dim=-1) for s in (1, 2))
    v, g, beta = inputs(2, 9, H, V, seed=3), -inputs(2, 9, H, seed=4).exp(), inputs(2, 9, H, seed=5).sigmoid()
    expected, final = fla.naive_recurrent_gated_delta_rule(
        q=q, k=k, v=v, g=g, beta=beta, scale=K**-0.5, output_final_state=True
    )
    o, S = ops.gated_delta_rule(q, k, v, g, beta)
    assert close(o, expected.double(), 1e-5) and close(S, final.double(), 1e-5)


def test_a_jet_block_goes_on_from_its_state(block):
    x = inputs(2, 9, 16)
    whole, memory, _ = block(x, None, block.empty_cache(2))
    S, cache, parts = None, block.empty_cache(2), []
    for piece in x.split([1, 1, 4, 1, 2], dim=1):
        y, S, cache = block(piece, S, cache)
        parts.append(y)
    assert close(torch.cat(parts, dim=1), whole) and close(S, memory)


def test_a_jet_block_has_the_gradient_of_what_it_computes(block):
    names = [n for n, _ in block.named_parameters()]
    leaves = [p.detach().clone().requires_grad_() for p in block.parameters()]
    state = [inputs(1, 3, 16), inputs(1, H, K, V, seed=2), inputs(1, 2, H * V, seed=3)]

    def run(*args):
        parameters = dict(zip(names, args, strict=False))
        x, S, tail = args[len(names) :]
        y, S, (tail,) = torch.func.functional_call(block, parameters, (x, S, (tail,)))
        return y, S, tail

    assert torch.autograd.gradcheck(
        run, [*leaves, *(s.requires_grad_() for s in state)], fast_mode=True, check_undefined_grad=False
    )


def test_names_and_shapes_are_those_published():
    with torch.device("meta"):
        model = JetNemotronForCausalLM(JetNemotronConfig.preset("2B"))
    assert sum(p.numel() for p in model.parameters()) == 1_964_806_208
    jet = {
        "A_log": (12,), "dt_bias": (12,), "q_proj.weight": (1152, 1536), "k_proj.weight": (1152, 1536),
        "v_proj.weight": (3072, 1536), "g_proj.weight": (3072, 1536), "o_proj.weight": (1536, 3072),
        "a_proj.weight": (12, 1536), "b_proj.weight": (12, 1536), "o_norm.weight": (256,),
        "dynamic_conv1d.kernel_generator.w1.weight": (384, 1536),
        "dynamic_conv1d.kernel_generator.w2.weight": (12288, 384),
        "dynamic_conv1d.kernel_generator.w2.bias": (12288,),
    }  # fmt: skip
    attention = {
        "q_proj.weight": (1536, 1536), "q_proj.bias": (1536,), "k_proj.weight": (256, 1536),
        "k_proj.bias": (256,), "v_proj.weight": (256, 1536), "v_proj.bias": (256,),
        "o_proj.weight": (1536, 1536),
    }  # fmt: skip
    expected = {"model.embed_tokens.weight": (151936, 1536), "model.norm.weight": (1536,)}
    for i in range(28):
        layer = {f"self_attn.{n}": s for n, s in (attention if i in (14, 19, 20, 21) else jet).items()}
        layer |= {"input_layernorm.weight": (1536,), "post_attention_layernorm.weight": (1536,)}
        layer |= {f"mlp.{n}_proj.weight": (8960, 1536) for n in ("gate", "up")}
        layer["mlp.down_proj.weight"] = (1536, 8960)
        expected |= {f"model.layers.{i}.{n}": s for n, s in layer.items()}
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == expected
    assert [i for i, kind in enumerate(model.config.layer_types) if kind == "sliding_attention"] == [20, 21]
    assert model.model.layers[20].self_attn.sliding_window == 1152
    with pytest.raises(ValueError, match="choose one of 2B, 4B"):
        JetNemotronConfig.preset("8B")


def test_a_folder_as_published_is_loaded_and_saved(tmp_path, caplog):
    model = family("jet_nemotron")
    model.save_pretrained(tmp_path)
    published = {
        "architectures": ["JetNemotronForCausalLM"],
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_jet_nemotron.JetNemotronConfig",
            "AutoModelForCausalLM": "modeling_jet_nemotron.JetNemotronForCausalLM",
        },
        "bos_token_id": 1, "eos_token_id": 1, "hidden_act": "silu", "hidden_size": 32,
        "efficient_attention_config": {"jet": JET, "swa": {"window_size": 4}},
        "initializer_range": 0.02, "intermediate_size": 48, "layer_types": ["jet", "attn", "jet", "swa"],
        "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "jet_nemotron",
        "num_attention_heads": 4, "num_hidden_layers": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.3", "use_cache": True, "use_mrope": False, "vocab_size": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(published))
    x = torch.arange(1, 12)[None]
    with caplog.at_level(logging.WARNING, "lmsleep"):
        again = load_pretrained(tmp_path, dtype=torch.float32)
    assert "non-commercial use only" in caplog.text
    assert torch.equal(again(x).logits, model(x).logits)
    again.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    for field in ("layer_types", "efficient_attention_config", "rope_theta", "model_type", "architectures"):
        assert saved[field] == published[field]
    assert torch.equal(load_pretrained(tmp_path / "again")(x).logits, model(x).logits)


def test_the_cache_of_transformers_carries_it():
    model, x = family("jet_nemotron").double(), torch.arange(1, 12)[None]
    with torch.no_grad():
        whole, cache, parts = model(x).logits, DynamicCache(config=model.config), []
        for piece in x.split([1, 2, 1, 4, 1, 2], dim=1):
            parts.append(model(piece, **named(cache), use_cache=True).logits)
    assert close(torch.cat(parts, dim=1), whole, 1e-6)  # rotary positions are float32


def test_padding_in_front_of_a_row_changes_nothing():
    model, x = family("jet_nemotron").double(), torch.arange(1, 9)[None]
    padded, mask = F.pad(x, (3, 0)), F.pad(torch.ones_like(x), (3, 0))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    with torch.no_grad():
        out = model(torch.cat([padded, padded]), attention_mask=torch.cat([mask, torch.ones_like(mask)]))
        alone = model(x).logits
    assert close(out.logits[:1, 3:], alone, 1e-6) and not close(out.logits[1:, 3:], alone, 1e-3)
    answers = model.generate(padded, attention_mask=mask, **options)[:, 11:]
    assert torch.equal(answers, model.generate(x, attention_mask=torch.ones_like(x), **options)[:, 8:])
    cache = held(model(x, use_cache=True))
    with pytest.raises(ValueError, match=r"attention_mask hides tokens that follow on others"):
        model(padded, attention_mask=torch.cat([torch.ones_like(x), mask], dim=1), **named(cache))


def test_the_norm_multiplies_before_it_rounds():
    norm, h = JetNemotronRMSNorm(64, 1e-6), torch.randn(8, 64).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(torch.rand(64))
    norm = norm.bfloat16()
    exact = F.rms_norm(h.float(), (64,), norm.weight.float(), 1e-6)
    assert torch.equal(norm(h), exact.bfloat16())
    assert not torch.equal(norm.weight * F.rms_norm(h.float(), (64,), eps=1e-6).bfloat16(), norm(h))
