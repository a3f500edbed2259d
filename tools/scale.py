"""Write the tables of docs/scale.md: what a training step takes on 1, 8 and 64 GPUs.

python tools/scale.py             (all of them: minutes)
python tools/scale.py depo ...    (some)
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmsleep import HybridConfig
from lmsleep.cli.scale import lines, training_plan
from lmsleep.files import write_atomic
from lmsleep.models import BlockKind
from lmsleep.opening import find
from lmsleep.recipes.settings import depo, rule110
from lmsleep.recipes.table import as_markdown, published
from lmsleep.training import RunConfig, RunFolder

PAGE = Path(__file__).parents[1] / "docs/scale.md"
GDN, ATTENTION = "gated_delta_net", "attention"
# 24 blocks of Ouro, and six memory layers without a feed-forward layer.
OURO: tuple[BlockKind, ...] = (*(ATTENTION,) * 4, GDN) * 6
SEVEN: tuple[BlockKind, ...] = (GDN, GDN, GDN, ATTENTION) * 8
TEXT = {"batch": 64, "length": 8193, "accumulate": 64, "checkpoint": True}


@dataclass(frozen=True)
class Case:
    """What one table is of: a run or a model, and what `lmsleep info` is told beside."""

    model: RunConfig | HybridConfig
    windows: tuple[int, ...]
    shard: int = 1
    said: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "rule110": Case(rule110("paper", 4), (24,)),
    "depo": Case(depo("paper", 4), (75,)),
    "ouro": Case(
        HybridConfig(
            vocab_size=49152, d_model=2048, num_heads=16, mlp_dim=5632, blocks=OURO,
            overrides={i: {"mlp_dim": 0} for i, kind in enumerate(OURO) if kind == GDN},
        ),
        (1024, 4096), said=TEXT,
    ),
    "olmo-hybrid": Case(
        HybridConfig(
            vocab_size=100352, d_model=3840, num_heads=30, head_dim=128, mlp_dim=11008, blocks=SEVEN
        ),
        (1024, 2048), 8, {**TEXT, "gpu_memory": 141.0},
    ),
    "qwen3.5": Case(
        HybridConfig(
            vocab_size=151936, d_model=4096, num_heads=32, head_dim=128, mlp_dim=12288, blocks=SEVEN,
            overrides={
                i: {"num_heads": 16, "head_dim": 256, "num_kv_heads": 4}
                for i, kind in enumerate(SEVEN) if kind == ATTENTION
            },
        ),
        (1024, 2048), 8, {**TEXT, "gpu_memory": 180.0},
    ),
}  # fmt: skip


def block(name: str) -> str:
    """Return the table of a case, with the command that prints it."""
    case = CASES[name]
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as place:
        if isinstance(case.model, RunConfig):
            RunFolder(Path(place) / name).make(case.model)
        else:
            (Path(place) / name).mkdir()
            (Path(place) / name / "config.json").write_text(json.dumps(case.model.to_dict()))
        for L in case.windows:
            opened = find(Path(place) / name)
            model, sleep = opened.outline()
            sleep = type(sleep)(window=L, passes=4)
            found = training_plan(8, case.shard, case.said, opened.run, model, sleep)
            header, *steps = lines(found)
            rows += [[f"{L:,}", *line] for line in steps]
    flags = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in case.said.items())
    shard = f" --shard {case.shard}" if case.shard > 1 else ""
    command = f"lmsleep info {name} --gpus 8{shard} --window L {flags}".strip()
    held = found["step"]["memory"]
    said = ", ".join(f"{what} {size / 1e9:,.2f}" for what, size in held.items())
    table = as_markdown([["L", *header], *rows])
    return f"{table}\n\n`{command}`. Of the GB on 8 GPUs with the last L and N = 4: {said}."


def main(names: list[str]) -> None:
    """Write the tables into the page."""
    for name in names or CASES:
        page = published(PAGE.read_text(), {f"scale:{name}": block(name)})
        write_atomic(PAGE, page.encode())


if __name__ == "__main__":
    main(sys.argv[1:])
