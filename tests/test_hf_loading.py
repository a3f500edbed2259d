import json
import shutil

import pytest
import torch
from conftest import run_command
from hf_models import FAMILIES, family
from safetensors.torch import load_file, save_file

from lmsleep import Session, SleepConfig, adapt
from lmsleep.cli.opening import SleepOptions, new_session
from lmsleep.hf import load_pretrained


@pytest.fixture
def folder(tmp_path):
    family("qwen3_5").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def tokenizer(folder, size):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_model_is_loaded(name, tmp_path):
    model = family(name)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    again, x = load_pretrained(tmp_path), torch.arange(1, 9)[None]
    assert type(again) is type(model) and not again.training
    assert torch.equal(again(x).logits, model(x).logits)


def test_dtype_and_attention_are_as_asked(folder):
    assert load_pretrained(folder).dtype == torch.float32
    model = load_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"


def test_a_folder_that_holds_no_model_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"elsewhere holds no model: config\.json is missing$"):
        load_pretrained(tmp_path / "elsewhere")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="adapter; name its base model"):
        load_pretrained(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json is no JSON"),
        ("[]", r"config\.json is no JSON object"),
        ("{}", "model_type is missing"),
        ('{"model_type": "perceptron"}', "model_type='perceptron' cannot be configured"),
        ('{"model_type": "vit"}', "model_type='vit' is no causal language model"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "model_type='llama' cannot.*hidden_size"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


def test_weights_that_do_not_fit_the_config_are_refused(folder):
    file, kept = folder / "model.safetensors", folder.parent / "kept"
    shutil.copy(file, kept)
    tensors = load_file(file)
    norm = "model.layers.0.input_layernorm.weight"
    save_file({k: v for k, v in tensors.items() if k != norm}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"the weights lack {norm}"):
        load_pretrained(folder)
    save_file({**tensors, "model.layers.9.w": torch.ones(2)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights hold model\.layers\.9\.w"):
        load_pretrained(folder)
    save_file({**tensors, norm: torch.ones(31)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"shapes contradict.*{norm} \(31,\) instead of \(32,\)"):
        load_pretrained(folder)
    shutil.copy(kept, file)
    edit(folder / "config.json", intermediate_size=47)
    with pytest.raises(ValueError, match=r"shapes contradict.* and 7 more$"):
        load_pretrained(folder)
    file.write_bytes(kept.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_pretrained(folder)


def test_a_sharded_checkpoint_with_a_missing_shard_is_refused(folder):
    load_pretrained(folder).save_pretrained(folder, max_shard_size="50KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shard = next(s for s in index.values() if "00002" in s)
    (folder / shard).rename(folder / "away")
    with pytest.raises(FileNotFoundError, match=rf"{shard} named by .*index\.json is missing; copy all"):
        load_pretrained(folder)
    (folder / "away").rename(folder / shard)
    edit(folder / "model.safetensors.index.json", weight_map={**index, "model.more": shard})
    with pytest.raises(ValueError, match=rf"{shard} lacks model\.more"):
        load_pretrained(folder)
    edit(folder / "model.safetensors.index.json", weight_map={})
    with pytest.raises(ValueError, match="weight_map is missing"):
        load_pretrained(folder)


def test_a_tokenizer_of_another_model_is_refused(folder):
    tokenizer(folder, 64)
    load_pretrained(folder)
    tokenizer(folder, 65)
    with pytest.raises(ValueError, match=r"tokenizer has 65 tokens, the model \(vocab_size .*\) only 64"):
        load_pretrained(folder)
    tokenizer(folder, 0)
    with pytest.raises(ValueError, match="tokenizer has no tokens"):
        load_pretrained(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="no tokenizer that transformers can load"):
        load_pretrained(folder)


def test_commands_take_the_folder_of_a_pretrained_model(folder, capsys):
    with pytest.raises(ValueError, match=r"tokenizer has 256 tokens, .* only 64"):
        new_session(folder, SleepOptions(tokenizer="bytes"))
    with pytest.raises(ValueError, match="holds no tokenizer"):
        new_session(folder, SleepOptions())
    tokenizer(folder, 64)
    session = new_session(folder, SleepOptions(window=4, passes=2))
    wanted = Session(adapt(family("qwen3_5")), SleepConfig(window=4, passes=2, loop="middle"))
    assert session.generate("w1 w2 w3", 9) == " ".join(f"w{i}" for i in wanted.generate([1, 2, 3], 9))
    (folder / "model.safetensors").unlink()
    code, _, err = run_command(capsys, "probe", folder, "--text", folder / "config.json")
    assert code == 2 and "holds no weights" in err and len(err.splitlines()) == 1
