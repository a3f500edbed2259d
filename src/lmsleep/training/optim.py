"""Muon for the matrices inside the blocks, AdamW for the rest (the paper's recipe), and all schedules."""

from collections.abc import Sequence

import numpy as np
from torch import nn
from torch.optim import AdamW, Optimizer

from lmsleep.backbones import Model
from lmsleep.sleep import SleepConfig
from lmsleep.training.config import TrainConfig
from lmsleep.training.muon import Muon

# Rows of these few-row projections are independent gates, not a map to be orthogonalised.
GATES = ("a_proj", "b_proj", "f_a_proj", "f_b_proj", "r_proj", "in_proj_a", "in_proj_b", "in_proj_ba")


def optimizers(model: Model, config: TrainConfig) -> list[Optimizer]:
    """Make Muon over the weights of linear layers in `model.blocks`, AdamW over all others.

    Gates are left to AdamW, and so are adapters, whose two factors are no map by themselves. Parameters that
    need no gradient are left out.
    """
    matrices = [
        module.weight
        for name, module in model.blocks.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in GATES and "lora_" not in name
    ]
    matrices = [p for p in matrices if p.requires_grad]
    # By identity: tensors compare element by element.
    ids = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    # Squares are remembered for some 20 steps; the default .999 would reach back over all of a short run.
    adam = AdamW(rest, lr=config.adam_lr, weight_decay=config.weight_decay, betas=(0.9, 0.95))
    # Adapters alone, say: an optimizer refuses to be made of nothing.
    if not matrices:
        return [adam]
    # Who asks for it has a CPU with instructions for it.
    bfloat16 = config.precision == "bfloat16"
    return [Muon(matrices, lr=config.lr, weight_decay=config.weight_decay, bfloat16=bfloat16), adam]


def set_rates(optimizers: Sequence[Optimizer], step: int, config: TrainConfig) -> float:
    """Set the learning rates of a step; return their factor on the largest ones."""
    factor = schedule(step, config)
    for optimizer in optimizers:
        # From the configuration, not from the group, whose rate is that of the step before.
        largest = config.lr if isinstance(optimizer, Muon) else config.adam_lr
        for group in optimizer.param_groups:
            group["lr"] = largest * factor
    return factor


def schedule(step: int, config: TrainConfig) -> float:
    """Return the factor on the learning rates at `step` (from 0): linear rise, plateau, linear fall to zero.

    Before the fall it does not depend on `config.steps`: a long run shares its start with a short one.
    """
    # Steps count from 0, and the first one should move something.
    rise = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    falling = config.decay * config.steps
    fall = min(1.0, (config.steps - step) / falling) if falling else 1.0
    return rise * fall


def level(step: int, config: TrainConfig) -> float:
    """Return the difficulty level in (0, 1] at `step`: the curriculum."""
    return min(1.0, (step + 1) / config.curriculum) if config.curriculum else 1.0


def sleep_at(step: int, sleep: SleepConfig, config: TrainConfig) -> SleepConfig:
    """Return the sleep of a step: that of the run, `sleep`, with the passes that are due or drawn."""
    if step < config.early_steps:
        sleep = sleep.with_passes(min(config.early_passes, sleep.passes))
    if not config.random_passes:
        return sleep
    # By seed and step, like batches: a run that goes on draws what it would have drawn.
    passes = int(np.random.default_rng((config.seed, step)).integers(1, sleep.passes + 1))
    return sleep.with_passes(passes)
