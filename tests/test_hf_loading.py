import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import run_command
from hf_models import FAMILIES, FOUR, HEADS, SMALL, family
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lmsleep import Session, SleepConfig, adapt
from lmsleep.cli.opening import SleepOptions, new_session
from lmsleep.evaluation.cost import on_meta
from lmsleep.hf import insert_memory_layers, load_pretrained
from lmsleep.session import BrokenSleep


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


def test_a_family_of_our_own_is_imported_with_its_folder_and_no_other(tmp_path):
    for name in ("qwen3_5", "jet_nemotron", "ouro"):
        family(name).save_pretrained(tmp_path / name)
    code = (
        "import sys, lmsleep.hf as hf, lmsleep.hf.loading as loading\n"
        "for folder in sys.argv[1:]:\n"
        "    hf.load_pretrained(folder)\n"
        "    print(*(m for m in loading.FAMILIES if loading.FAMILIES[m] in sys.modules))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, "qwen3_5", "jet_nemotron", "ouro"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ["", "jet_nemotron", "jet_nemotron ouro"]


def test_dtype_and_attention_are_as_asked(folder):
    assert load_pretrained(folder).dtype == torch.float32
    model = load_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"


def test_a_folder_that_holds_no_model_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder \S+elsewhere; .*, smollm2$"):
        load_pretrained(tmp_path / "elsewhere")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="adapter of peft: lmsleep convert MODEL OUT --adapter"):
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


def test_a_tokenizer_may_be_larger_than_its_model(folder, tmp_path, capsys):
    tokenizer(folder, 66)  # as of Gemma 3 and CodeLlama
    session = new_session(folder, SleepOptions(window=4, passes=2))
    session.read("w1 w2 w63")
    with pytest.raises(ValueError, match=r"0 \.\.\. 63, got 65: 'w65', which this model does not know"):
        session.read("w3 w65")
    book, told = tmp_path / "book.txt", "got 64: 'w64', which this model does not know"
    book.write_text("w1 w2 w3 w64 " * 90)
    for command in (
        ["read", folder, book, "--memory", tmp_path / "a.mem"],
        ["probe", folder, "--text", book, "--window", 60],
        ["inspect", folder, "--file", book],
    ):
        code, _, err = run_command(capsys, *command)
        assert code == 2 and told in err and err.count("\n") == 1, err
    train = ["finetune", folder, "--task", "text", "--data", book, "--length", 8, "--out", tmp_path / "run"]
    for command in (["eval", folder, "--data", book, "--length", 8], train):
        code, _, err = run_command(capsys, *command)
        assert code == 2 and "holds token 64 ('w64')" in err and err.count("\n") == 1, err
    book.write_text("w1 w2 w3 w63 " * 90)
    code, _, err = run_command(capsys, "eval", folder, "--data", book, "--length", 8, "--batches", 1)
    assert code == 0, err


def test_a_tokenizer_that_is_none_is_refused(folder):
    tokenizer(folder, 0)
    with pytest.raises(ValueError, match="no tokens"):
        load_pretrained(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="no tokenizer that transformers can load"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    "given",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        {"quant_method": "torchao"},
        {},
        "gptq",
        [4],
    ],
)
def test_quantised_folders_are_refused_in_one_line(given, folder, capsys):
    edit(folder / "config.json", quantization_config=given)
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_code_in_a_folder_is_never_run(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    for name in ("mine.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("raise SystemExit('was run')")
    own = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M", "AutoTokenizer": ["mine.T", "mine.T"]}
    edit(folder / "config.json", auto_map=own)
    tokenizer(folder, 64)
    for options in ({}, {"trust_remote_code": True}):
        assert type(load_pretrained(folder, **options)).__name__ == "Qwen3_5ForCausalLM"
    edit(folder / "tokenizer_config.json", auto_map=own, tokenizer_class="T")
    load_pretrained(folder, trust_remote_code=True)  # of this family transformers knows better
    edit(folder / "config.json", model_type="jet_nemotron")
    with pytest.raises(ValueError):
        load_pretrained(folder, trust_remote_code=True)


VALUES = [None, True, 0, -1, 10**20, 0.5, float("nan"), "", "x", [], [1], [[]], {}, {"a": []}]


def places(value, path=()):
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*path, key))


