"""The recipes: the paper's figures on tasks trained from scratch, and the comparisons it left out.

`demo` is the demo's setting, tuned, minutes a figure on two cores. `paper` is the paper's own setting, for
a GPU. `small` lies between, hours on two cores: the paper's learning rates on a smaller model and task;
nothing of it is tuned.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lmsleep.demo import settings
from lmsleep.models import BlockKind, HybridConfig
from lmsleep.reproduce.recipe import Cell, Recipe, Scale
from lmsleep.sleep import SleepConfig
from lmsleep.tasks import Depo, Rule110
from lmsleep.training import BASELINES, RunConfig, TrainConfig, baseline

ALTERNATING: tuple[BlockKind, ...] = ("attention", "gated_delta_net", "attention", "gated_delta_net")
RATES: dict[str, Any] = {"lr": 2e-3, "adam_lr": 5e-5, "eval_every": 1000, "save_every": 1000}


def rule110(scale: Scale, passes: int, t: int | None = None) -> RunConfig:
    """Rule 110 read with N passes; `t` updates, by default those of the paper's figure 2b."""
    if scale == "demo":
        return replace(settings.rule110(passes, 0), task=replace(settings.RULE110, t=t or settings.RULE110.t))
    small = scale == "small"
    return RunConfig(
        task=Rule110(t=t or (8 if small else 32)),
        model=HybridConfig(d_model=128 if small else 256, num_heads=4, blocks=ALTERNATING),
        sleep=SleepConfig(window=24, passes=passes),
        train=TrainConfig(batch_size=128 if small else 512, steps=4_000 if small else 97_000, **RATES),
    )


def depo(scale: Scale, passes: int) -> RunConfig:
    """Depo read with N passes."""
    if scale == "demo":
        return settings.depo(passes, 0, settings.DEPO_STEPS)
    small = scale == "small"
    task = Depo(nodes=20, hops=8, queries=8) if small else Depo()
    return RunConfig(
        task=task,
        model=HybridConfig(d_model=128 if small else 512, num_heads=4 if small else 8, blocks=ALTERNATING),
        sleep=SleepConfig(window=task.context_length // 4, passes=passes),
        train=TrainConfig(batch_size=64 if small else 128, steps=8_000 if small else 100_000, **RATES),
    )


def _by_passes(make: Any, passes: Sequence[int]) -> Any:
    return lambda scale: [Cell(f"N = {n}", make(scale, n)) for n in passes]


def _by_steps(scale: Scale) -> list[Cell]:
    times = {"demo": (1, 2, 3, 4), "small": (2, 4, 6, 8), "paper": (4, 8, 10, 12, 14, 16)}[scale]
    return [Cell(f"t = {t}", rule110(scale, 1, t)) for t in times]


def _baselines(scale: Scale) -> list[Cell]:
    asleep = depo(scale, 4)
    return [Cell("N = 4", asleep), *(Cell(name, baseline(name, asleep)) for name in BASELINES)]


def _random_passes(scale: Scale) -> list[Cell]:
    run = depo(scale, 4)
    drawn = replace(run, train=replace(run.train, random_passes=True))
    return [*_by_passes(depo, (1, 2, 4))(scale), Cell("N drawn from 1 ... 4", drawn)]


def _update_rules(scale: Scale) -> list[Cell]:
    cells = []
    rules: tuple[BlockKind, ...] = ("gated_delta_net", "gated_linear")
    for rule in rules:
        for n in (1, 4):
            run = depo(scale, n)
            blocks = tuple(kind if kind == "attention" else rule for kind in run.model.blocks)
            cells.append(Cell(f"{rule}, N = {n}", replace(run, model=replace(run.model, blocks=blocks))))
    return cells


def _state_sizes(scale: Scale) -> list[Cell]:
    cells = []
    for size in (4, 8, 16, 32):
        for n in (1, 4):
            run = depo(scale, n)
            model = replace(run.model, head_dim=size)
            cells.append(Cell(f"{size} x {size} a head, N = {n}", replace(run, model=model)))
    return cells


RECIPES: dict[str, Recipe] = {
    "2a": Recipe(
        "Rule 110, one pass, more and more updates",
        "Paper: with N = 1 accuracy falls sharply as t grows.",
        _by_steps,
        ("tokens", "final"),
    ),
    "2b": Recipe(
        "Rule 110 with N passes",
        "Paper (t = 32): N = 1 about .10, N = 2 about .20, N = 3 and 4 above .30 exact.",
        _by_passes(rule110, (1, 2, 4)),
        ("tokens", "flops", "final"),
    ),
    "3": Recipe(
        "Depo: k hops along a hidden cycle",
        "Paper: N = 1 stalls at k >= 4, N = 2 at k >= 8; only N = 4 starts on k = 16.",
        _by_passes(depo, (1, 2, 4)),
        ("tokens", "difficulty"),
    ),
    "baselines": Recipe(
        "Depo: N = 4 beside what else the compute could buy",
        "Not in the paper: equal compute, and what each half of the carry (h, S) is worth.",
        _baselines,
        ("flops", "final"),
    ),
    "passes": Recipe(
        "Depo: passes when trained against passes when read",
        "Not in the paper: can a model be read with another N than it was trained with?",
        _random_passes,
        ("passes", "difficulty"),
        read=(1, 2, 3, 4, 6, 8),
    ),
    "rule": Recipe(
        "Depo: the update rule of the fast weights",
        "Not in the paper: does the delta rule matter, and for which N?",
        _update_rules,
        ("tokens", "difficulty"),
    ),
    "state": Recipe(
        "Depo: the size of the fast weights",
        "Not in the paper: can passes stand in for state, or state for passes?",
        _state_sizes,
        ("difficulty", "final"),
    ),
}
