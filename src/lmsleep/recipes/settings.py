"""Settings of runs, each said once: the demo's, harder ones, the paper's, and those of `lmsleep train`.

How the demo's were found: `tools/tune.py`; what else was tried: docs/demo.md. Where the paper leaves a
choice: docs/fidelity.md.
"""

from dataclasses import replace
from typing import Any, Literal

from lmsleep.models import BlockKind, HybridConfig
from lmsleep.sleep import SleepConfig
from lmsleep.tasks import (
    MQAR,
    Depo,
    Drift,
    GSMInfinite,
    GSMSymbolic,
    Recall,
    Rule110,
    Task,
    Variables,
    WordProblem,
)
from lmsleep.training import RunConfig, TrainConfig

Scale = Literal["demo", "small", "paper"]
PAIR: tuple[BlockKind, ...] = ("attention", "gated_delta_net")
PAPER_TRAIN: dict[str, Any] = {"lr": 2e-3, "adam_lr": 5e-5, "eval_every": 1000, "save_every": 1000}

DEPO = Depo(
    nodes=8,
    hops=4,
    queries=8,
    names=8,
    name_lengths=(1, 1),
    node_distribution="fixed",
    test_hops="all",
    ask="fork",
    held_out_cycles=True,
)
DEPO_MODEL = HybridConfig(d_model=64, num_heads=4, head_dim=32, blocks=PAIR, mlp_dim=0, forget=(0.001, 0.001))
DEPO_STEPS = 1000
DEPO_TUNED: dict[int, dict[str, Any]] = {
    1: {"lr": 0.015, "adam_lr": 0.02, "curriculum": 350},
    2: {"lr": 0.03, "adam_lr": 0.02, "curriculum": 350},
    4: {"lr": 0.015, "adam_lr": 0.02, "curriculum": 350},
}

RULE110 = Rule110(width=20, states=1, t=4, asked=16, boundary="zero")
RULE110_MODEL = HybridConfig(d_model=64, num_heads=4, blocks=PAIR, mlp_dim=128, forget=(0.001, 0.001))
RULE110_STEPS = 500
RULE110_TUNED: dict[int, dict[str, Any]] = {n: {"lr": 0.01, "adam_lr": 0.02} for n in (1, 2, 4)}


DEMO_TRAIN: dict[str, Any] = {"eval_every": 100, "save_every": 250, "threads": 1}
# The scale `small`: twice as wide and deep, with feed-forward layers; one rate for every N, nothing tuned.
SMALL_TRAIN: dict[str, Any] = {"steps": 2000, "lr": 0.01, "adam_lr": 0.01, "eval_every": 250}
SMALL_MODEL = HybridConfig(d_model=128, num_heads=4, blocks=2 * PAIR, forget=DEPO_MODEL.forget)


