"""The demo's runs: which there are, how long each is, and what is read off them."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lmsleep.demo import settings
from lmsleep.evaluation import EVAL_SEED, evaluate
from lmsleep.microscope import watch
from lmsleep.tasks import batch_rng
from lmsleep.training import Job, RunConfig, RunFolder, baseline, equal_compute

PASSES = (1, 2, 4)
BOUNDS = ("transformer-evicted", "transformer-cached")  # not contestants: one seed tells enough


@cache
def equal_steps(make: Callable[..., RunConfig], passes: int, steps: int) -> int:
    """Steps that cost as many training FLOPs as `steps` steps with N = 4."""
    return equal_compute(make(passes, 0, steps), make(4, 0, steps)).train.steps


def demo_jobs(out: Path, seeds: Sequence[int], tasks: Sequence[str], scale: float = 1.0) -> list[Job]:
    """Every run of the demo, longest first. `scale` shortens all of them alike (for tests)."""
    makers: dict[str, tuple[Callable[..., RunConfig], int]] = {
        "depo": (settings.depo, max(2, round(scale * settings.DEPO_STEPS))),
        "rule110": (settings.rule110, max(2, round(scale * settings.RULE110_STEPS))),
    }
    jobs = []
    for seed in seeds:
        for task in tasks:
            make, steps = makers[task]
            for passes in reversed(PASSES):
                name = f"{task}-N{passes}-seed{seed}"
                tokens = Job(out / name if passes == 4 else out / f"{name}-tokens", make(passes, seed, steps))
                long = equal_steps(make, passes, steps)
                jobs.append(tokens if passes == 4 else Job(out / name, make(passes, seed, long), tokens))
    if "depo" in tasks:
        for name in BOUNDS:
            config = baseline(name, settings.depo(1, seeds[0], makers["depo"][1]))
            jobs.append(Job(out / f"depo-{name}-seed{seeds[0]}", config))
    return jobs


def collect(out: Path, seeds: Sequence[int], tasks: Sequence[str]) -> dict[str, Any]:
    """All figures of finished demo runs as one JSON document: rows, curves, passes read, fast weights."""
    result: dict[str, Any] = {}
    for task in tasks:
        rows, curves = [], []
        for folder in sorted(p for p in out.iterdir() if p.name.startswith(f"{task}-")):
            run = RunFolder.open(folder)
            config, report = run.config(), run.report()
            if report is None or config.train.seed not in seeds:
                continue
            label, budget = _label(config, folder.name)
            rows.append({"label": label, "budget": budget, "seed": config.train.seed, **report})
            if budget != "tokens":
                points = [m for m in run.metrics() if "eval" in m]
                curves.append({
                    "label": label,
                    "seed": config.train.seed,
                    **{key: [p[key] for p in points] for key in ("step", "tokens", "flops", "seconds")},
                    "per_difficulty": [p["eval"]["per_difficulty"] for p in points],
                    "accuracy": [p["eval"]["accuracy"] for p in points],
                })  # fmt: skip
        config = getattr(settings, task)(4, 0, 1)
        result[task] = {
            "made_by": RunFolder.open(out / f"{task}-N4-seed{seeds[0]}").made_by(),
            "seeds": list(seeds),
            "config": config.to_dict(),
            "tuned": {str(n): t for n, t in getattr(settings, f"{task.upper()}_TUNED").items()},
            "floors": config.task.floors(),
            "difficulty": config.task.difficulty_name,
            "rows": rows,
            "curves": curves,
        }
    if "depo" in tasks:
        result["depo"]["passes_read"] = {str(s): _passes_read(out / f"depo-N4-seed{s}") for s in seeds}
        result["depo"]["sleep"] = _sleep_pictures(out / f"depo-N4-seed{seeds[0]}")
    return result


def _label(config: RunConfig, name: str) -> tuple[str, str]:
    """What a row is called, and what it has in common with the N = 4 run: tokens, compute, or both."""
    if "gated_delta_net" not in config.architecture.blocks:
        kept = config.sleep.window is None
        return ("transformer, cache kept" if kept else "transformer, cache evicted"), "tokens"
    label = f"hybrid, N = {config.sleep.passes}"
    if config.sleep.passes == 4:
        return label, "both"
    return label, "tokens" if name.endswith("-tokens") else "compute"


def _passes_read(path: Path) -> dict[str, dict[str, float]]:
    """Accuracy per hop of an N = 4 model that is read with 1, 2, ... passes."""
    run = RunFolder.open(path)
    config, model = run.config(), run.model()
    scores = {}
    for passes in (1, 2, 3, 4, 6):
        score = evaluate(model, config.task, config.sleep.with_passes(passes), batches=4)
        scores[str(passes)] = {str(k): v for k, v in score.per_difficulty.items()}
    return scores


def _sleep_pictures(path: Path) -> dict[str, Any]:
    """What one sleep does to the fast weights: norms and changes over passes, and one head's matrix."""
    run = RunFolder.open(path)
    config, model = run.config(), run.model()
    batch = config.task.batch(batch_rng(EVAL_SEED, "test", 0), 64, "test")
    assert batch.context is not None
    block = config.architecture.blocks.index("gated_delta_net")
    trace = []
    for watched in watch(model, batch.context, config.sleep):
        trace.append([S for each in watched.passes if (S := each.memory.S[block]) is not None])
    norm = [[float(torch.linalg.matrix_norm(S).mean()) for S in window] for window in trace]
    change: list[list[float]] = []
    before = torch.zeros_like(trace[0][0])
    for window in trace:
        change.append([])
        for S in window:
            change[-1].append(float(torch.linalg.matrix_norm(S - before).mean()))
            before = S
    return {
        "norm": norm,
        "change": change,
        "matrices": [[[[round(x, 4) for x in row] for row in S[0, 0].tolist()] for S in w] for w in trace],
    }
