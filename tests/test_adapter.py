"""Adapters: what a model has beyond its base, saved and put on again."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import close, run_command
from hf_models import VOCAB, family
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from test_hf_loading import edit, tokenizer
from transformers import LlamaForCausalLM

import lmsleep
from lmsleep import Session, SleepConfig, adapt, shipped
from lmsleep.hf import from_pretrained, insert_memory_layers, load_adapter, load_pretrained, save_adapter
from lmsleep.hf.finetune import FineTune, merged, pretrained_backbone
from lmsleep.integrations.lm_eval import SleepLM
from lmsleep.memory import weights_fingerprint

SLEEP = SleepConfig(window=4, passes=2)
TOKENS = torch.arange(1, 12)[None]
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small llama with a tokenizer, as one finds it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    family("llama").save_pretrained(folder)
    tokenizer(folder, VOCAB)
    return folder


@torch.no_grad()
def stirred(model, seed=0):
    """The model after some training of whatever requires a gradient."""
    torch.manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.fixture(scope="module")
def tuned(base):
    """The backbone of that llama after training memory layers, and LoRA of rank 2 beside all its maps."""
    return stirred(pretrained_backbone(FineTune(folder=base, insert=2, lora=2, lora_alpha=4.0))).eval()


@pytest.fixture(scope="module")
def adapter(base, tuned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "tiny-sleeps"
    save_adapter(tuned, folder, base=base, sleep=SLEEP, dtype=torch.float32, about={"data": "one | two"})
    return folder


def test_memory_layers_and_lora_come_back_bit_for_bit(base, tuned, adapter):
    whole, again = merged(tuned, FineTune(folder=base, insert=2)).state_dict(), load_adapter(adapter)
    assert type(again).__name__ == "LlamaForCausalLM" and not again.training
    assert again.config.memory_layers == tuned.config.memory_layers
    assert whole.keys() == again.state_dict().keys()
    assert all(torch.equal(v, whole[k]) for k, v in again.state_dict().items())
    # What the base has is not stored: memory layers and factors alone.
    held = load_file(adapter / "adapter.safetensors")
    assert all(".memory." in name or name.endswith((".up", ".down")) for name in held)
    answers = [Session(adapt(m), SLEEP).generate([1, 2, 3], 9) for m in (tuned.model, again)]
    assert answers[0] == answers[1]


def test_in_bfloat16_it_is_the_same_to_rounding_and_half_the_size(base, tuned, tmp_path):
    kept = save_adapter(tuned, tmp_path / "kept", base=base, sleep=SLEEP, dtype=torch.float32)
    small = save_adapter(tuned, tmp_path / "small", base=base, sleep=SLEEP)
    assert kept.parameters == small.parameters and small.bytes < 0.55 * kept.bytes
    assert kept.lost < 1e-5 < small.lost < 2**-7
    one, two = (load_adapter(saved.folder) for saved in (kept, small))
    for name, value in one.state_dict().items():
        assert close(two.state_dict()[name], value, 2**-7)
        if value.ndim < 2:  # decays and norms are kept as they are
            assert torch.equal(two.state_dict()[name], value)
    assert close(two(TOKENS).logits, one(TOKENS).logits, 0.05)


def test_changes_of_low_rank_are_kept_and_others_lose_what_is_said(base, tmp_path):
    # Memory layers began as an attention; each of their maps is moved by a matrix of rank 3.
    model, plain = load_pretrained(base), load_pretrained(base)
    after = insert_memory_layers(model, 2, "gated_delta_net").after
    torch.manual_seed(1)
    for i in after:
        for name in QKVO:
            own = getattr(model.model.layers[i].memory.mixer, name).weight.data
            own += torch.randn(len(own), 3) @ torch.randn(3, own.shape[1]) * 0.02
    exact = model.state_dict()

    def saved(rank):
        made = save_adapter(
            model, tmp_path / f"r{rank}", base=base, sleep=SLEEP, rank=rank, dtype=torch.float32
        )
        return made, json.loads((made.folder / "config.json").read_text())["inherits"]

    three, inherits = saved(3)
    assert three.lost < 1e-4
    origins = {f"model.layers.{i}.memory.mixer.{n}.weight": (min(i + 1, 3), n) for i in after for n in QKVO}
    assert inherits == {k: f"model.layers.{i}.self_attn.{n}.weight" for k, (i, n) in origins.items()}
    one, _ = saved(1)
    assert one.parameters < three.parameters and 0.1 < one.lost < 1
    # What it says is lost is what is lost.
    held = load_file(one.folder / "adapter.safetensors")
    start = plain.state_dict()[inherits[one.worst]]
    made = start + held[f"{one.worst}.up"] @ held[f"{one.worst}.down"]
    lost = (made - exact[one.worst]).norm() / (exact[one.worst] - start).norm()
    assert lost.item() == pytest.approx(one.lost, rel=1e-3)


def test_what_is_put_on_again_is_made_of_the_base_before_lora(base, tmp_path):
    # A memory layer inherits a matrix that itself has an adapter beside it.
    backbone = pretrained_backbone(FineTune(folder=base, insert=4, lora=2, lora_alpha=4.0))
    stirred(backbone, seed=2)
    saved = save_adapter(backbone, tmp_path / "a", base=base, sleep=SLEEP, rank=2, dtype=torch.float32)
    again, whole = load_adapter(saved.folder), merged(backbone, FineTune(folder=base, insert=4))
    plain = load_pretrained(base).state_dict()
    inherits = json.loads((saved.folder / "config.json").read_text())["inherits"]
    for name, value in again.state_dict().items():
        exact = whole.state_dict()[name]
        start = plain.get(inherits.get(name, name), torch.zeros_like(exact))
        assert (value - exact).norm() <= (saved.lost + 1e-5) * (exact - start).norm() + 1e-6


def test_a_hybrid_keeps_whatever_was_trained(tmp_path):
    family("qwen3_5").save_pretrained(tmp_path / "base")
    options = FineTune(folder=tmp_path / "base", lora=2, lora_alpha=4.0)
    backbone = stirred(pretrained_backbone(options))
    save_adapter(backbone, tmp_path / "adapter", base=tmp_path / "base", sleep=SLEEP, dtype=torch.float32)
    again, whole = load_pretrained(tmp_path / "adapter"), merged(backbone, options).state_dict()
    assert all(torch.equal(v, whole[k]) for k, v in again.state_dict().items())
    held = load_file(tmp_path / "adapter/adapter.safetensors")
    assert any(name.endswith("A_log") for name in held)


def test_another_base_is_refused_by_name(base, adapter, tmp_path):
    other, wide = tmp_path / "other", tmp_path / "wide"
    family("llama", seed=1).save_pretrained(other)
    family("qwen3").save_pretrained(wide)
    message = rf"tiny-sleeps is an adapter of .*tiny \(llama, [\d,]+ parameters\), and {other} \(llama, .*"
    with pytest.raises(ValueError, match=message + "is another model with other weights$"):
        load_adapter(adapter, other)
    with pytest.raises(ValueError, match=rf"adapter of .*, and {wide} \(qwen3, .*\) is another model$"):
        load_adapter(adapter, wide)
    with pytest.raises(ValueError, match="is an adapter itself"):
        load_adapter(adapter, adapter)
    assert load_adapter(adapter, base).config.sleep == SLEEP.to_dict()


def test_a_base_that_moved_is_found_by_a_link(base, adapter, tmp_path, capsys):
    moved, copy = tmp_path / "elsewhere", tmp_path / "copy"
    shutil.copytree(base, moved)
    shutil.copytree(adapter, copy)
    edit(
        copy / "config.json", base={**json.loads((copy / "config.json").read_text())["base"], "name": "gone"}
    )
    code, out, err = run_command(capsys, "ask", copy, "w1", "--memory", "m")
    assert code == 2 and not out and err.count("\n") == 1
    assert "copy is an adapter of the model gone, and there is no " in err
    assert f"link its folder (or file) as {copy}/base" in err
    (copy / "base").symlink_to(moved)
    assert load_adapter(copy).config.memory_layers
    assert lmsleep.open(copy).tokenizer.encode("w3 w4") == [3, 4]


def test_the_fingerprint_of_weights_is_that_of_numbers_alone(base, tmp_path):
    first = load_pretrained(base)
    first.save_pretrained(tmp_path / "again", max_shard_size="50KB")
    edit(tmp_path / "again/config.json", quantization_config=None, rope_theta=3.0)
    again = load_pretrained(tmp_path / "again")
    assert weights_fingerprint(again.state_dict()) == weights_fingerprint(first.state_dict())
    with torch.no_grad():
        again.model.norm.weight[0] += 1
    assert weights_fingerprint(again.state_dict()) != weights_fingerprint(first.state_dict())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapter.safetensors").unlink(), r"is an adapter without adapter\.safetensors"),
        (lambda f: cut(f / "adapter.safetensors"), r"adapter\.safetensors is damaged .*copy it again"),
        (lambda f: edit(f / "config.json", adapter=2), r"adapter=2 is a form .* \(it reads 1\)"),
        (lambda f: edit(f / "config.json", base={}), "names no base model"),
        (lambda f: edit(f / "config.json", base={"name": "x"}), "adapter of the model x, and there is no"),
        (lambda f: edit(f / "config.json", inherits=[]), r"config\.json is damaged \(inherits must"),
        (lambda f: edit(f / "config.json", memory_layers=None), r"holds .*\.memory.*, for which the model"),
        (lambda f: edit(f / "config.json", memory_layers={"kind": "jet", "after": [9]}), r"after=\[9\]"),
        (lambda f: tensors(f, lambda k, v: {}), "lacks model.*memory.*, which config.json asks for"),
        (lambda f: tensors(f, lambda k, v: {k: v, "x": v.clone()}), "holds x, for which the model"),
        (
            lambda f: tensors(f, lambda k, v: {k: v[:1] if "norm" in k else v}),
            r"has the shape \(1,\) instead",
        ),
        (lambda f: tensors(f, lambda k, v: {k: v[:, :1] if ".up" in k else v}), "weight cannot be made"),
        (lambda f: tensors(f, lambda k, v: {} if ".up" in k else {k: v}), "weight cannot be made"),
    ],
)
def test_damage_is_named(damage, message, adapter, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(adapter, copy)
    damage(copy)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_pretrained(copy)


def cut(file):
    file.write_bytes(file.read_bytes()[:-9])


def tensors(folder, change):
    file = folder / "adapter.safetensors"
    held = [change(name, value) for name, value in load_file(file).items()]
    save_file({name: value.contiguous() for part in held for name, value in part.items()}, file)


def test_in_another_dtype_positions_are_not_rounded(base, adapter):
    halved, plain = load_adapter(adapter, dtype=torch.bfloat16), load_pretrained(base)
    assert {p.dtype for p in halved.parameters()} == {torch.bfloat16}
    frequencies = halved.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32 and torch.equal(frequencies, plain.model.rotary_emb.inv_freq)


def test_a_weight_in_two_places_is_held_once(tmp_path):
    config = family("llama").config
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "tied")
    model.requires_grad_(False).get_input_embeddings().requires_grad_(True)
    stirred(model)
    saved = save_adapter(model, tmp_path / "a", base=tmp_path / "tied", sleep=SLEEP, dtype=None)
    assert saved.parameters == model.get_input_embeddings().weight.numel()
    assert torch.equal(load_adapter(tmp_path / "a")(TOKENS).logits, model(TOKENS).logits)
    # A base that has two of them gets both.
    config.tie_word_embeddings = False
    LlamaForCausalLM(config).save_pretrained(tmp_path / "two")
    save_adapter(model, tmp_path / "b", base=tmp_path / "two", sleep=SLEEP, dtype=None)
    assert torch.equal(load_adapter(tmp_path / "b")(TOKENS).logits, model(TOKENS).logits)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head"]), model)
    with pytest.raises(ValueError, match=r"lm_head.weight and model.embed_tokens.weight are one weight"):
        save_adapter(model, tmp_path / "c", base=tmp_path / "tied", sleep=SLEEP)


@pytest.mark.filterwarnings("ignore")  # of peft
@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"lora_bias": True}, "lora_B.default.bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
    ],
)
def test_adapters_of_peft_that_are_more_than_two_factors_are_refused(base, tmp_path, more, named):
    model = get_peft_model(
        load_pretrained(base), LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **more})
    )
    with pytest.raises(ValueError, match=rf"^model: \S*{named}.*is of no plain LoRA.*merge it first"):
        save_adapter(model, tmp_path / "a", base=base, sleep=SLEEP)
    other = get_peft_model(
        load_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine"
    )
    with pytest.raises(ValueError, match="called 'default'"):
        save_adapter(other, tmp_path / "a", base=base, sleep=SLEEP)
    scales = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    merged = get_peft_model(load_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    merged.merge_adapter()
    for odd in (get_peft_model(load_pretrained(base), scales), merged):
        with pytest.raises(ValueError, match=r"_proj is of no plain LoRA"):
            save_adapter(odd, tmp_path / "a", base=base, sleep=SLEEP)
    prompt = get_peft_model(
        load_pretrained(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match="a prompt that was learned is no part of its weights"):
        save_adapter(prompt, tmp_path / "a", base=base, sleep=SLEEP)
    assert not (tmp_path / "a").exists()


def test_saved_again_it_keeps_the_link_to_its_base(base, tuned, tmp_path):
    folder = tmp_path / "a"
    save_adapter(tuned, folder, base=base, sleep=SLEEP)
    (folder / "base").symlink_to(base)
    save_adapter(tuned, folder, base=base, sleep=SLEEP)
    assert (folder / "base").readlink() == base and load_adapter(folder).config.memory_layers
    family("llama").half().save_pretrained(tmp_path / "other")
    save_adapter(tuned, folder, base=tmp_path / "other", sleep=SLEEP)
    assert not (folder / "base").exists()  # it led to another model
    shutil.copytree(base, folder / "base")
    with pytest.raises(
        FileExistsError, match=r"holds a base model \(base\), which would be replaced with it"
    ):
        save_adapter(tuned, folder, base=folder / "base", sleep=SLEEP)
    assert (folder / "base/model.safetensors").exists()


def test_the_file_of_a_package_is_named_as_any_machine_finds_it(base, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "_packaged", lambda: base / "model.safetensors")
    assert shipped.name_of(base / "model.safetensors") == "smollm2" and shipped.name_of(base) is None


def test_what_cannot_be_saved_says_why(base, tuned, adapter, tmp_path):
    with pytest.raises(ValueError, match=r"^sleep: nobody says how"):
        save_adapter(tuned, tmp_path / "a", base=base)
    with pytest.raises(FileExistsError, match="exists and is no adapter"):
        save_adapter(tuned, base, base=base, sleep=SLEEP)
    with pytest.raises(ValueError, match="is an adapter itself"):
        save_adapter(tuned, tmp_path / "a", base=adapter, sleep=SLEEP)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        save_adapter(tuned, tmp_path / "a", base=tmp_path / "none", sleep=SLEEP)
    family("qwen3").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="it was not made from base"):
        save_adapter(tuned, tmp_path / "a", base=tmp_path / "other", sleep=SLEEP)
    stranger = stirred(family("llama"))
    with pytest.raises(ValueError, match="no tensor of base as it was"):
        save_adapter(stranger, tmp_path / "a", base=base, sleep=SLEEP)
    assert not (tmp_path / "a").exists()


def test_the_card_says_what_it_is(adapter):
    from huggingface_hub import ModelCard

    card = ModelCard.load(adapter / "README.md")
    assert card.data.library_name == "lmsleep" and "adapter" in card.data.tags
    text = card.text
    assert (
        "| base model | tiny |" in text and "| data | one \\| two |" in text and "windows of 4 tokens" in text
    )
    assert sorted(p.name for p in adapter.iterdir()) == ["README.md", "adapter.safetensors", "config.json"]


KILLED = """
import sys, time
from pathlib import Path
from lmsleep.files import replacing_folder
with replacing_folder(Path(sys.argv[1])) as partial:
    (partial / "config.json").write_text("new")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_kill_leaves_what_was_there(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "config.json").write_text("old")
    command = [sys.executable, "-c", KILLED, folder]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.kill()
    process.wait()
    process.stdout.close()
    assert (folder / "config.json").read_text() == "old"
    from lmsleep.files import replacing_folder

    with replacing_folder(folder) as partial:
        (partial / "weights").write_text("new")
    # Nothing of the old one, and nothing that the killed one left.
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["adapter", "adapter/weights"]
    with pytest.raises(KeyboardInterrupt), replacing_folder(folder):
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"] and (folder / "weights").exists()


