"""Tiny GGUF files of models of `transformers`, in the names, row order and types that llama.cpp writes."""

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
    *"ABCDEFGHIJKLMNOPQRST.,?'012345",
    *(merge.replace(" ", "") for merge in MERGES),
]
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip
HYBRID = {
    "linear_attn.in_proj_qkv": "attn_qkv", "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha", "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.conv1d": "ssm_conv1d", "linear_attn.norm": "ssm_norm", "linear_attn.out_proj": "ssm_out",
    "linear_attn.A_log": "ssm_a", "linear_attn.dt_bias": "ssm_dt.bias",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    **NAMES, "post_attention_layernorm": "post_attention_norm",
}  # fmt: skip
HALF = gguf.GGMLQuantizationType.Q8_0


def name_in_file(name: str, names=NAMES) -> str:
    """The name that llama.cpp gives a tensor of `transformers`."""
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name.replace("model.layers", "blk")


def quantised(name: str, weight: np.ndarray) -> bool:
    """Whether the file holds a tensor in few bits: matrices of the blocks with rows of whole groups of 32."""
    return weight.ndim == 2 and ".layers." in name and weight.shape[1] % 32 == 0


def dequantised(model, kind=HALF) -> dict[str, torch.Tensor]:
    """The tensors of a model as they come back out of its file."""
    found = {}
    for name, p in model.state_dict().items():
        weight = p.numpy()
        if quantised(name, weight):
            weight = gguf.dequantize(gguf.quantize(weight, kind), kind)
        found[name] = torch.from_numpy(weight)
    return found


def write(
    path,
    model,
    *,
    tokenizer=True,
    architecture="llama",
    kind=HALF,
    files=1,
    without=(),
    beside=(),
    scaling=None,
):
    """Write the Llama `model` to `path`, as one of `files`; without some tensors, or with others beside."""
    config, file = model.config, gguf.GGUFWriter(path, architecture)
    file.add_uint16("split.count", files)
    if scaling is not None:
        file.add_string(f"{architecture}.rope.scaling.type", scaling)
    _sizes(file, config)
    file.add_vocab_size(config.vocab_size)
    if tokenizer:
        _words(file)
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
            file.add_tensor(name_in_file(name), gguf.quantize(weight, kind), raw_dtype=kind)
        else:
            file.add_tensor(name_in_file(name), weight)
    for name in beside:
        file.add_tensor(name, np.ones(4, dtype=np.float32))
    return _written(file, path)


def write_hybrid(path, model):
    """Write a Qwen3.5 with as many key as value heads, unquantised, to `path`."""
    config, file = model.config, gguf.GGUFWriter(path, "qwen35")
    _sizes(file, config)
    file.add_key_length(config.head_dim)
    file.add_full_attention_interval(config.layer_types.index("full_attention") + 1)
    file.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    file.add_ssm_state_size(config.linear_key_head_dim)
    file.add_ssm_group_count(config.linear_num_key_heads)
    file.add_ssm_time_step_rank(config.linear_num_value_heads)
    file.add_ssm_inner_size(config.linear_num_value_heads * config.linear_value_head_dim)
    file.add_rope_dimension_sections([*config.rope_parameters["mrope_section"], 0])
    _words(file)
    for name, p in model.state_dict().items():
        if name.endswith("norm.weight") and "linear_attn" not in name:
            p = p + 1
        elif name.endswith("A_log"):
            p = -p.exp()
        elif name.endswith("conv1d.weight"):
            p = p.squeeze(1)
        file.add_tensor(name_in_file(name, HYBRID), p.numpy())
    return _written(file, path)


def _sizes(file, config):
    """What both families have."""
    file.add_name("Tiny")
    file.add_license("apache-2.0")
    file.add_block_count(config.num_hidden_layers)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(config.rope_parameters["rope_theta"])
    turned = config.rope_parameters.get("partial_rotary_factor", 1.0)
    file.add_rope_dimension_count(int(config.head_dim * turned))


def _words(file):
    """The tokenizer and the chat template."""
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("gpt-2")
    file.add_token_list(WORDS)
    file.add_token_types([3] * 3 + [1] * (len(WORDS) - 3))  # 3: a mark, 1: text
    file.add_token_merges(MERGES)
    file.add_eos_token_id(2)
    file.add_add_bos_token(False)
    file.add_chat_template(TEMPLATE)


def _written(file, path):
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path
