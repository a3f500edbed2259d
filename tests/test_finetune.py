import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import close, run_command
from hf_models import HEADS, JET, SMALL, VOCAB, family
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lmsleep import Compact, SleepConfig, adapt, sleep_forward
from lmsleep.cli.opening import SleepOptions, new_session
from lmsleep.hf import load_pretrained
from lmsleep.hf.cpu_attention import attend_in_float32
from lmsleep.hf.finetune import FineTune, export, memory_layers, merged, pretrained_backbone
from lmsleep.hf.jet_nemotron import JetNemotronConfig, JetNemotronForCausalLM
from lmsleep.recipes import RECIPES, catalogue
from lmsleep.recipes.run import _chain
from lmsleep.sleep import Hard, Sliding
from lmsleep.tasks import MQAR
from lmsleep.tasks.gsm_infinite.language import tokenizer
from lmsleep.text.tokenizers import HuggingFace
from lmsleep.training import RunConfig, RunFolder, TrainConfig, Trainer
from lmsleep.training.muon import Muon
from lmsleep.training.optim import optimizers

SLEEP = SleepConfig(window=4, passes=2)
TOKENS = torch.randint(0, VOCAB, (1, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made: dict[str, Path] = {}

    def saved(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            family(name).save_pretrained(made[name])
        return made[name]

    return saved


def loss_of(backbone):
    return sleep_forward(backbone, TOKENS, torch.ones_like(TOKENS, dtype=torch.bool), SLEEP).loss


def stirred(backbone, seed: int = 0):
    # As after some training: everything that is trained has moved, adapters do something.
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in backbone.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return backbone


# Routers and experts, Mamba-2 whose output projection peft refuses, a layer made of parts.
@pytest.mark.parametrize(
    "name", ["qwen3_next", "kimi_linear", "nemotron_h", "jet_nemotron", "llama_with_jet"]
)
def test_adapters_train_what_they_should_and_merge(name, folder):
    options = FineTune(folder=folder(name), lora=2, lora_alpha=4.0)
    plain, tuned = adapt(family(name)), pretrained_backbone(options)
    untouched = loss_of(plain).detach()
    with torch.no_grad():
        assert torch.equal(loss_of(tuned), untouched)  # new adapters change nothing
    layers, blocks = memory_layers(tuned), tuned.blocks
    assert len(layers) == sum("fast_weights" in kind for kind in tuned.kinds)

    inside = {id(p) for layer in layers for p in layer.parameters()}
    trained = {n: p for n, p in blocks.named_parameters() if p.requires_grad}
    assert {id(p) for p in tuned.parameters() if p.requires_grad} == {id(p) for p in trained.values()}
    assert all("lora_" in n or id(p) in inside for n, p in trained.items())
    for word in ("A_log", "dt_bias"):
        assert sum(n.endswith(word) for n in trained) == len(layers)
    maps = {n for n, m in plain.blocks.named_modules() if isinstance(m, nn.Linear)}
    adapted = {n.partition(".lora_A")[0] for n in trained if "lora_A" in n}
    whole = {n for n in maps if ".memory." in n}  # inserted layers have nothing to be close to
    assert adapted == {n for n in maps - whole if not n.endswith("shared_expert_gate")}
    assert {f"{n}.weight" for n in whole} <= set(trained)
    if name == "nemotron_h":
        assert any("conv1d.weight" in n for n in trained) and any("out_proj.lora_A" in n for n in trained)

    loss = loss_of(stirred(tuned))
    loss.backward()
    idle = {n for n, p in trained.items() if p.grad is None or not p.grad.abs().any()}
    assert not idle
    assert all(p.grad is None for p in tuned.parameters() if not p.requires_grad)

    assert not close(loss.detach(), untouched, 1e-3)
    with torch.no_grad():
        assert close(loss_of(adapt(merged(tuned, options))), loss.detach(), 1e-5)


@pytest.mark.parametrize("train", ["memory", "full"])
def test_only_the_memory_layers_or_everything(train, folder):
    options = FineTune(folder=folder("jet_nemotron"), train=train)
    tuned = stirred(pretrained_backbone(options))
    moved = {n for n, p in tuned.model.named_parameters() if p.requires_grad}
    everything = {n for n, _ in tuned.model.named_parameters()}
    memory = ("model.layers.0.self_attn.", "model.layers.2.self_attn.")
    assert moved == (everything if train == "full" else {n for n in everything if n.startswith(memory)})
    assert close(loss_of(adapt(merged(tuned, options))), loss_of(tuned), 1e-6)


def test_a_generation_config_that_contradicts_itself_comes_along(folder, tmp_path, monkeypatch):
    # As published ones do; transformers 5.21 and 5.22 read them and refuse to write them.
    source = tmp_path / "source"
    shutil.copytree(folder("qwen3_5"), source)
    told = json.dumps({"do_sample": False, "temperature": 0.6, "eos_token_id": 63})
    (source / "generation_config.json").write_text(told)
    write = transformers.GenerationConfig.save_pretrained

    def strict(self, *args, **kwargs):
        if self.temperature not in (None, 1.0) and not self.do_sample:
            raise ValueError("the generation config is invalid")
        return write(self, *args, **kwargs)

    monkeypatch.setattr(transformers.GenerationConfig, "save_pretrained", strict)
    options = FineTune(folder=source, train="full")
    export(pretrained_backbone(options), options, SLEEP, tmp_path / "model", {})
    assert (tmp_path / "model/generation_config.json").read_text() == told
    assert load_pretrained(tmp_path / "model").generation_config.eos_token_id == 63
    (source / "generation_config.json").unlink()
    export(pretrained_backbone(options), options, SLEEP, tmp_path / "model", {})
    assert load_pretrained(tmp_path / "model").generation_config is not None


def test_muon_takes_matrices_and_leaves_gates_and_adapters_to_adamw(with_words):
    options = FineTune(folder=with_words["jet_nemotron"], lora=2)
    (adam,) = optimizers(pretrained_backbone(options), TrainConfig())
    assert isinstance(adam, torch.optim.AdamW)
    full = pretrained_backbone(FineTune(folder=options.folder, train="full"))
    muon, adam = optimizers(full, TrainConfig())
    assert isinstance(muon, Muon)
    names = {id(p): n.removeprefix("model.layers.") for n, p in full.model.named_parameters()}
    matrices, rest = (
        {names[id(p)] for group in o.param_groups for p in group["params"]} for o in (muon, adam)
    )
    assert not matrices & rest and len(matrices | rest) == len(names)
    assert {"0.self_attn.v_proj.weight", "1.mlp.down_proj.weight"} <= matrices
    assert {"0.self_attn.a_proj.weight", "0.self_attn.A_log", "model.embed_tokens.weight"} <= rest


def test_frozen_matrices_in_bfloat16_give_the_same_result(tmp_path):
    family("jet_nemotron").bfloat16().save_pretrained(tmp_path)
    losses = []
    for bfloat16 in (False, True):
        torch.manual_seed(1)  # of the adapters
        tuned = stirred(pretrained_backbone(FineTune(folder=tmp_path, lora=2), bfloat16=bfloat16))
        attend_in_float32(tuned.model)
        halved = [p for p in tuned.parameters() if p.dtype is torch.bfloat16]
        assert bool(halved) == bfloat16 and not any(p.requires_grad for p in halved)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(loss_of(tuned))
    assert torch.equal(*losses)
    model = merged(tuned, FineTune(folder=tmp_path, lora=2))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}  # as it was


class Attended(TorchFunctionMode):
    """Hears in which precision attention is computed."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.seen.append((*(t.dtype for t in args[:3]), torch.is_autocast_enabled("cpu")))
        return func(*args, **(kwargs or {}))


def test_a_cpu_attends_in_float32_while_it_trains_in_bfloat16(tmp_path):
    family("llama").save_pretrained(tmp_path)
    tuned = pretrained_backbone(FineTune(folder=tmp_path, insert=1), bfloat16=True)
    with torch.autocast("cpu", torch.bfloat16), Attended() as attended:
        loss_of(tuned)
    assert attended.seen and {*attended.seen} == {(*[torch.float32] * 3, False)}
    # And what such attention asks for can be compacted, as that of "sdpa".
    sleep = SleepConfig(window=4, eviction=Compact(keys=2))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = sleep_forward(tuned, torch.arange(1, 10)[None], None, sleep)
    assert max(x[0].shape[1] for x in out.state.cache.kept if x) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "some"}, "^train must be one of lora, memory, full, got 'some'"),
        ({"lora": 0}, "^lora must be a rank of at least 1, got 0"),
        ({"lora_alpha": 0.0}, "^lora_alpha must be positive"),
        ({"lora_dropout": 1.0}, "^lora_dropout must be at least 0 and less than 1, got 1.0"),
        ({"train": "full", "targets": ("q_proj",)}, "^targets are maps that get adapters; train='full' has"),
        ({"targets": ("q", "out_proj")}, "^targets: no linear map is called out_proj, q; there are a_proj, "),
    ],
)
def test_what_cannot_be_trained_is_named(options, message, folder):
    with pytest.raises(ValueError, match=message):
        pretrained_backbone(FineTune(folder=folder("jet_nemotron"), **options))


def run(folder: Path, **options) -> RunConfig:
    task = MQAR(pairs=4, keys=6, values=5, queries=2)
    train = {"steps": 2, "batch_size": 2, "lr": 0.01, "adam_lr": 0.01, "eval_batches": 1, "threads": 1}
    return RunConfig(
        task=task,
        model=FineTune(folder=folder, lora=2, **options),
        sleep=SleepConfig(window=8, passes=2),
        train=TrainConfig(**train, warmup=0, save_every=1, checkpoint=True),
    )


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(with_words, tmp_path):
    config = run(with_words["jet_nemotron"], lora_dropout=0.3)
    whole = Trainer(RunFolder.create(tmp_path / "whole", config), config)
    whole.fit()
    Trainer(RunFolder.create(tmp_path / "parts", config), config).fit(until=1)
    resumed = Trainer.resume(RunFolder.open(tmp_path / "parts"))
    resumed.fit()
    ends = [dict(t.model.named_parameters()) for t in (whole, resumed)]
    assert all(torch.equal(p, ends[1][name]) for name, p in ends[0].items())
    reports = [RunFolder.open(tmp_path / name).report()["eval"] for name in ("whole", "parts")]
    assert reports[0] == reports[1]


@pytest.fixture(scope="module")
def with_words(tmp_path_factory):
    # A model and its tokenizer, of the words of the problems.
    names = [*tokenizer("words").words, "Answer", ":", "<end>", "<unknown>"]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unknown>"))
    splits = [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    words.pre_tokenizer = pre_tokenizers.Sequence(splits)
    saved = {}
    sizes = {**SMALL, **HEADS, "vocab_size": len(names), "num_hidden_layers": 2}
    jet = {"jet": JET, "swa": {"window_size": 4}}
    torch.manual_seed(0)
    for name, model in (
        ("jet_nemotron", JetNemotronForCausalLM(
            JetNemotronConfig(**sizes, layer_types=["jet", "attn"], efficient_attention_config=jet,
                              bos_token_id=None, eos_token_id=None))),
        ("llama", LlamaForCausalLM(LlamaConfig(**sizes))),
    ):  # fmt: skip
        saved[name] = tmp_path_factory.mktemp("with_words") / name
        model.save_pretrained(saved[name])
        PreTrainedTokenizerFast(
            tokenizer_object=words, unk_token="<unknown>", eos_token="<end>"
        ).save_pretrained(saved[name])
    return saved


GSM = [
    "--task", "gsm-infinite", "--subset", "medium", "--mode", "forward", "--ops", 2, 2, "--length", 0, 100,
    "--no-noise", "--window", 32, "--passes", 2, "--batch-size", 2, "--accumulate", 2, "--eval-batches", 1,
    "--threads", 1,
]  # fmt: skip


def test_a_model_learns_to_sleep_and_comes_out_as_a_folder(with_words, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--steps", 6, "--lora", 4, "--adam-lr", 0.005, "--warmup", 0, "--out", out]
    code, said, errors = run_command(capsys, "finetune", with_words["jet_nemotron"], *GSM, *options)
    assert code == 0, errors
    assert f"{out}/model is the model" in said and "constant" in said
    folder = RunFolder.open(out)
    config = folder.config()
    before = Trainer(RunFolder(tmp_path / "unused"), config).evaluate(4)
    after = folder.report()["eval"]
    assert after["bits"] < before.bits() - 0.2

    made = json.loads((out / "model/config.json").read_text())
    assert (made["sleep"]["consolidator"]["passes"], made["sleep"]["window"]) == (2, 32)
    card = (out / "model/README.md").read_text()
    assert "An adapter with which" in card and "6 steps" in card and "task gsm-infinite" in card
    assert sorted(p.name for p in (out / "model").iterdir()) == [
        "README.md", "adapter.safetensors", "config.json"]  # fmt: skip
    assert not any("lora" in name for name, _ in load_pretrained(out / "model").named_parameters())
    exported = replace(config, model=FineTune(folder=out / "model"))
    again = Trainer(RunFolder(tmp_path / "unused"), exported).evaluate(4)
    assert abs(again.bits() - after["bits"]) < 1e-4  # which the last checkpoint scored on four batches
    assert load_pretrained(out / "model").config.vocab_size == len(tokenizer("words").words) + 4

    code, said, _ = run_command(capsys, "eval", out, "--passes", 1, "--batches", 1)
    assert code == 0 and "N = 1:" in said
    code, said, _ = run_command(capsys, "info", out)
    assert code == 0 and "fast_weights attention" in said
    assert run_command(capsys, "info", out / "model")[0] == 0
    assert isinstance(new_session(out, SleepOptions()).tokenizer, HuggingFace)
    assert run_command(capsys, "plot", out, "--out", tmp_path / "curves.png")[0] == 0

    # What it wrote is a model to go on from, whose adapter again belongs to the first.
    more = ["--steps", 1, "--lora", 4, "--out", tmp_path / "more"]
    code, _, errors = run_command(capsys, "finetune", out / "model", *GSM, *more)
    assert code == 0, errors
    assert json.loads((tmp_path / "more/model/config.json").read_text())["base"] == made["base"]
    assert made["base"]["name"] == str(with_words["jet_nemotron"])


@pytest.mark.parametrize(("given", "size"), [([], 16), (["--batch_size", 3], 3), (["--batch-size=3"], 3)])
def test_a_batch_is_read_one_sequence_at_a_time(given, size, with_words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lmsleep.cli.finetune.finish", lambda *run: None)
    argv = ["finetune", with_words["jet_nemotron"], "--task", "mqar", *given, "--out", tmp_path / "run"]
    assert run_command(capsys, *argv)[0] == 0
    train = RunFolder.open(tmp_path / "run").config().train
    assert train.batch_size == train.accumulate == size


def test_two_stages_train_inserted_layers_then_everything(with_words, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--preset", "two-stage", "--insert", 2, "--steps", 2, "--out", out, "--precision", "bfloat16"]
    code, _, errors = run_command(capsys, "finetune", with_words["llama"], *GSM, *options)
    assert code == 0, errors
    first, second = (RunFolder.open(path).config() for path in (tmp_path / "run-memory-layers", out))
    assert (first.model.train, first.sleep.eviction, first.train.steps) == ("memory", Hard(), 1)
    assert (second.model.train, second.sleep.eviction, second.train.steps) == ("full", Sliding(), 2)
    assert RunFolder.open(out).source() is None  # it is finished
    first_model(out).rename(tmp_path / "elsewhere")
    assert RunFolder.open(out).source().path == first_model(out).parent
    (tmp_path / "elsewhere").rename(first_model(out))
    base, warm, end = map(load_pretrained, (with_words["llama"], first_model(out), out / "model"))
    weights = dict(warm.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in base.named_parameters())
    moved = {n for n, p in end.named_parameters() if not torch.equal(p, weights[n])}
    assert {n for n in weights if ".memory." not in n} & moved and {n for n in moved if ".memory." in n}


def first_model(out: Path) -> Path:
    return out.with_name(f"{out.name}-memory-layers") / "model"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--task", "mqar", "--loop", "1", "2"], "loop=(1, 2) has no block with fast weights"),
        (["--task", "mqar", "--loop", "0", "9"], "loop=(0, 9) reaches outside the model"),
        (["--task", "mqar", "--sleep", "passes,wake_passes=2"], "wake_passes=2: a pretrained"),
        (["--task", "mqar", "--keys", "900"], "alone; use its own tokenizer"),
        ([], "--task: name what is learned"),
        (["--task", "mqar", "--preset", "none"], "preset='none' is unknown; choose one of lora, full, two-"),
        (["--task", "gsm-infinite", "--tokenizer", "bytes"], "tokenizer='bytes' is not that of the model in"),
        (["--task", "mqar", "--insert", "2"], "has more than attention already"),
        (["--task", "mqar", "--start", "x"], "--start"),
        (
            ["--task", "mqar", "--sleep", "gradient-steps", "--no-checkpoint"],
            "gradient-steps are for models of attention alone with feed-forward layers",
        ),
    ],
)
def test_what_does_not_fit_leaves_no_run(argv, message, with_words, tmp_path, capsys):
    code, _, errors = run_command(
        capsys, "finetune", with_words["jet_nemotron"], *argv, "--out", tmp_path / "run"
    )
    assert code == 2 and message in errors and not (tmp_path / "run").exists()


def test_a_folder_without_a_model_is_named(tmp_path, capsys):
    for folder, message in ((tmp_path / "none", "there is no folder"), (tmp_path, "holds no model")):
        code, _, errors = run_command(capsys, "finetune", folder, "--task", "mqar", "--out", tmp_path / "run")
        assert code == 2 and message in errors and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_figure_is_made_from_weights(with_words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sizes = {"task": {"ops": (1, 1), "length": (0, 200)}, "hard": 64, "sliding": 64}
    train = TrainConfig(batch_size=2, eval_batches=1, threads=1)
    monkeypatch.setitem(catalogue.GSM_SIZES, "small", sizes)
    monkeypatch.setitem(catalogue.GSM_TRAIN, "small", train)
    small = ["4a", "--scale", "small", "--steps", 1, "--seeds", 1, "--workers", 1]
    code, said, errors = run_command(capsys, "reproduce", *small, "--weights", with_words["jet_nemotron"])
    assert code == 0, errors
    assert "Fine-tuned from `jet_nemotron`" in said and "trained on the spot" not in said
    assert all(f"| N = {n} |" in said for n in (1, 2, 4, 6))
    assert Path("results/4a-small-jet_nemotron-1-steps/figure.png").exists()


def test_small_problems_are_such_that_no_answer_is_frequent_and_noise_has_numbers(with_words):
    for figure in ("4a", "4b", "5"):
        tasks = [
            {cell.config.task for cell in RECIPES[figure].fine_tuned(scale, with_words["jet_nemotron"])}
            for scale in ("small", "paper")
        ]
        (small,), (paper,) = tasks
        assert (small.modulus, small.noise_numbers) == (23, True)
        assert (paper.modulus, paper.noise_numbers) == (None, False)


def test_paper_settings_with_a_hybrid(with_words):
    cells = RECIPES["4a"].fine_tuned("paper", with_words["jet_nemotron"])
    assert [cell.config.sleep.passes for cell in cells] == [1, 2, 4, 6]
    for config in (cell.config for cell in cells):
        assert (config.sleep.window, config.sleep.eviction) == (2000, Hard())
        assert config.sleep.consolidator.loop == "middle" and config.train.checkpoint
        assert (config.model.train, config.model.insert, config.train.lr) == ("full", 0, 1e-3)


@pytest.mark.parametrize(("figure", "eviction", "window"), [("4b", Hard(), 2000), ("5", Sliding(), 512)])
def test_paper_settings_with_inserted_layers(figure, eviction, window, with_words):
    cells = RECIPES[figure].fine_tuned("paper", with_words["llama"])
    assert [cell.config.sleep.passes for cell in cells] == [1, 2, 4]
    for cell in cells:
        chain = _chain(cell, 1, Path("runs"))
        *alone, whole = (job.config for job in chain)
        # Two stages belong to the sliding windows of section 6.4.
        assert len(alone) == (figure == "5")
        assert (whole.model.train, whole.model.insert) == ("full", 0 if alone else 6)
        assert (whole.sleep.eviction, whole.sleep.window) == (eviction, window)
        for first in alone:
            assert (first.model.train, first.model.insert) == ("memory", 6)
            assert first.sleep.eviction == (Hard() if whole.sleep.passes > 1 else eviction)
            assert whole.model.folder == chain[0].path.resolve() / "model"
            assert (first.task, first.train.seed) == (whole.task, 1)
        assert whole.task.length == (2000, 3300) and whole.train.batch_size == 256


def test_weights_that_cannot_be_used_are_refused(with_words, tmp_path, capsys):
    for argv, message in (
        (
            ["3", "--weights", with_words["llama"]],
            "only figures 4a, 4b, 5 and recall begin with a pretrained model",
        ),
        (["4a", "--weights", with_words["llama"]], "scale=demo trains a model on the spot"),
        (["4a", "--scale", "small", "--weights", tmp_path / "none"], "there is no folder"),
        (["5", "--scale", "paper"], "download ByteDance/Ouro-1.4B"),
        (["recall"], "make it with `python tools/smollm2.py`"),
        (["recall", "--scale", "small", "--weights", with_words["llama"]], "use scale=demo"),
        (["recall", "--weights", with_words["llama"]], "is no adapter"),
    ):
        code, _, errors = run_command(capsys, "reproduce", *argv)
        assert code == 2 and message in errors
