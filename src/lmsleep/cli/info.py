"""`lmsleep info`: what a run or a model costs."""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from lmsleep.cli.options import parse
from lmsleep.evaluation.capacity import Speed, Traffic, plan
from lmsleep.evaluation.cost import cost, on_meta
from lmsleep.opening import find
from lmsleep.plain import to_json


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """Cost of a run's or model's architecture, before anyone pays it; with --users, of serving so many."""

    path: Positional[Path]
    """Folder of a run or of a saved model, or a shipped one: depo-N1, depo-N4."""
    window: int | None = None
    """L; default the run's, or 64."""
    passes: int | None = None
    """N; default the run's, or 4."""
    users: int | None = None
    """Plan machines, waits and bytes for so many users of `lmsleep serve`."""
    flops: float | None = None
    """FLOP a second that a machine attains on this model, for --users; default 1e12."""
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
    trust: bool = False
    """Run the Python files that the run or model names, though you have trained no run with them."""
    json: bool = False
    """Print one JSON document instead of text."""

    def __post_init__(self) -> None:
        if self.users is None and (given := [*self.planned()]):
            raise ValueError(f"--{given[0].replace('_', '-')} plans for --users; name how many")

    def planned(self) -> dict[str, float]:
        """Return what was said of the users, beside how many they are."""
        names = ("flops", "turns", "tokens_read", "tokens_written", "peak", "busy")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def info(argv: list[str]) -> None:
    """Run `lmsleep info RUN|MODEL`."""
    options = parse(InfoOptions, argv, "lmsleep info")
    # As before training, which needs no checkpoint: cost does not hang on weights.
    model, sleep = find(options.path, trust=options.trust).backbone("cpu", trained=False)
    sleep = replace(
        sleep,
        window=sleep.window if options.window is None else options.window,
        consolidator=sleep.with_passes(
            sleep.passes if options.passes is None else options.passes
        ).consolidator,
    )
    # Shapes are enough, so that a model of any size costs no time.
    figures = cost(on_meta(model), sleep)
    if options.users is not None:
        said = options.planned()
        speed = Speed.of(figures, said.pop("flops", 1e12))
        traffic = Traffic(users=options.users, **said)
        figures["plan"] = {**asdict(traffic), **plan(figures, traffic, speed)}
    if options.json:
        sys.stdout.write(to_json(figures) + "\n")
        return
    sys.stdout.write(
        INFO.format_map({**figures, "blocks": " ".join(figures["blocks"]), "break_even": _even(figures)})
    )
    if "plan" in figures:
        sys.stdout.write(PLAN.format_map(figures["plan"]))


INFO = """parameters               {parameters:,}
blocks                   {blocks}
fast weights             {fast_weight_bytes:,} bytes a sequence (float32), whatever its length
keys and values          {kv_bytes_per_token:,} bytes a token (float32)
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
