"""Models that sleep in several processes: `Trainer` with DDP and FSDP2, and FSDP2 by hand."""

import math
import os

import pytest
import ranks
import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from conftest import random_tokens
from hf_models import FAMILIES, VOCAB
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.profiler import profile

from lmsleep import SleepConfig
from lmsleep.hf import from_pretrained, sleepify

# The processes have other numbers of tokens, of windows, of lengths in a window; rows of one predict nothing.
LENGTHS = [13, 1, 6, 9, 1, 1, 14, 3, 5, 8, 2, 11]
SHARD = {"fsdp": True, "fsdp_config": {"version": 2}}
PARTS = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
KEPT = {"per_device_train_batch_size": 2}


def sleeper(name="qwen3_5", passes=2):
    torch.manual_seed(0)
    return sleepify(FAMILIES[name](), SleepConfig(window=4, passes=passes))


def rows():
    tokens = 1 + random_tokens(len(LENGTHS), max(LENGTHS), vocab=VOCAB - 1)
    return [{"input_ids": row[:length]} for row, length in zip(tokens, LENGTHS, strict=True)]


def collate(rows):
    tokens = torch.nn.utils.rnn.pad_sequence([r["input_ids"] for r in rows], batch_first=True)
    mask = (tokens > 0).long()
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def trained(name, out, **options):
    """Train 3 steps; return the losses, the weights, and the loss of the rows after it."""
    model = sleeper(name)
    if "fsdp" in options:
        block = type(model.get_decoder().layers[0]).__name__
        config = {**options["fsdp_config"], "transformer_layer_cls_to_wrap": [block]}
        options = {**options, "fsdp_config": config}
    defaults = {
        "output_dir": str(out), "max_steps": 3, "learning_rate": 0.1, "optim": "sgd", "report_to": "none",
        "lr_scheduler_type": "constant", "use_cpu": True, "save_strategy": "no", "logging_steps": 1,
        "train_sampling_strategy": "sequential", "disable_tqdm": True, "per_device_eval_batch_size": 2,
    }  # fmt: skip
    run = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**{**defaults, **options}),
        train_dataset=rows(),
        eval_dataset=rows()[4:],
        data_collator=collate,
    )
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    weights = torch.cat([whole(p).flatten() for p in run.model.parameters()])
    if "fsdp" in options:
        assert all(isinstance(p, DTensor) for p in run.model.parameters())
        after = run.evaluate()["eval_loss"]
        assert all(isinstance(p, DTensor) for p in run.model.get_decoder().layers.parameters())
        run.save_model(str(out))
        return losses, weights, after
    return losses, weights, None


def whole(parameter):
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.clone()


def shard_on_cpus():
    """Let accelerate shard on CPUs as it does on GPUs: it says nothing there, and takes DDP."""
    begin = AcceleratorState.__init__

    def begin_sharded(self, *args, fsdp_plugin=None, **options):
        begin(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = begin_sharded


def in_each_process(name, out, ways):
    shard_on_cpus()
    found = []
    for options in ways:
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        AcceleratorState._reset_state(reset_partial_state=True)
        found.append(trained(name, out, **options))
    return found


def check_against_one_process(name, out, *ways):
    expected, weights, _ = trained(name, out / "alone", per_device_train_batch_size=4)
    found = ranks.run(2, in_each_process, name, out, ways)
    for losses, learned, _ in found[0]:
        assert losses == pytest.approx(expected, rel=1e-4)
        assert (learned - weights).norm() < 1e-4 * weights.norm()
    saved = from_pretrained(out)
    assert torch.equal(torch.cat([p.detach().flatten() for p in saved.parameters()]), found[0][-1][1])
    batches = [collate(rows()[i : i + 4]) for i in (4, 8)]
    with torch.no_grad():
        assert math.isclose(found[0][-1][2], sum(float(saved(**b).loss) for b in batches) / 2, rel_tol=1e-4)


def test_two_processes_of_trainer_train_as_one_does(tmp_path):
    check_against_one_process("qwen3_5", tmp_path, PARTS, {**PARTS, **SHARD})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_5", "granitemoehybrid", "qwen3_next", "kimi_linear", "falcon_h1"])
def test_two_processes_recompute_activations(tmp_path, name):
    named = hasattr(transformers.TrainingArguments, "activation_checkpointing")
    passes = {"activation_checkpointing" if named else "gradient_checkpointing": True}
    of_blocks = {**SHARD, "fsdp_config": {**SHARD["fsdp_config"], "activation_checkpointing": True}}
    ways = [{**KEPT, **passes}, {**KEPT, **SHARD, **passes}, {**KEPT, **of_blocks}]
    check_against_one_process(name, tmp_path, *ways)


def sharded_by_hand(model):
    for block in model.get_decoder().layers:
        fully_shard(block)
    return fully_shard(model)


def by_hand(passes, texts):
    model = sharded_by_hand(sleeper(passes=passes))
    batch = collate([{"input_ids": torch.arange(1, 1 + texts[int(os.environ["RANK"])])}])
    with profile() as seen:
        loss = model(**batch).loss
        loss.backward()
    counts = {one.key: one.count for one in seen.key_averages() if one.key.startswith("c10d::")}
    gradient = torch.cat([whole(p.grad).flatten() for p in model.parameters()])
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, loss)
    answers = model.generate(torch.arange(1, 8)[None], do_sample=False, max_new_tokens=6, eos_token_id=None)
    with pytest.raises(ValueError, match="labels must be"):
        model(batch["input_ids"], labels=batch["input_ids"] + 1)
    return counts, gradient, answers


def by_hand_in_each_process():
    return [by_hand(1, (3, 3)), by_hand(3, (22, 7))]


def test_parameters_sharded_by_hand_are_gathered_once_a_text_however_often_it_sleeps():
    (once, *_), (often, gradient, answers) = ranks.run(2, by_hand_in_each_process)[0]
    assert once == often and sum(often.values()) == 2 * 5  # one to gather, one to reduce for each unit
    alone = sleeper(passes=3)
    losses = [alone(**collate([{"input_ids": torch.arange(1, 1 + T)}])).loss for T in (22, 7)]
    (sum(losses) / 2).backward()
    expected = torch.cat([p.grad.flatten() for p in alone.parameters()])
    assert (gradient - expected).norm() < 1e-4 * expected.norm()
    alone.eval()
    greedy = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    assert torch.equal(answers, alone.generate(torch.arange(1, 8)[None], **greedy))
