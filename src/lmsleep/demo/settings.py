"""The demo's runs as data: small models, tasks, and the settings found best for each N.

How they were found: `experiments/tune.py`; what else was tried: docs/demo.md.
"""

from typing import Any

from lmsleep.models import HybridConfig
from lmsleep.sleep import SleepConfig
from lmsleep.tasks import Depo, Rule110
from lmsleep.training import RunConfig, TrainConfig

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
DEPO_MODEL = HybridConfig(
    d_model=64,
    num_heads=4,
    head_dim=32,
    blocks=("attention", "gated_delta_net"),
    mlp_dim=0,
    forget=(0.001, 0.001),
)
DEPO_WINDOW = 8  # tokens: four edges, half of the graph
DEPO_STEPS = 1000  # of N = 4; the others get as many for equal tokens, more for equal compute
DEPO_TUNED: dict[int, dict[str, Any]] = {
    1: {"lr": 0.015, "adam_lr": 0.02, "curriculum": 350},
    2: {"lr": 0.03, "adam_lr": 0.02, "curriculum": 350},
    4: {"lr": 0.015, "adam_lr": 0.02, "curriculum": 350},
}

RULE110 = Rule110(width=20, states=1, t=4, asked=16, boundary="zero")
RULE110_MODEL = HybridConfig(
    d_model=64,
    num_heads=4,
    blocks=("attention", "gated_delta_net"),
    mlp_dim=128,
    forget=(0.001, 0.001),
)
RULE110_WINDOW = 20  # the state
RULE110_STEPS = 500
RULE110_TUNED: dict[int, dict[str, Any]] = {n: {"lr": 0.01, "adam_lr": 0.02} for n in (1, 2, 4)}


def depo(passes: int, seed: int, steps: int, **train: Any) -> RunConfig:
    """A pointer-chase run: a graph in two windows, both evicted, then eight questions."""
    return RunConfig(
        task=DEPO,
        model=DEPO_MODEL,
        sleep=SleepConfig(window=DEPO_WINDOW, passes=passes),
        train=_train(seed, steps, **{"batch_size": 64, **DEPO_TUNED[passes], **train}),
    )


def rule110(passes: int, seed: int, steps: int = RULE110_STEPS, **train: Any) -> RunConfig:
    """An automaton run: a state of 20 cells, evicted, then sixteen of its cells after 4 steps."""
    return RunConfig(
        task=RULE110,
        model=RULE110_MODEL,
        sleep=SleepConfig(window=RULE110_WINDOW, passes=passes),
        train=_train(seed, steps, **{"batch_size": 128, **RULE110_TUNED[passes], **train}),
    )


def _train(seed: int, steps: int, **options: Any) -> TrainConfig:
    defaults: dict[str, Any] = {"eval_every": 100, "save_every": 250, "threads": 1}
    return TrainConfig(seed=seed, steps=steps, **{**defaults, **options})
