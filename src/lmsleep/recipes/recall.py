"""A real language model remembers: which kinds of question do more passes help?

An adapter of SmolLM2 that was taught facts in one pass (`tools/smollm2.py`) goes on to learn from kinds of
text that it does not know, in N passes each, at equal training FLOPs; beside it LoRA on the same model and
the same texts with everything in attention, and what that answers once texts are evicted, seen through a
sliding window, or kept as few keys and values.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lmsleep.hf.adapter import is_adapter, whole
from lmsleep.hf.finetune import FineTune
from lmsleep.hf.loading import attention_alone
from lmsleep.recipes.recipe import Cell
from lmsleep.recipes.searched import LONGER, trained_longer
from lmsleep.recipes.settings import Scale
from lmsleep.sleep import Compact, Passes, SleepConfig, Sliding
from lmsleep.tasks import Recall
from lmsleep.tasks.recall.documents import KINDS
from lmsleep.tasks.recall.planted import HOP, RELATIONS, TOLD, label
from lmsleep.tasks.recall.task import LABELS, OPS
from lmsleep.training import RunConfig, TrainConfig

WINDOW = 96  # tokens; the longest texts fill two
# By N, and of LoRA: steps of the same FLOPs, counted once, for they are a minute's work to count.
STEPS, LORA_STEPS = {1: 98, 2: 66, 4: 40}, 60


# What a table takes together, by the names of kinds of question.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "facts": tuple(RELATIONS),
    **{f"other {told}": tuple(label(kind, told) for kind in RELATIONS) for told in TOLD[1:3]},
    "more filler": tuple(label(kind, TOLD[3]) for kind in RELATIONS),
    "hops": tuple(label(HOP, told) for told in TOLD),
    "documents": KINDS,
    "problems": tuple(f"op{op}" for op in range(OPS[0], OPS[1] + 1)),
}
TOGETHER = {name: tuple(map(LABELS.index, kinds)) for name, kinds in COLUMNS.items()}


def cells(scale: Scale) -> list[Cell]:
    """Refuse: there is nothing to begin with.

    Raises:
        ValueError: naming the tool that makes it.
    """
    raise ValueError(
        "recall begins with an adapter that was taught facts: make it with `python tools/smollm2.py`, and "
        "give weights, its folder runs/smollm2/facts/model"
    )


def fine_tuned(scale: Scale, adapter: Path) -> list[Cell]:
    """Return N = 1, 2, 4, more of N = 1, and LoRA as it reads with everything in view and with less.

    Raises:
        FileNotFoundError: if the adapter's base is not there.
        ValueError: for another scale than the demo's, or weights that are no adapter.
    """
    if scale != "demo":
        raise ValueError(f"recall at scale={scale}: it is of one small model; use scale=demo")
    if not is_adapter(adapter):
        raise ValueError(f"weights: {adapter} is no adapter; make one with `python tools/smollm2.py`")
    made = [Cell(f"N = {n}", run(adapter, n, steps)) for n, steps in STEPS.items()]
    made.append(trained_longer("N = 1", longest(adapter)))
    lora = _lora(whole(adapter))
    evicted = SleepConfig(window=WINDOW)
    read: dict[str, SleepConfig | None] = {
        "LoRA, everything in attention": None,
        "LoRA, sliding window": replace(evicted, eviction=Sliding()),
        "LoRA, compacted to the bytes of S": replace(evicted, eviction=Compact(bytes=_bytes(adapter))),
        "LoRA, evicted": evicted,
    }
    return [*made, *(Cell(name, lora, folder="LoRA", reading=way) for name, way in read.items())]


def run(adapter: Path, passes: int, steps: int) -> RunConfig:
    """Return a run that goes on from an adapter, looping the blocks that it loops."""
    loop = json.loads((adapter / "config.json").read_text())["sleep"]["consolidator"].get("loop")
    return RunConfig(
        task=task(whole(adapter)),
        model=FineTune(folder=adapter.resolve(), train="memory"),
        sleep=SleepConfig(window=WINDOW, consolidator=Passes(passes=passes, loop=loop and tuple(loop))),
        train=_train(steps, lr=0.01, adam_lr=1e-3),
    )


def longest(adapter: Path) -> RunConfig:
    """Return the run in one pass that is trained for longest, the last one of `tools/smollm2.py`."""
    return run(adapter, 1, LONGER * STEPS[1])


def _bytes(adapter: Path) -> int:
    """Return the bytes of `S`, float32, of all memory layers of an adapter."""
    with safe_open(adapter / "adapter.safetensors", framework="pt") as tensors:
        sizes = {name: tensors.get_slice(name).get_shape()[0] for name in tensors.keys()}  # noqa: SIM118
    heads = {name: size for name, size in sizes.items() if name.endswith("mixer.A_log")}
    # H heads of a width W in all have S of H (W / H) (W / H) numbers.
    return sum(4 * sizes[name.replace("A_log", "v_proj.weight")] ** 2 // H for name, H in heads.items())


def _lora(base: Path) -> RunConfig:
    """Return a run of LoRA on all blocks; memory layers, which attention alone needs, stay silent."""
    return RunConfig(
        task=task(base),
        model=FineTune(folder=base, train="lora", lora=16, insert=2 if attention_alone(base) else 0),
        sleep=SleepConfig(window=None),
        train=_train(LORA_STEPS, adam_lr=5e-4),
    )


def task(base: Path) -> Recall:
    """Return texts of all kinds, in the tokens of a base model."""
    return Recall(
        kinds=("facts", "hops", "documents", "problems", "prose"),
        shares=(3, 1, 1, 1, 2),
        facts=(2, 6),
        filler=(0, 3),
        length=2 * WINDOW,
        tokenizer=str(base),
    )


def _train(steps: int, **options: Any) -> TrainConfig:
    # New texts in every step: 64 batches, read again and again, were known by heart after 294 steps.
    return TrainConfig(
        steps=steps,
        batch_size=16,
        warmup=min(20, steps // 10),  # a share, or N = 4 would warm up for half of its few steps
        decay=0.5,
        threads=1,
        eval_every=10_000,  # at the end alone: it takes as long as many steps
        save_every=20,
        eval_batches=4,
        **options,
    )
