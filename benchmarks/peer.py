"""What lmsleep is compared with: the same model of transformers' modules, and the simplest sleep."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from lmsleep import HybridLM
from lmsleep.layers import Attention, FastWeights


class _Memory:
    """The cache that `Qwen3_5GatedDeltaNet` asks for: S in, S out, and a convolution that starts afresh."""

    def __init__(self, S: Tensor | None) -> None:
        self.S = S

    def get_conv_state(self, *_: Any, **__: Any) -> None:
        return None

    def get_recurrent_state(self, *_: Any, **__: Any) -> Tensor | None:
        return self.S

    def update_conv_state(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x

    def update_recurrent_state(self, S: Tensor, *_: Any) -> None:
        self.S = S


class Block(nn.Module):
    """A decoder block of one kind, with the weights of ours."""

    def __init__(self, block: Any, llama: LlamaConfig, qwen: Qwen3_5TextConfig) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (
            LlamaRMSNorm(llama.hidden_size, eps=llama.rms_norm_eps) for _ in range(2)
        )
        self.input_layernorm.load_state_dict(block.norm.state_dict())
        self.post_attention_layernorm.load_state_dict(block.mlp_norm.state_dict())
        self.mlp = LlamaMLP(llama)
        self.mlp.load_state_dict(block.mlp.state_dict())
        self.mixer: nn.Module
        if isinstance(block.mixer, Attention):
            self.mixer = LlamaAttention(llama, 0)
            self.mixer.load_state_dict(block.mixer.state_dict())
        else:
            self.mixer = Qwen3_5GatedDeltaNet(qwen, 0)
            self.mixer.load_state_dict(_delta_net(block.mixer))

    def forward(
        self, h: Tensor, S: Tensor | None, positions: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Map `h` `[B, T, d]` and the block's own S to the next ones."""
        x, memory = self.input_layernorm(h), _Memory(S)
        if isinstance(self.mixer, LlamaAttention):
            h = h + self.mixer(x, positions)[0]
        else:
            # By place: its name is another from transformers 5.24 on.
            h = h + self.mixer(x, memory)
        return h + self.mlp(self.post_attention_layernorm(h)), memory.S


def _delta_net(mixer: FastWeights) -> dict[str, Tensor]:
    """Copy our fast-weight layer to transformers' names (which have no bias on beta: leave it zero)."""
    own = mixer.state_dict()
    same = {name: own[name] for name in ("A_log", "dt_bias", "norm.weight")}
    return same | {
        "in_proj_qkv.weight": torch.cat([own[f"{x}_proj.weight"] for x in "qkv"]),
        "conv1d.weight": own["conv"][:, None],
        "in_proj_z.weight": own["g_proj.weight"],
        "in_proj_b.weight": own["b_proj.weight"],
        "in_proj_a.weight": own["a_proj.weight"],
        "out_proj.weight": own["o_proj.weight"],
    }


class Composed(nn.Module):
    """The hybrid `model` (attention and gated delta net, hard eviction), with its weights."""

    def __init__(self, model: HybridLM) -> None:
        super().__init__()
        c = model.config
        llama = LlamaConfig(
            hidden_size=c.d_model,
            intermediate_size=c.hidden_dim,
            num_attention_heads=c.num_heads,
            rms_norm_eps=c.norm_eps,
            attn_implementation="sdpa",
        )
        qwen = Qwen3_5TextConfig(
            hidden_size=c.d_model,
            linear_num_key_heads=c.num_heads,
            linear_num_value_heads=c.num_heads,
            linear_key_head_dim=c.key_dim,
            linear_value_head_dim=c.value_dim or c.key_dim,
            linear_conv_kernel_dim=c.conv_size,
            rms_norm_eps=c.norm_eps,
            layer_types=["linear_attention"],
            num_hidden_layers=1,
        )
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        self.embedding.load_state_dict(model.embedding.state_dict())
        self.blocks = nn.ModuleList(Block(block, llama, qwen) for block in model.blocks)
        self.rotary = LlamaRotaryEmbedding(llama)
        self.norm = LlamaRMSNorm(c.d_model, eps=c.norm_eps)
        self.norm.load_state_dict(model.norm.state_dict())
        self.lm_head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        self.lm_head.load_state_dict(model.lm_head.state_dict())

    def loss(self, tokens: Tensor, loss_mask: Tensor, window: int, passes: int) -> Tensor:
        """Run Algorithm 1; return the mean cross entropy (nats) of the marked tokens of the last window."""
        windows = tokens[:, :-1].split(window, dim=1)
        memory: list[Tensor | None] = [None] * len(self.blocks)
        for i, x in enumerate(windows):
            h = self.embedding(x)
            positions = self.rotary(h, torch.arange(x.shape[1], device=x.device)[None])
            for _ in range(passes if i + 1 < len(windows) else 1):
                for j, block in enumerate(self.blocks):
                    h, memory[j] = cast(Block, block)(h, memory[j], positions)
        marked = loss_mask[:, 1:].split(window, dim=1)[-1]
        targets = tokens[:, 1:].split(window, dim=1)[-1]
        return F.cross_entropy(self.lm_head(self.norm(h[marked])), targets[marked])
