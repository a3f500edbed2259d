"""Tiny random models of the families of `transformers` that lmsleep adapts; their weights make S matter."""

from typing import Any

import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lmsleep.hf import insert_memory_layers
from lmsleep.hf.cache_name import cache_name
from lmsleep.hf.jet_nemotron import JetNemotronConfig, JetNemotronForCausalLM
from lmsleep.hf.ouro import OuroConfig, OuroForCausalLM

VOCAB = 64
SMALL: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "pad_token_id": 0}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
FOUR: dict[str, Any] = {"num_hidden_layers": 4}
TYPES = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
GDN: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": TYPES, "head_dim": 16,
}  # fmt: skip
MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}


def _qwen3_5() -> Any:
    return t.Qwen3_5ForCausalLM(t.Qwen3_5TextConfig(**SMALL, **HEADS, **FOUR, **GDN))


def _qwen3_next() -> Any:
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return t.Qwen3NextForCausalLM(
        t.Qwen3NextConfig(**SMALL, **HEADS, **FOUR, **GDN, **moe, shared_expert_intermediate_size=16)
    )


def _olmo_hybrid() -> Any:
    sizes = {
        "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "layer_types": TYPES, "eos_token_id": None, "bos_token_id": None,
    }  # fmt: skip
    return t.OlmoHybridForCausalLM(t.OlmoHybridConfig(**SMALL, **HEADS, **FOUR, **sizes))


def _kimi_linear() -> Any:
    sizes = {
        "linear_num_heads": 4, "linear_head_dim": 8, "layer_types": TYPES, "num_local_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1, "n_group": 1,
        "topk_group": 1, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    }  # fmt: skip
    return t.KimiLinearForCausalLM(
        t.KimiLinearConfig(**SMALL, num_attention_heads=4, num_key_value_heads=4, **FOUR, **sizes)
    )


def _nemotron_h() -> Any:
    sizes = {
        "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "head_dim": 8,
        "time_step_min": 1e-4,  # one-token kernels of transformers do not clamp at it, others do
        "layer_types": ["linear_attention", "mlp", "full_attention", "linear_attention", "mlp", "mlp"],
        "num_hidden_layers": 6,
    }  # fmt: skip
    return t.NemotronHForCausalLM(t.NemotronHConfig(**SMALL, **HEADS, **sizes))


def _bamba() -> Any:
    return t.BambaForCausalLM(
        t.BambaConfig(**SMALL, **HEADS, **FOUR, **MAMBA, mamba_expand=2, attn_layer_indices=[1, 3])
    )


def _granitemoehybrid() -> Any:
    return t.GraniteMoeHybridForCausalLM(
        t.GraniteMoeHybridConfig(
            **SMALL,
            **HEADS,
            **FOUR,
            **MAMBA,
            mamba_expand=2,
            layer_types=["mamba", "attention"] * 2,
            num_local_experts=0,
            num_experts_per_tok=0,
            shared_intermediate_size=48,
            logits_scaling=2.0,
            embedding_multiplier=3.0,
            residual_multiplier=0.5,
            position_embedding_type="rope",
        )
    )


def _falcon_h1() -> Any:
    return t.FalconH1ForCausalLM(
        t.FalconH1Config(
            **SMALL,
            **HEADS,
            **FOUR,
            **MAMBA,
            mamba_d_ssm=64,
            embedding_multiplier=2.0,
            lm_head_multiplier=0.5,
        )
    )


JET: dict[str, Any] = {
    "num_heads": 2, "head_dim": 6, "expand_v": 1.3333333334, "conv_size": 4, "dconv_generator_reduction": 4,
    "norm_eps": "1e-5", "mode": "chunk", "dconv_implementation": "triton",
}  # fmt: skip


def _jet_nemotron() -> Any:
    sizes = {
        "layer_types": ["jet", "attn", "jet", "swa"], "bos_token_id": None, "eos_token_id": None,
        "efficient_attention_config": {"jet": JET, "swa": {"window_size": 4}},
    }  # fmt: skip
    return JetNemotronForCausalLM(JetNemotronConfig(**SMALL, **HEADS, **FOUR, **sizes))


def _llama() -> Any:
    return t.LlamaForCausalLM(t.LlamaConfig(**SMALL, **HEADS, **FOUR))


def _qwen3() -> Any:
    sliding = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2, "head_dim": 16}
    return t.Qwen3ForCausalLM(t.Qwen3Config(**SMALL, **HEADS, **FOUR, **sliding))


def _ouro() -> Any:
    return OuroForCausalLM(
        OuroConfig(**SMALL, **FOUR, num_attention_heads=4, bos_token_id=None, eos_token_id=None)
    )


def _jamba() -> Any:
    return t.JambaForCausalLM(
        t.JambaConfig(
            **SMALL,
            **HEADS,
            **FOUR,
            num_experts=1,
            num_experts_per_tok=1,
            mamba_d_state=8,
            attn_layer_period=2,
            attn_layer_offset=1,
        )
    )


