"""Jet-Nemotron (arXiv 2508.15884) for current `transformers`, in the layout of the published checkpoints.

Attention, MLP and rotary positions are those of Qwen2, which the model was made from. The published weights
are licensed for non-commercial use only.
"""

from dataclasses import field
from typing import Any, Self

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.masking_utils import (
    create_causal_mask,
    create_recurrent_attention_mask,
    create_sliding_window_causal_mask,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

from lmsleep.hf.cache import through_cache
from lmsleep.hf.cache_name import cache_name, named
from lmsleep.layers import JetBlock

LAYER_TYPES = {"jet": "linear_attention", "attn": "full_attention", "swa": "sliding_attention"}
PUBLISHED = {ours: theirs for theirs, ours in LAYER_TYPES.items()}


def _sizes(layers: int, attn: tuple[int, ...], swa: tuple[int, ...], **rest: Any) -> dict[str, Any]:
    kinds = ["attn" if i in attn else "swa" if i in swa else "jet" for i in range(layers)]
    return {"num_hidden_layers": layers, "layer_types": kinds, **rest}


def _efficient(heads: int, head_dim: int, expand_v: float, window: int) -> dict[str, dict[str, Any]]:
    jet = {
        "num_heads": heads, "head_dim": head_dim, "expand_v": expand_v, "conv_size": 4,
        "dconv_generator_reduction": 8, "norm_eps": "1e-5", "mode": "chunk", "dconv_implementation": "triton",
    }  # fmt: skip
    return {"jet": jet, "swa": {"window_size": window}}


PRESETS: dict[str, dict[str, Any]] = {
    "2B": _sizes(
        28, (14, 19), (20, 21), hidden_size=1536, intermediate_size=8960, num_attention_heads=12,
        max_position_embeddings=131072, efficient_attention_config=_efficient(12, 96, 2.6666666667, 1152),
    ),
    "4B": _sizes(
        36, (17, 20, 32), (5, 16, 19, 21, 22, 25, 27), hidden_size=2048, intermediate_size=11008,
        num_attention_heads=16, max_position_embeddings=32768,
        efficient_attention_config=_efficient(16, 128, 2.0, 2048),
    ),
}  # fmt: skip


@strict
class JetNemotronConfig(Qwen2Config):
    """The configuration of Jet-Nemotron, which reads and writes the fields of the published config.json.

    In memory, layers have the names of `transformers` (`LAYER_TYPES`); files have "jet", "attn" and "swa".

    Attributes:
        efficient_attention_config: sizes of the JetBlock ("jet") and the window ("swa").
    """

    model_type = "jet_nemotron"

    num_key_value_heads: int | None = 2
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643
    layer_types: list[str] = field(default_factory=lambda: PRESETS["2B"]["layer_types"])
    efficient_attention_config: dict[str, dict[str, Any]] = field(
        default_factory=lambda: PRESETS["2B"]["efficient_attention_config"]
    )

    @classmethod
    def preset(cls, size: str, **changes: Any) -> Self:
        """Return the published configuration of that size, "2B" or "4B", with changes.

        Raises:
            ValueError: for another size.
        """
        if size not in PRESETS:
            raise ValueError(f"size={size!r} is no size of Jet-Nemotron; choose one of {', '.join(PRESETS)}")
        return cls(**{"rope_theta": 1e6, **PRESETS[size], **changes})

    def __post_init__(self, **kwargs: Any) -> None:
        """Translate the published fields."""
        self.layer_types = [LAYER_TYPES.get(kind, kind) for kind in self.layer_types]
        if "sliding_attention" in self.layer_types:
            self.use_sliding_window = True
            self.sliding_window = self.efficient_attention_config["swa"]["window_size"]
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration with the published names of layers."""
        fields: dict[str, Any] = super().to_dict()
        fields["layer_types"] = [PUBLISHED.get(kind, kind) for kind in fields["layer_types"]]
        fields["rope_theta"] = self.rope_parameters["rope_theta"]
        return fields


class JetNemotronRMSNorm(nn.Module):
    """RMS norm whose weight multiplies before the cast back, unlike Qwen2's."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, h: Tensor) -> Tensor:
        """Normalise `h` `[..., d]`."""
        exact = torch.promote_types(h.dtype, torch.float32)
        x = h.to(exact)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight.to(exact) * x).to(h.dtype)


class JetNemotronDecoderLayer(Qwen2DecoderLayer):
    """A block of attention (full or sliding), or of a JetBlock."""

    def __init__(self, config: JetNemotronConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.layer_idx, self.attention_type = layer_idx, config.layer_types[layer_idx]
        self.input_layernorm = JetNemotronRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = JetNemotronRMSNorm(config.hidden_size, config.rms_norm_eps)
        if self.attention_type == "linear_attention":
            self.self_attn = jet_block(config.hidden_size, config.efficient_attention_config["jet"])

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Map `h` `[B, T, d]` to the same shape."""
        if self.attention_type != "linear_attention":
            h: Tensor = super().forward(hidden_states, attention_mask=attention_mask, **kwargs)
            return h
        x, cache = self.input_layernorm(hidden_states), kwargs.get(cache_name())
        h = hidden_states + through_cache(self.self_attn, x, cache, self.layer_idx, attention_mask)
        return h + self.mlp(self.post_attention_layernorm(h))


def jet_block(d_model: int, sizes: dict[str, Any]) -> JetBlock:
    """Make the JetBlock of a published configuration (`efficient_attention_config["jet"]`)."""
    return JetBlock(
        d_model,
        sizes["num_heads"],
        sizes["head_dim"],
        int(sizes["head_dim"] * sizes["expand_v"]),
        conv_size=sizes["conv_size"],
        reduction=sizes["dconv_generator_reduction"],
        norm_eps=float(sizes["norm_eps"]),  # a string in the published files
    )


class JetNemotronModel(Qwen2Model):
    """The decoder."""

    config: JetNemotronConfig
    _no_split_modules = ("JetNemotronDecoderLayer",)
    _is_stateful = True

    def __init__(self, config: JetNemotronConfig) -> None:
        # Past Qwen2Model's own, which would make layers of Qwen2 first.
        super(Qwen2Model, self).__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            JetNemotronDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = JetNemotronRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = Qwen2RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run as `Qwen2Model.forward` does, with a mask for each kind of layer."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        # A dict holds masks that are made already, as `generate` may do.
        if not isinstance(attention_mask, dict):
            asked = {
                "config": self.config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                **named(kwargs.get(cache_name())),
                "position_ids": position_ids,
            }
            attention_mask = {"linear_attention": create_recurrent_attention_mask(**asked)}
            if "full_attention" in self.config.layer_types:
                attention_mask["full_attention"] = create_causal_mask(**asked)
            if "sliding_attention" in self.config.layer_types:
                attention_mask["sliding_attention"] = create_sliding_window_causal_mask(**asked)
        return super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class JetNemotronForCausalLM(Qwen2ForCausalLM):
    """Jet-Nemotron with its head."""

    config: JetNemotronConfig
    _no_split_modules = ("JetNemotronDecoderLayer",)
    _is_stateful = True

    def __init__(self, config: JetNemotronConfig) -> None:
        # Past Qwen2ForCausalLM's own, which would make a model of Qwen2 first.
        super(Qwen2ForCausalLM, self).__init__(config)
        self.model = JetNemotronModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register(JetNemotronConfig.model_type, JetNemotronConfig)
AutoModelForCausalLM.register(JetNemotronConfig, JetNemotronForCausalLM)