def depo(scale: Scale, passes: int, **train: Any) -> RunConfig:
    """Return a pointer-chase run that sleeps N passes; `train` replaces fields of its `TrainConfig`.

    At the demo's scale the graph is read in two windows, both evicted, then eight questions are asked.
    """
    if scale == "paper":
        task, given = Depo(), {"batch_size": 128, "steps": 100_000, **PAPER_TRAIN, **train}
        model = HybridConfig(d_model=512, num_heads=8, blocks=5 * PAIR)
        # 300 tokens in four windows: L = 75.
        return _run(task, model, task.context_length // 4, passes, given)
    task, given = DEPO, {"batch_size": 64, "steps": DEPO_STEPS, **DEPO_TUNED[passes]}
    if scale == "small":
        task = replace(DEPO, nodes=12, names=12, hops=6)
        given |= {**SMALL_TRAIN, "curriculum": SMALL_TRAIN["steps"] // 3}
    model = SMALL_MODEL if scale == "small" else DEPO_MODEL
    # `train` comes last: what a caller asks for wins over what is tuned.
    return _run(task, model, task.context_length // 2, passes, {**DEMO_TRAIN, **given, **train})


def rule110(scale: Scale, passes: int, t: int | None = None, **train: Any) -> RunConfig:
    """Return an automaton run: a state is read and evicted, then cells are asked for after `t` updates.

    By default `t` is that of the paper's figure 2b at its scale, 4 or 8 at ours.
    """
    if scale == "paper":
        given = {"batch_size": 512, "steps": 97_000, **PAPER_TRAIN, **train}
        return _run(
            Rule110(t=t or 32), HybridConfig(d_model=256, num_heads=4, blocks=2 * PAIR), 24, passes, given
        )
    tuned = RULE110_TUNED.get(passes, RULE110_TUNED[4])  # N = 3 takes the rates of N = 4
    given = {"batch_size": 128, "steps": RULE110_STEPS, **tuned}
    task, model = replace(RULE110, t=t or RULE110.t), RULE110_MODEL
    if scale == "small":
        task, model = replace(RULE110, t=t or 8), SMALL_MODEL
        given |= SMALL_TRAIN
    return _run(task, model, RULE110.width, passes, {**DEMO_TRAIN, **given, **train})


def _run(task: Task, model: HybridConfig, window: int, passes: int, train: dict[str, Any]) -> RunConfig:
    """Put a run together from its parts, under hard eviction."""
    sleep = SleepConfig(window=window, passes=passes)
    return RunConfig(task=task, model=model, sleep=sleep, train=TrainConfig(**train))


def _sections(config: RunConfig) -> dict[str, Any]:
    """Return a run as the sections of a preset."""
    return {"task": config.task, "model": config.model, "sleep": config.sleep, "train": config.train}


def _as_the_demo(task: Task, window: int, passes: int = 4, **train: Any) -> dict[str, Any]:
    """Return the demo's model on another task; its learning rates are the demo's, not tuned for this one."""
    defaults = {"steps": 2000, "lr": 0.01, "adam_lr": 0.02, "eval_every": 200, "curriculum": 500}
    return _sections(_run(task, DEPO_MODEL, window, passes, {**defaults, **train}))


# Modulo 23 no constant answer pays, and numbers in the noise do not give the problem away.
SHORT_GSM = GSMInfinite(
    subset="medium", mode="forward", ops=(2, 3), length=(0, 128), modulus=23, noise_numbers=True
)
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "depo": {
        "demo": _sections(depo("demo", 4, threads=None)),
        "paper": _sections(depo("paper", 4)),
    },
    "rule110": {
        "demo": _sections(rule110("demo", 4, threads=None)),
        "paper": _sections(rule110("paper", 4)),
    },
    "mqar": {"demo": _as_the_demo(MQAR(), window=16)},
    "word-problem": {"demo": _as_the_demo(WordProblem(length=8, queries=4), window=4)},
    "variables": {"demo": _as_the_demo(Variables(), window=16)},
    "drift": {"demo": _as_the_demo(Drift(), window=8, passes=2, steps=400, batch_size=32, curriculum=0)},
    "gsm-infinite": {
        "demo": _as_the_demo(SHORT_GSM, window=64, steps=600, batch_size=32, curriculum=0),
        "paper": {
            "task": GSMInfinite(),
            # Stands for the pretrained models of figures 4 and 5; the middle half is looped.
            "model": HybridConfig(d_model=512, num_heads=8, blocks=6 * PAIR),
            "sleep": SleepConfig(window=2000, passes=4, loop=(3, 9)),
            "train": TrainConfig(batch_size=256, steps=10_000, **{**PAPER_TRAIN, "lr": 1e-3}),
        },
    },
    "gsm-symbolic": {"demo": _as_the_demo(GSMSymbolic(), window=32)},
    "recall": {"demo": _as_the_demo(Recall(), window=1000)},
    "text": {
        "demo": {
            "model": HybridConfig(d_model=128, blocks=PAIR, forget=(0.001, 0.05)),
            "sleep": SleepConfig(window=64, passes=2),
            "train": TrainConfig(steps=600, batch_size=16, lr=0.01, adam_lr=3e-3),
        },
    },
}
OWN = {"demo": {key: part for key, part in _as_the_demo(MQAR(), window=16).items() if key != "task"}}


def preset(task: str, name: str) -> dict[str, Any]:
    """Return the sections (task, model, sleep, train) of a preset; those of `OWN` for unlisted tasks.

    Raises:
        ValueError: if the task has no preset of that name.
    """
    presets = PRESETS.get(task, OWN)
    if name not in presets:
        raise ValueError(f"preset={name!r} is unknown for {task}; choose one of {', '.join(presets)}")
    return presets[name]
