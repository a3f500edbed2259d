"""Named settings of `lmsleep train`: experiments as data."""

from typing import Any

from lmsleep.demo import settings
from lmsleep.models import BlockKind, HybridConfig
from lmsleep.sleep import SleepConfig
from lmsleep.tasks import MQAR, Depo, Drift, GSMInfinite, GSMSymbolic, Rule110, Task, Variables, WordProblem
from lmsleep.training import RunConfig, TrainConfig

PAPER_TRAIN: dict[str, Any] = {
    "lr": 2e-3,
    "adam_lr": 5e-5,
    "curriculum": 0,
    "eval_every": 1000,
    "save_every": 1000,
}
ALTERNATING: tuple[BlockKind, ...] = ("attention", "gated_delta_net", "attention", "gated_delta_net")

PAPER_BLOCKS = (
    3 * ALTERNATING
)  # stands for the pretrained models of figures 4 and 5; the middle half is looped


def _sections(config: RunConfig) -> dict[str, Any]:
    return {"task": config.task, "model": config.model, "sleep": config.sleep, "train": config.train}


def _small(task: Task, window: int, passes: int = 4, **train: Any) -> dict[str, Any]:
    """The demo's model on another task; its learning rates are the demo's, not tuned for this one."""
    defaults = {"steps": 2000, "lr": 0.01, "adam_lr": 0.02, "eval_every": 200, "curriculum": 500}
    sleep = SleepConfig(window=window, passes=passes)
    options = TrainConfig(**{**defaults, **train})
    return {"task": task, "model": settings.DEPO_MODEL, "sleep": sleep, "train": options}


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "depo": {
        "demo": _sections(settings.depo(4, 0, settings.DEPO_STEPS, threads=None)),
        "paper": {
            "task": Depo(),
            "model": HybridConfig(d_model=512, num_heads=8, blocks=ALTERNATING),
            "sleep": SleepConfig(window=75, passes=4),
            "train": TrainConfig(batch_size=128, steps=100_000, **PAPER_TRAIN),
        },
    },
    "rule110": {
        "demo": _sections(settings.rule110(4, 0, threads=None)),
        "paper": {
            "task": Rule110(t=32),
            "model": HybridConfig(d_model=256, num_heads=4, blocks=ALTERNATING),
            "sleep": SleepConfig(window=24, passes=4),
            "train": TrainConfig(batch_size=512, steps=97_000, **PAPER_TRAIN),
        },
    },
    "mqar": {"demo": _small(MQAR(), window=16)},
    "word-problem": {"demo": _small(WordProblem(length=8, queries=4), window=4)},
    "variables": {"demo": _small(Variables(), window=16)},
    "drift": {"demo": _small(Drift(), window=8, passes=2, steps=400, batch_size=32, curriculum=0)},
    "gsm-infinite": {
        "demo": _small(
            GSMInfinite(subset="medium", mode="forward", ops=(2, 3), length=(0, 128)),
            window=64,
            steps=600,
            batch_size=32,
            curriculum=0,
        ),
        "paper": {
            "task": GSMInfinite(),
            "model": HybridConfig(d_model=512, num_heads=8, blocks=PAPER_BLOCKS),
            "sleep": SleepConfig(window=2000, passes=4, loop=(3, 9)),
            "train": TrainConfig(batch_size=256, steps=10_000, **{**PAPER_TRAIN, "lr": 1e-3}),
        },
    },
    "gsm-symbolic": {"demo": _small(GSMSymbolic(), window=32)},
    "text": {
        "demo": {
            "model": HybridConfig(d_model=128, blocks=ALTERNATING[:2], forget=(0.001, 0.05)),
            "sleep": SleepConfig(window=64, passes=2),
            "train": TrainConfig(steps=600, batch_size=16, lr=0.01, adam_lr=3e-3),
        },
    },
}


OWN = {"demo": {key: part for key, part in _small(MQAR(), window=16).items() if key != "task"}}


def preset(task: str, name: str) -> dict[str, Any]:
    """Sections (task, model, sleep, train) of a preset; `OWN` for tasks that are not listed.

    Raises:
        ValueError: if the task has no preset of that name.
    """
    presets = PRESETS.get(task, OWN)
    if name not in presets:
        raise ValueError(f"preset={name!r} is unknown for {task}; choose one of {', '.join(presets)}")
    return presets[name]