def with_memory(model: Any, n: int, kind: Any) -> Any:
    """The model with memory layers that say something."""
    for i in insert_memory_layers(model, n, kind).after:
        mixer = model.model.layers[i].memory.mixer
        if kind == "jet":
            torch.nn.init.normal_(mixer.o_proj.weight, std=0.1)
        else:
            torch.nn.init.ones_(mixer.gate)
    return model


def _llama_with_jet() -> Any:
    return with_memory(_llama(), 2, "jet")


def _ouro_with_gated_delta_net() -> Any:
    model = with_memory(_ouro(), 4, "gated_delta_net")
    model.config.total_ut_steps = 1
    return model


FAMILIES = {
    f.__name__[1:]: f
    for f in (
        _qwen3_5,
        _qwen3_next,
        _olmo_hybrid,
        _kimi_linear,
        _nemotron_h,
        _bamba,
        _granitemoehybrid,
        _falcon_h1,
        _jet_nemotron,
        _llama_with_jet,
        _ouro_with_gated_delta_net,
    )
}
ATTENTION_ONLY = {f.__name__[1:]: f for f in (_llama, _qwen3, _ouro)}


def family(name: str, seed: int = 0) -> Any:
    """A tiny model whose answers depend on S: larger weights, slow forgetting."""
    torch.manual_seed(seed)
    return remembering({**FAMILIES, **ATTENTION_ONLY, "jamba": _jamba}[name]().eval())


def remembering(model: Any) -> Any:
    """The model with weights by which its answers depend on S."""
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("A_log"):
                p.fill_(-3.0)
            elif key.endswith("dt_bias"):
                p.fill_(1.0)
            elif "mamba.in_proj" in key or "mixer.in_proj" in key:
                p.mul_(16.0)
            elif p.ndim == 2 and "norm" not in key:
                p.mul_(3.0)
    return model


class TurnsUnknown(torch.nn.Module):
    """Rotary positions that do not say by which angles they turn."""

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.own = rotary

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.own(*args, **options)


def held(out):
    """The cache in an output of transformers, under the name of its version."""
    return getattr(out, cache_name())


def _windowed(kind: str, **more: Any) -> Any:
    """A model with attention alone, of which some or all blocks have a window of the model's own."""
    config = getattr(t, f"{kind}Config")(**SMALL, **HEADS, **FOUR, sliding_window=5, **more)
    return getattr(t, f"{kind}ForCausalLM")(config)


MOE: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1}
# Some say in each block whether it slides, some only in the configuration; some cap or scale logits.
WINDOWED: dict[str, dict[str, Any]] = {
    "Mistral": {}, "Mixtral": MOE, "Phi3": {}, "Starcoder2": {}, "Ministral": {"head_dim": 8},
    "SmolLM3": {"use_sliding_window": True, "bos_token_id": None, "eos_token_id": None},
    "Exaone4": {"head_dim": 8}, "Qwen2": {"use_sliding_window": True, "max_window_layers": 2},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 0.5}, "Cohere2": {"logit_scale": 0.25},
    "GptOss": {**MOE, "head_dim": 8},
}  # fmt: skip


def windowed(kind: str) -> Any:
    """A tiny model of `WINDOWED` with memory layers, whose window shows."""
    torch.manual_seed(0)
    model = _windowed(kind, **WINDOWED[kind]).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(3.0)
    return with_memory(model, 2, "gated_delta_net")


NO_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
# Models with attention alone by how their positions turn keys, in which of the four blocks.
_TURNING: dict[str, tuple[tuple[str | None, ...], dict[str, Any]]] = {
    "Llama": (4 * ("halves",), {"rope_parameters": YARN}),
    "Phi": (4 * ("halves",), {}),  # half of a head
    "Glm": (4 * ("pairs",), {**NO_TOKENS, "head_dim": 8}),  # half of a head
    "Cohere": (4 * ("pairs",), NO_TOKENS),
    "SmolLM3": ((*3 * ("halves",), None), NO_TOKENS),
    "GptOss": (4 * ("halves",), {**MOE, "head_dim": 8}),  # its tables are half as wide; attends eagerly
}  # fmt: skip
TURNING = {kind: way for kind, (way, _) in _TURNING.items()}


def turning(kind: str) -> Any:
    """A tiny model of `TURNING`."""
    torch.manual_seed(0)
    config = getattr(t, f"{kind}Config")(**SMALL, **HEADS, **FOUR, **_TURNING[kind][1])
    return remembering(getattr(t, f"{kind}ForCausalLM")(config).eval())


def tiny_llama_of_bytes(folder, *, layers=0, **sizes):
    """Write a tiny Llama and its tokenizer of bytes, which ends a text with `</s>`; return the folder."""
    words = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    model = t.LlamaForCausalLM(t.LlamaConfig(**{**SMALL, "vocab_size": len(words)}, **HEADS, **sizes))
    if layers:
        insert_memory_layers(model, layers)
    model.save_pretrained(folder)
    t.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>").save_pretrained(folder)
    return folder