def usable(folder):
    """Use a folder; an error must be one line of a kind that commands catch."""
    try:
        session = new_session(folder, SleepOptions(window=4, passes=2, device="cpu"))
        session.read("w1 w2 w3")
        session.generate("w4", 3)
    except (ValueError, OSError, BrokenSleep) as error:
        assert str(error) and "\n" not in str(error)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "model"
    family("qwen3_5").save_pretrained(folder, max_shard_size="50KB")
    tokenizer(folder, 64)
    return folder


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        *(("model.safetensors.index.json", {"weight_map": v}) for v in (1, "x", [1], {"a": 1}, {"a": True})),
        *(("model.safetensors.index.json", {"weight_map": {"a": v}}) for v in ([], None, "../x", "/x", "")),
        ("config.json", {"rope_parameters": {"rope_type": []}}),
        ("config.json", {"rope_scaling": {"rope_type": []}}),
        *(("config.json", {"dtype": v}) for v in (1, "x", [])),
        *(("config.json", {"layer_types": v}) for v in (1, "x", ["new"] * 4)),
        *(("config.json", {"hidden_act": v}) for v in (1, [], "x")),
        ("config.json", {"num_attention_heads": 0}),
        ("config.json", {"architectures": 1}),
        *(("tokenizer_config.json", {"model_max_length": v}) for v in ("", [], None)),
        *(("tokenizer_config.json", {"auto_map": v}) for v in (1, [], {"AutoTokenizer": 1})),
        *(("tokenizer_config.json", {"tokenizer_class": v}) for v in (1, [], "")),
        *(("tokenizer.json", {"model": v}) for v in (1, {}, {"type": "BPE"})),
        *(("generation_config.json", {"eos_token_id": v}) for v in ("x", [None], 10**30)),
        *(("generation_config.json", {"temperature": v}) for v in ("x", [])),
    ],
)
def test_fields_of_other_types_are_refused_in_one_line(file, fields, whole, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    edit(folder / file, **fields)
    usable(folder)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_mutated_folders_load_or_are_refused_in_one_line(data, whole):
    file = data.draw(st.sampled_from(sorted(whole.glob("*.json"))))
    fields = before = json.loads(file.read_text())
    text = file.read_text()
    *way, last = data.draw(st.sampled_from([path for path in places(before) if 0 < len(path) < 4]))
    for key in way:
        fields = fields[key]
    if data.draw(st.integers(0, 9)):
        fields[last] = data.draw(st.sampled_from(VALUES))
    else:
        del fields[last]
    try:
        file.write_text(json.dumps(before))
        usable(whole)
    finally:
        file.write_text(text)


def test_commands_print_no_warning_of_a_library(folder, tmp_path):
    tokenizer(folder, 64)
    edit(folder / "config.json", rope_scaling={"rope_type": "unheard-of"})
    (tmp_path / "book.txt").write_text("w1 w2 w3")
    (folder / "model.safetensors").rename(tmp_path / "away")
    argv = ["read", folder, tmp_path / "book.txt", "--memory", tmp_path / "a.mem"]
    done = subprocess.run(
        [sys.executable, "-m", "lmsleep", *map(str, argv)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout, done.stderr


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


def test_info_counts_tied_weights_once(tmp_path, capsys):
    model = LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS, **FOUR, tie_word_embeddings=True))
    insert_memory_layers(model, 2)
    model.save_pretrained(tmp_path / "model")
    code, out, err = run_command(capsys, "info", tmp_path / "model", "--json")
    assert code == 0 and json.loads(out)["parameters"] == model.num_parameters(), err
    tied = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.ModuleList([nn.Linear(4, 4)])})
    tied["b"][0].weight = tied["a"].weight
    assert sum(p.numel() for p in on_meta(tied).parameters()) == 24 and tied["a"].weight.is_meta
