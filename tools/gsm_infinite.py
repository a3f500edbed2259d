"""The distributions of the GSM-Infinite generator, as the Markdown tables of docs/tasks.md.

python tools/gsm_infinite.py [PROBLEMS per op, default 1000]
"""

import sys
from collections import Counter
from collections.abc import Iterable
from random import Random
from typing import Literal

import numpy as np

from lmsleep.tasks import batch_rng
from lmsleep.tasks.gsm_infinite import GSMInfinite
from lmsleep.tasks.gsm_infinite.meaning import Core, Definition
from lmsleep.tasks.gsm_infinite.task import draw_problem

OPS = 8
SETTINGS: list[tuple[Literal["medium", "hard"], Literal["forward", "reverse"]]] = [
    ("medium", "forward"),
    ("medium", "reverse"),
    ("hard", "forward"),
    ("hard", "reverse"),
]


def shape(definition: Definition) -> str:
    """Name the class of a right-hand side."""
    operands, constant, times, difference = definition
    if not operands:
        return "c"
    inner = {1: "x", 2: "x - y" if difference else "x + y"}.get(len(operands), "sum of 3+")
    if constant is None:
        return inner
    return f"c {'*' if times else '+'} x" if len(operands) == 1 else "c with a sum or difference"


def shares(values: Iterable[str]) -> str:
    """List values by frequency, in per cent."""
    counts = Counter(values)
    total = counts.total()
    return ", ".join(f"{name} {100 * n / total:.0f}" for name, n in counts.most_common())


def main() -> None:
    """Draw the problems and print the tables."""
    problems = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    drawn: dict[tuple[str, str], dict[int, list[Core]]] = {}
    for subset, mode in SETTINGS:
        # No medium problem has one operation (docs/tasks.md). A fixed seed: the tables can be made again.
        random, first = Random(0), 1 + (subset == "medium")
        drawn[subset, mode] = {
            op: [draw_problem(random, op, None, subset, mode, None)[0] for _ in range(problems)]
            for op in range(first, OPS + 1)
        }
    write = sys.stdout.write
    write(f"Most frequent answer, {problems} problems each:\n\n")
    write("| op | " + " | ".join(map(str, range(1, OPS + 1))) + " |\n|" + "---|" * (OPS + 1) + "\n")
    for setting, cores in drawn.items():
        best = {
            op: Counter(c.answer for c in some).most_common(1)[0][1] / problems for op, some in cores.items()
        }
        cells = [f"{best[op]:.2f}" if op in best else "-" for op in range(1, OPS + 1)]
        write(f"| {' '.join(setting)} | {' | '.join(cells)} |\n")
    write("\n| | end of the order, % | right-hand sides, % | statements |\n|---|---|---|---|\n")
    for setting, cores in drawn.items():
        every = [core for some in cores.values() for core in some]
        ends = shares((core.given[0] if core.given else core.query).kind for core in every)
        sides = shares(shape(d) for core in every for d in core.definitions.values())
        statements = np.mean([len(core.definitions) for core in every])
        write(f"| {' '.join(setting)} | {ends} | {sides} | {statements:.1f} |\n")
    write("\n| | tokens of the core | tokens of a context |\n|---|---|---|\n")
    for subset, mode in SETTINGS:
        cells = []
        # Without noise, and with it up to the lengths of the paper.
        for length, noise in (((0, 3300), False), ((2000, 3300), True)):
            task = GSMInfinite(
                subset=subset, mode=mode, ops=(1 + (subset == "medium"), OPS), length=length, noise=noise
            )
            lengths = task.batch(batch_rng(0, "train", 0), problems, "train").context_lengths
            assert lengths is not None
            # Median and 5 to 95 %: lengths are skewed, a mean would mislead.
            low, middle, high = np.percentile(lengths, [5, 50, 95])
            cells.append(f"{middle:.0f} ({low:.0f} ... {high:.0f})")
        write(f"| {subset} {mode} | {' | '.join(cells)} |\n")


if __name__ == "__main__":
    main()
