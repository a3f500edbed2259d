"""`lmsleep info`: what a run or a model costs."""

import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from lmsleep.cli.methods import MethodOptions
from lmsleep.cli.options import parse
from lmsleep.cli.scale import CLUSTER, TRAINING, as_page, training_plan
from lmsleep.evaluation.capacity import Speed, Traffic, plan
from lmsleep.evaluation.cost import cost, on_meta
from lmsleep.opening import find
from lmsleep.plain import to_json

# What each plan has options for, by the flag that asks for it.
PLANS = {
    "users": ("flops", "turns", "tokens_read", "tokens_written", "peak", "busy"),
    "gpus": ("shard", *TRAINING, *CLUSTER),
}


@dataclass(frozen=True, kw_only=True)
class InfoOptions(MethodOptions):
    """Cost of a run's or model's architecture, before anyone pays it.

    --users N plans to serve so many users, --gpus K a step of training on so many GPUs.
    """

    path: Positional[Path]
    """A run, saved model or Hugging Face folder, a GGUF file, or a shipped model: depo-N1, depo-N4."""
    passes: int | None = None
    """N; default the run's, or 4."""
    users: int | None = None
    """Plan machines, waits and bytes for so many users of `lmsleep serve`."""
    flops: float | None = None
    """FLOP a second that a machine attains on this model, for --users; default 1e12. That a GPU attains, for
    --gpus; default 2e14."""
    turns: float | None = None
    """Turns of a user a day, for --users; default 20."""
    tokens_read: float | None = None
    """Tokens of a turn that are read, for --users; default 300."""
    tokens_written: float | None = None
    """Tokens of a turn that are written, for --users; default 100."""
    peak: float | None = None
    """Turns in the busiest hour over those in a mean one, for --users; default 3."""
    busy: float | None = None
    """Share of the busiest hour that a machine may work, for --users; default 0.7."""
    gpus: int | None = None
    """Plan a training step on so many GPUs: memory, FLOPs, bytes moved, seconds (docs/scale.md)."""
    shard: int | None = None
    """GPUs that hold one copy of the weights together, for --gpus; default 1: each holds a copy."""
    batch: int | None = None
    """Rows (contexts) of a step on all GPUs, for --gpus; default the run's, or 64."""
    length: int | None = None
    """Tokens of a row, all of them predicted, for --gpus; default the run's task, or 4,096."""
    accumulate: int | None = None
    """Parts that a step's batch is read in, of the same size on any number of GPUs, for --gpus; default the
    run's, or 1."""
    backprop_passes: int | None = None
    """Passes of a window through which gradients flow, for --gpus; default the run's, or all."""
    checkpoint: bool | None = None
    """Recompute activations in the backward pass, for --gpus; default as the run does, or False."""
    gpu_memory: float | None = None
    """GB of a GPU, for --gpus; default 80. Given, a step must fit on some number of GPUs."""
    node: int | None = None
    """GPUs of a node, for --gpus; default 8."""
    bandwidth: float | None = None
    """Bytes a second that a GPU sends within its node, for --gpus; default 3e11."""
    between: float | None = None
    """Bytes a second that a GPU sends to another node, for --gpus; default 4e10."""
    latency: float | None = None
    """Seconds that a collective takes, however little it moves, for --gpus; default 5e-5."""
    trust: bool = False
    """Run the Python files that the run or model names, though you have trained no run with them."""
    json: bool = False
    """Print one JSON document instead of text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.users is not None and self.gpus is not None:
            raise ValueError("--users plans serving, --gpus training; give one of them")
        for f in fields(self):
            plans = [plan for plan, names in PLANS.items() if f.name in names]
            if plans and getattr(self, f.name) is not None and all(getattr(self, p) is None for p in plans):
                flags = " or ".join(f"--{plan}" for plan in plans)
                raise ValueError(f"--{f.name.replace('_', '-')} plans for {flags}; name how many")

    def said(self, plan: str) -> dict[str, Any]:
        """Return what was said for a plan, beside how many it is for."""
        return {name: value for name in PLANS[plan] if (value := getattr(self, name)) is not None}


def info(argv: list[str]) -> None:
    """Run `lmsleep info RUN|MODEL`."""
    options = parse(InfoOptions, argv, "lmsleep info")
    place = find(options.path, trust=options.trust, attention_alone=options.leaves_some)
    # Shapes are enough, so that a model of any size costs no time.
    model, sleep = place.outline()
    sleep = options.over(sleep, options.passes)
    figures = cost(on_meta(model), sleep)
    if options.users is not None:
        said = options.said("users")
        speed = Speed.of(figures, said.pop("flops", 1e12))
        traffic = Traffic(users=options.users, **said)
        figures["plan"] = {**asdict(traffic), **plan(figures, traffic, speed)}
    if options.gpus is not None:
        said = options.said("gpus")
        figures["training"] = training_plan(options.gpus, said.pop("shard", 1), said, place.run, model, sleep)
    if options.json:
        sys.stdout.write(to_json(figures) + "\n")
        return
    sys.stdout.write(
        INFO.format_map({**figures, "blocks": " ".join(figures["blocks"]), "break_even": _even(figures)})
    )
    if "plan" in figures:
        sys.stdout.write(PLAN.format_map(figures["plan"]))
    if "training" in figures:
        sys.stdout.write(as_page(figures["training"]))


INFO = """parameters               {parameters:,}
blocks                   {blocks}
fast weights             {fast_weight_bytes:,} bytes a sequence (float32), whatever its length
keys and values          {kv_bytes_per_token:,} bytes a token (float32)
kept by the eviction     {kept_bytes:,} bytes a sequence
{break_even}
a wake token             {flops_wake_token:,} FLOP (the last of a window of {window})
a sleep, N = {passes}           {flops_sleep:,} FLOP, {flops_sleep_per_token:,.0f} a token of the window
"""


PLAN = """
for {users:,} users, {turns:g} turns a day each: {tokens_read:g} tokens read, {tokens_written:g} written
machines                 {machines:,}
in the busiest hour      {load:.0%} busy, {live_turns:,.1f} turns at a time, {live_bytes_a_turn:,} bytes each
a turn                   {turn_seconds:.3g} s to the end of its answer, on average
its sleep                {slept_seconds:.3g} s later, where it needs one
a machine's day, in s     {awake_seconds:,.0f} awake, {sleep_seconds:,.0f} asleep, {idle_seconds:,.0f} idle
on disk                  {disk_bytes_a_user:,} bytes a user, {disk_bytes:,} in all
"""


def _even(figures: dict[str, Any]) -> str:
    """Say from which length on the fast weights are smaller than a cache of keys and values."""
    tokens = figures["break_even_tokens"]
    if tokens is None:
        return "break-even               none: no block has a cache that grows"
    return f"break-even               the fast weights are the smaller of the two from {tokens:,} tokens on"
