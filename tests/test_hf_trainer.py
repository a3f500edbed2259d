import math

import datasets
import peft
import pytest
import torch
import transformers
from conftest import close, random_tokens
from hf_models import VOCAB, family
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lmsleep import SleepConfig
from lmsleep.hf import from_pretrained, sleepify

SLEEP = SleepConfig(window=4, passes=2)
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def data():
    rows = [{"input_ids": row} for row in (1 + random_tokens(8, 10, vocab=VOCAB - 1)).tolist()]
    rows = [{"input_ids": r["input_ids"][: 10 - i % 3]} for i, r in enumerate(rows)]
    return datasets.Dataset.from_list(rows)


def collate(rows):
    longest = max(len(r["input_ids"]) for r in rows)
    padded = torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, r in enumerate(rows):
        padded[i, : len(r["input_ids"])] = torch.tensor(r["input_ids"])
    mask = (padded > 0).long()
    return {"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, -100)}


def trainer(model, data, out, **options):
    defaults = {
        "output_dir": str(out), "max_steps": 6, "learning_rate": 3e-3, "report_to": "none", "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(**{**defaults, **options})
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, data_collator=collate
    )


def test_trainer_trains_evaluates_and_saves_a_model_that_sleeps(data, tmp_path):
    model = sleepify(family("qwen3_5"), SLEEP)
    run = trainer(model, data, tmp_path / "a", per_device_train_batch_size=4)
    before = run.evaluate()["eval_loss"]
    with torch.no_grad():
        batch = collate(list(data))
        assert math.isclose(before, float(model(**batch).loss), rel_tol=1e-4)
    run.train()
    assert run.evaluate()["eval_loss"] < before - 0.1
    run.save_model(str(tmp_path / "saved"))
    again, x = from_pretrained(tmp_path / "saved"), torch.arange(1, 10)[None]
    assert again.sleep == SLEEP
    assert torch.equal(again.generate(x, **GREEDY), model.generate(x, **GREEDY))


def test_batches_in_parts_have_the_gradient_of_the_whole(data, tmp_path):
    # Rows differ in length, so means of means would differ from the mean over all tokens.
    found = []
    for size, parts in ((8, 1), (2, 4)):
        model = sleepify(family("qwen3_5"), SLEEP)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "max_steps": 1}
        run = trainer(model, data, tmp_path / str(size), optim="sgd", **options)
        run.train()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in family("qwen3_5").parameters()])
    assert (found[0] - found[1]).norm() < 1e-3 * (found[0] - start).norm()


def test_activation_checkpointing_of_trainer_recomputes_passes(data, tmp_path):
    # The name from transformers 5.22 on, and the one before it.
    named = hasattr(transformers.TrainingArguments, "activation_checkpointing")
    option = "activation_checkpointing" if named else "gradient_checkpointing"
    found = []
    for frugal in (False, True):
        model = sleepify(family("qwen3_5"), SLEEP)
        run = trainer(model, data, tmp_path, **{option: frugal}, optim="sgd", max_steps=1)
        run.train()
        assert model.is_gradient_checkpointing == frugal
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in family("qwen3_5").parameters()])
    # Without logits the head is for predicted tokens alone, which rounds differently.
    assert close(*found, 1e-6) and not close(found[0], start, 1e-6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
@pytest.mark.parametrize("order", ["sleep first", "adapters first"])
def test_peft_models_sleep(data, tmp_path, order):
    config = peft.LoraConfig(r=2, target_modules=["in_proj_qkv", "q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = family("qwen3_5")
    x = torch.arange(1, 10)[None]
    untrained = sleepify(family("qwen3_5"), SLEEP).generate(x, **GREEDY)
    if order == "sleep first":
        model = peft.get_peft_model(sleepify(model, SLEEP), config)
    else:
        model = sleepify(peft.get_peft_model(model, config), SLEEP)
    assert torch.equal(model.generate(input_ids=x, **GREEDY), untrained)
    before = {n: p.clone() for n, p in model.named_parameters()}
    trainer(model, data, tmp_path, max_steps=2).train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora_" in n for n in moved) and any("in_proj_qkv" in n for n in moved)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = from_pretrained(tmp_path / "merged")
    assert torch.allclose(again(x).logits, merged(x).logits, atol=1e-5) and again.sleep == SLEEP


def gradients(model):
    assert all(p.grad is not None for p in model.parameters())
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", ["qwen3_5", "granitemoehybrid", "llama_with_jet"])
def test_blocks_that_run_again_in_the_backward_pass_begin_with_what_they_began_with(data, name):
    # As FSDP's activation checkpointing has it.
    found = []
    for again in (False, True):
        model = sleepify(family(name), SLEEP)
        for i, block in enumerate(model.get_decoder().layers):
            if again:
                model.set_submodule(f"model.layers.{i}", checkpoint_wrapper(block))
        model(**collate(list(data))).loss.backward()
        found.append(gradients(model))
    assert torch.equal(*found)


@pytest.mark.parametrize("frugal", [False, True])
@pytest.mark.parametrize("rows", ["without a target", "of one token", "of padding"])
def test_rows_that_predict_nothing_give_every_weight_a_gradient_of_zeros(data, rows, frugal):
    # Others wait for it, where there are several processes.
    model, batch = sleepify(family("qwen3_5"), SLEEP).train(), collate(list(data))
    if frugal:
        model.gradient_checkpointing_enable()
    if rows == "without a target":
        batch["labels"] = torch.full_like(batch["labels"], -100)
    elif rows == "of one token":
        batch = {key: value[:, :1] for key, value in batch.items()}
    else:
        batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    loss = model(**batch, num_items_in_batch=torch.tensor(7)).loss
    loss.backward()
    assert loss == 0 and not gradients(model).any()
