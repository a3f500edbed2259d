"""Ouro, the looped language model (arXiv 2510.25741), for current `transformers`, in its published layout.

Attention, MLP and rotary positions are those of Llama. The same blocks are run `total_ut_steps` times; the
final norm follows every step, and its output goes into the next one.
"""

import copy
from typing import Any, Self

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from lmsleep.hf.cache import cache_layers
from lmsleep.hf.cache_name import cache_name, named

LAYERS = {"1.4B": 24, "2.6B": 48}


@strict
class OuroConfig(LlamaConfig):
    """The configuration of Ouro, which reads the published config.json.

    Attributes:
        total_ut_steps: how often the blocks are run. `lmsleep.adapt` wants 1: one pass while awake.
        early_exit_threshold: a token's output is that of the first step at which the probability to have left
            (by `early_exit_gate`) reaches it; 1: of the last step.
    """

    model_type = "ouro"

    vocab_size: int = 49152
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    max_position_embeddings: int = 65536
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    total_ut_steps: int = 4
    early_exit_threshold: float | int = 1.0

    @classmethod
    def preset(cls, size: str, **changes: Any) -> Self:
        """Return the published configuration of that size, "1.4B" or "2.6B", with changes.

        Raises:
            ValueError: for another size.
        """
        if size not in LAYERS:
            raise ValueError(f"size={size!r} is no size of Ouro; choose one of {', '.join(LAYERS)}")
        return cls(**{"rope_theta": 1e6, "num_hidden_layers": LAYERS[size], **changes})

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the loop."""
        super().__post_init__(**kwargs)
        if self.total_ut_steps < 1:
            raise ValueError(f"total_ut_steps={self.total_ut_steps} must be at least 1")


class OuroDecoderLayer(LlamaDecoderLayer):
    """A block of Llama with norms after its attention and its MLP too."""

    def __init__(self, config: OuroConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.input_layernorm_2 = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm_2 = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Map `h` `[B, T, d]` to the same shape; options are those of `LlamaDecoderLayer.forward`."""
        h, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        h = hidden_states + self.input_layernorm_2(h)
        out: Tensor = h + self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(h)))
        return out


class OuroModel(LlamaModel):
    """The decoder: blocks and final norm, looped."""

    config: OuroConfig
    _no_split_modules = ("OuroDecoderLayer",)

    def __init__(self, config: OuroConfig) -> None:
        # Past LlamaModel's own, which would make layers of Llama first.
        super(LlamaModel, self).__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(OuroDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.early_exit_gate = nn.Linear(config.hidden_size, 1)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run as `LlamaModel.forward`; step t of D layers has places `t D ... (t + 1) D - 1` of the cache."""
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        whole = kwargs.pop(cache_name(), None)
        if use_cache and whole is None:
            whole = DynamicCache()
        states: list[Tensor] = []
        for cache in self._steps(whole):
            out = super().forward(
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=h,
                use_cache=use_cache,
                **named(cache),
                **kwargs,
            )
            h = out.last_hidden_state
            states.append(h)
        out.last_hidden_state = self._left(states)
        setattr(out, cache_name(), whole)
        return out

    def _steps(self, cache: Any) -> list[Any]:
        """Yield what each step sees of the cache: layers of its own."""
        steps = self.config.total_ut_steps
        if cache is None:
            return [None] * steps
        size = len(cache_layers(self.config))
        for step in range(len(cache.layers) // size, steps):
            cache.layers[step * size :] = cache_layers(self.config)
        # Shallow copies share the layers' tensors, so what a step writes is in the one cache.
        views = [copy.copy(cache) for _ in range(steps)]
        for step, view in enumerate(views):
            view.layers = cache.layers[step * size : (step + 1) * size]
        return views

    def _left(self, states: list[Tensor]) -> Tensor:
        """Choose for every token the state of the step at which it leaves the loop."""
        threshold = self.config.early_exit_threshold
        if threshold >= 1 or len(states) == 1:
            return states[-1]
        h = torch.stack(states)  # [steps, B, T, d]
        # sigmoid(-x) = 1 - sigmoid(x): the probability to stay at each step; their product, to be still
        # there.
        stays = (-self.early_exit_gate(h[:-1]).float()).sigmoid().cumprod(dim=0)
        # Steps at which too few have left, counted: the number of the step that a token leaves at.
        step = (1 - stays < threshold).sum(dim=0)[None].expand(1, *h.shape[1:])
        return h.gather(0, step)[0]


class OuroForCausalLM(LlamaForCausalLM):
    """Ouro with its head. With labels, the loss is the cross entropy of the output, not of all steps."""

    config: OuroConfig
    _no_split_modules = ("OuroDecoderLayer",)

    def __init__(self, config: OuroConfig) -> None:
        # Past LlamaForCausalLM's own, which would make a model of Llama first.
        super(LlamaForCausalLM, self).__init__(config)
        self.model = OuroModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register(OuroConfig.model_type, OuroConfig)
AutoModelForCausalLM.register(OuroConfig, OuroForCausalLM)
