"""`lmsleep info`: what a run or a model costs."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from lmsleep.cli.options import parse
from lmsleep.evaluation.cost import cost, on_meta
from lmsleep.opening import find
from lmsleep.plain import to_json


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """Cost of a run's or model's architecture, before anyone pays it."""

    path: Positional[Path]
    """Folder of a run or of a saved model, or a shipped one: depo-N1, depo-N4."""
    window: int | None = None
    """L; default the run's, or 64."""
    passes: int | None = None
    """N; default the run's, or 4."""
    trust: bool = False
    """Run the Python files that the run or model names, though you have trained no run with them."""
    json: bool = False
    """Print one JSON document instead of text."""


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
    if options.json:
        sys.stdout.write(to_json(figures) + "\n")
        return
    sys.stdout.write(
        INFO.format_map({**figures, "blocks": " ".join(figures["blocks"]), "break_even": _even(figures)})
    )


INFO = """parameters               {parameters:,}
blocks                   {blocks}
fast weights             {fast_weight_bytes:,} bytes a sequence (float32), whatever its length
keys and values          {kv_bytes_per_token:,} bytes a token (float32)
{break_even}
a wake token             {flops_wake_token:,} FLOP (the last of a window of {window})
a sleep, N = {passes}           {flops_sleep:,} FLOP, {flops_sleep_per_token:,.0f} a token of the window
"""


def _even(figures: dict[str, Any]) -> str:
    """Say from which length on the fast weights are smaller than a cache of keys and values."""
    tokens = figures["break_even_tokens"]
    if tokens is None:
        return "break-even               none: no block has a cache that grows"
    return f"break-even               the fast weights are the smaller of the two from {tokens:,} tokens on"