def test_every_command_takes_it(base, adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9")
    code, out, err = run_command(capsys, "read", adapter, "text.txt", "--memory", "m.mem")
    assert code == 0 and "window" in out and "2 sleeps" in out, err
    code, out, err = run_command(capsys, "ask", adapter, "w1", "--memory", "m.mem", "--max-new-tokens", 2)
    assert code == 0 and len(out.split()) == 2, err
    code, out, _ = run_command(capsys, "info", adapter, "--json")
    assert code == 0 and json.loads(out)["passes"] == 2
    # The memory is that of the model with the adapter, and of no other.
    code, out, err = run_command(capsys, "ask", base, "w1", "--memory", "m.mem")
    assert code == 2 and not out and err.count("\n") == 1
    insert_memory_layers(plain := load_pretrained(base), 2)
    plain.save_pretrained(tmp_path / "plain")
    tokenizer(tmp_path / "plain", VOCAB)
    code, out, err = run_command(capsys, "ask", tmp_path / "plain", "w1", "--memory", "m.mem")
    assert code == 2 and "another model" in err
    told = SleepLM.create_from_arg_obj({"pretrained": str(adapter)})
    assert told.session.sleep_config == SLEEP and told.tok_encode("w3 w4") == [3, 4]
    model = from_pretrained(adapter)
    assert model.sleep == SLEEP and model.generate(TOKENS, max_new_tokens=2, pad_token_id=0).shape == (1, 13)


def test_it_is_converted_into_a_whole_model(adapter, tmp_path, capsys):
    code, out, err = run_command(capsys, "convert", adapter, tmp_path / "whole")
    assert code == 0 and "llama" in out, err
    again, one = load_pretrained(tmp_path / "whole").state_dict(), load_adapter(adapter).state_dict()
    assert all(torch.equal(v, one[k]) for k, v in again.items()) and again.keys() == one.keys()
    _, sleep, words = lmsleep.open(tmp_path / "whole")
    assert sleep == SLEEP and words.encode("w3 w4") == [3, 4]
    assert "windows of 4 tokens" in (tmp_path / "whole/README.md").read_text()


def test_an_adapter_in_the_package_is_a_shipped_name(base, adapter, tmp_path, monkeypatch, capsys):
    here = tmp_path / "shipped"
    shutil.copytree(adapter, here / "tiny-sleeps")
    shutil.copytree(base, here / "tiny")
    named = json.loads((here / "tiny-sleeps/config.json").read_text())["base"]
    edit(here / "tiny-sleeps/config.json", base={**named, "name": "tiny"})
    monkeypatch.setattr(shipped, "HERE", here)
    monkeypatch.chdir(tmp_path)
    assert "tiny-sleeps" in shipped.names()
    assert lmsleep.open("tiny-sleeps").sleep == SLEEP
    code, out, _ = run_command(capsys, "info", "tiny-sleeps")
    assert code == 0 and "fast_weights" in out
