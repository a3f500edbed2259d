"""Tiny GGUF files: a Llama of `transformers` in the names, row order and types that llama.cpp writes."""

import gguf
import numpy as np
import torch

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MERGES = ["Ġ t", "h e", "Ġt he"]
# A word for every token that the tiny model knows: marks, letters, blanks, and what merges make.
WORDS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ċ", "Ġ"),
    *map(chr, range(ord("a"), ord("z") + 1)),
    *"ABCDEFGHIJKLMNOPQRST.,?'0123",
    *(merge.replace(" ", "") for merge in MERGES),
]
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip
HALF = gguf.GGMLQuantizationType.Q8_0


def name_in_file(name: str) -> str:
    """The name that llama.cpp gives a tensor of `transformers`."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name.replace("model.layers", "blk")


def quantised(name: str, weight: np.ndarray) -> bool:
    """Whether the file holds a tensor in 8 bits: matrices of the blocks whose rows are whole groups of 32."""
    return weight.ndim == 2 and ".layers." in name and weight.shape[1] % 32 == 0


def dequantised(model) -> dict[str, torch.Tensor]:
    """The tensors of a model as they come back out of its file."""
    found = {}
    for name, p in model.state_dict().items():
        weight = p.numpy()
        if quantised(name, weight):
            weight = gguf.dequantize(gguf.quantize(weight, HALF), HALF)
        found[name] = torch.from_numpy(weight)
    return found


def write(path, model, *, tokenizer=True, architecture="llama", files=1, without=(), beside=()):
    """Write the Llama `model` to `path`, as one of `files`; without some tensors, or with others beside."""
    config, file = model.config, gguf.GGUFWriter(path, architecture)
    file.add_name("Tiny")
    file.add_uint16("split.count", files)
    file.add_license("apache-2.0")
    file.add_block_count(config.num_hidden_layers)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(config.rope_parameters["rope_theta"])
    file.add_rope_dimension_count(config.head_dim)
    file.add_vocab_size(config.vocab_size)
    if tokenizer:
        file.add_tokenizer_model("gpt2")
        file.add_tokenizer_pre("gpt-2")
        file.add_token_list(WORDS)
        file.add_token_types([3] * 3 + [1] * (len(WORDS) - 3))  # 3: a mark, 1: text
        file.add_token_merges(MERGES)
        file.add_eos_token_id(2)
        file.add_add_bos_token(False)
        file.add_chat_template(TEMPLATE)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, p in model.state_dict().items():
        weight = p.numpy()
        if n := next((n for part, n in heads.items() if part in name), None):
            # llama.cpp rotates neighbours, transformers the halves of a head.
            rows = weight.reshape(n, 2, config.head_dim // 2, -1)
            weight = np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(weight.shape)
        if name_in_file(name) in without:
            continue
        if quantised(name, weight):
            file.add_tensor(name_in_file(name), gguf.quantize(weight, HALF), raw_dtype=HALF)
        else:
            file.add_tensor(name_in_file(name), weight)
    for name in beside:
        file.add_tensor(name, np.ones(4, dtype=np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path
