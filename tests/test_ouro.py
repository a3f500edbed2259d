import json

import pytest
import torch
import torch.nn.functional as F
from conftest import close
from hf_models import family, held
from transformers import DynamicCache

from lmsleep import adapt
from lmsleep.hf import load_pretrained
from lmsleep.hf.cache_name import named
from lmsleep.hf.ouro import OuroConfig, OuroForCausalLM

PUBLISHED = {
    "architectures": ["OuroForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM"},
    "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 1, "head_dim": 8, "hidden_act": "silu",
    "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 48,
    "layer_types": ["full_attention"] * 4, "max_position_embeddings": 65536, "max_window_layers": 4,
    "model_type": "ouro", "num_attention_heads": 4, "num_hidden_layers": 4, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "total_ut_steps": 4, "use_cache": True,
    "use_sliding_window": False, "vocab_size": 64, "early_exit_threshold": 1.0,
}  # fmt: skip
TOKENS = torch.arange(1, 10)[None]


@pytest.fixture
def model():
    return family("ouro").double()


def described(p, tokens, steps, D=4, H=4, K=8):
    # Hidden states after every step, computed from the published tensors by the description.
    def norm(h, name):
        return p[name] * h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    T = len(tokens)
    angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, K, 2) / K)
    turn = torch.polar(torch.ones(T, K // 2).double(), angle.double())[:, None]
    causal = torch.full((T, T), -torch.inf).double().triu(1)

    def rotated(x):
        y = torch.complex(x[..., : K // 2].contiguous(), x[..., K // 2 :].contiguous()) * turn
        return torch.cat([y.real, y.imag], dim=-1)

    h, states = p["model.embed_tokens.weight"][tokens], []
    for _ in range(steps):
        for i in range(D):
            layer = f"model.layers.{i}."
            x = norm(h, layer + "input_layernorm.weight")
            q, k, v = ((x @ p[f"{layer}self_attn.{n}_proj.weight"].mT).view(T, H, K) for n in "qkv")
            scores = torch.einsum("thk,shk->hts", rotated(q), rotated(k)) / K**0.5 + causal
            o = torch.einsum("hts,shk->thk", scores.softmax(-1), v).flatten(1)
            o = o @ p[layer + "self_attn.o_proj.weight"].mT
            h = h + norm(o, layer + "input_layernorm_2.weight")
            x = norm(h, layer + "post_attention_layernorm.weight")
            x = F.silu(x @ p[layer + "mlp.gate_proj.weight"].mT) * (x @ p[layer + "mlp.up_proj.weight"].mT)
            x = x @ p[layer + "mlp.down_proj.weight"].mT
            h = h + norm(x, layer + "post_attention_layernorm_2.weight")
        h = norm(h, "model.norm.weight")
        states.append(h)
    return states


@pytest.mark.parametrize("steps", [1, 4])
def test_ouro_is_its_description(model, steps):
    p = model.state_dict()
    with torch.no_grad():
        for name, tensor in p.items():
            if "norm" in name:
                tensor.add_(torch.rand_like(tensor))
        model.config.total_ut_steps = steps
        expected = described(p, TOKENS[0], steps)[-1] @ p["lm_head.weight"].mT
        assert close(model(TOKENS).logits[0], expected, 1e-6)  # rotary positions are float32


def test_tokens_leave_where_the_gate_says(model):
    p, model.config.early_exit_threshold = model.state_dict(), 0.7
    with torch.no_grad():
        p["model.early_exit_gate.weight"].mul_(2)
        states = described(p, TOKENS[0], 4)
        logits, left = model(TOKENS).logits[0], []
        for t in range(TOKENS.shape[1]):
            gone, stays = 0.0, 1.0
            for step in range(4):
                gate = states[step][t] @ p["model.early_exit_gate.weight"][0]
                leaves = 1.0 if step == 3 else torch.sigmoid(gate + p["model.early_exit_gate.bias"][0])
                gone, stays = gone + stays * leaves, stays * (1 - leaves)
                if gone >= 0.7:
                    break
            left.append(step)
            assert close(logits[t], states[step][t] @ p["lm_head.weight"].mT, 1e-6)
    assert len(set(left)) > 1


@pytest.mark.parametrize("made", [lambda c: None, lambda c: DynamicCache(), lambda c: DynamicCache(config=c)])
def test_every_step_has_keys_and_values_of_its_own(model, made):
    cache, parts = made(model.config), []
    with torch.no_grad():
        for piece in TOKENS.split([1, 3, 1, 4], dim=1):
            out = model(piece, **named(cache), use_cache=True)
            cache = held(out)
            parts.append(out.logits)
        assert close(torch.cat(parts, dim=1), model(TOKENS).logits, 1e-6)
    assert len(cache.layers) == 16 and all(layer.get_seq_length() == 9 for layer in cache.layers)


def test_generation_is_greedy_over_the_plain_model(model):
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    answer = model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), **options)
    x = TOKENS
    for _ in range(5):
        x = torch.cat([x, model(x, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(answer, x)


def test_names_and_shapes_are_those_published():
    with torch.device("meta"):
        models = {size: OuroForCausalLM(OuroConfig.preset(size)) for size in ("1.4B", "2.6B")}
    d, hidden, V = 2048, 5632, 49152
    for size, layers in (("1.4B", 24), ("2.6B", 48)):
        expected = {
            "model.embed_tokens.weight": (V, d), "model.norm.weight": (d,), "lm_head.weight": (V, d),
            "model.early_exit_gate.weight": (1, d), "model.early_exit_gate.bias": (1,),
        }  # fmt: skip
        for i in range(layers):
            layer = {f"self_attn.{n}_proj.weight": (d, d) for n in "qkvo"}
            layer |= {f"mlp.{n}_proj.weight": (hidden, d) for n in ("gate", "up")}
            layer["mlp.down_proj.weight"] = (d, hidden)
            norms = ("input_layernorm", "post_attention_layernorm")
            layer |= {f"{n}{which}.weight": (d,) for n in norms for which in ("", "_2")}
            expected |= {f"model.layers.{i}.{n}": s for n, s in layer.items()}
        assert {n: tuple(p.shape) for n, p in models[size].named_parameters()} == expected
    with pytest.raises(ValueError, match=r"choose one of 1\.4B, 2\.6B"):
        OuroConfig.preset("3B")


def test_a_folder_as_published_is_loaded_and_saved(tmp_path):
    model = family("ouro")
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    again = load_pretrained(tmp_path, dtype=torch.float32)
    assert again.config.total_ut_steps == 4 and torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(load_pretrained(tmp_path / "again")(TOKENS).logits, model(TOKENS).logits)
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, "total_ut_steps": 0}))
    with pytest.raises(ValueError, match=r"config\.json: .*total_ut_steps=0 must be at least 1"):
        load_pretrained(tmp_path)


def test_a_loop_while_awake_is_refused():
    with pytest.raises(ValueError, match=r"total_ut_steps=4 .*config\.total_ut_steps = 1"):
        adapt(family("ouro"))
