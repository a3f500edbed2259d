"""The floor of a reader that looks at numbers and follows no statement to another, as it was measured.

`tools/no_chain.py` measures it and writes `no_chain.json`, with the command, the seed and the commit.
"""

import json
from functools import cache
from importlib.resources import files
from math import log

from lmsleep.tasks.gsm_infinite.meaning import NOTHING, Core
from lmsleep.tasks.gsm_infinite.thinning import LETTERS

SHOWN = 10  # numbers that are told one by one, the smallest first


def features(core: Core, *, hidden: bool) -> list[float]:
    """Return what can be seen of a problem without chaining.

    The kind of the question; the statement about the asked parameter; the numbers in statements about the
    asked place, with sums and products; the value that a reverse problem gives. And all numbers of the
    problem, unless they are `hidden` among those of noise.
    """
    asked, said = core.query, core.definitions
    own = said.get(asked, NOTHING)
    seen = [
        *(float(asked.kind == kind) for kind in LETTERS),
        float(own.constant or 0), len(own.operands), own.times, own.difference,
        *(() if core.given is None else (core.given[1], *(core.given[0].kind == kind for kind in LETTERS))),
    ]  # fmt: skip
    place = {p: d.constant for p, d in said.items() if p.place == asked.place and d.constant is not None}
    for kinds in (("count",), ("average",), ("count", "average")):
        seen += _told([number for p, number in place.items() if p.kind in kinds])
    seen.append(sum(p.place == asked.place for p in said))
    if not hidden:
        seen += [*_told([d.constant for d in said.values() if d.constant is not None]), len(said)]
    return seen


def _told(numbers: list[int]) -> list[float]:
    """Tell numbers: how many, which, their sum, and (as its logarithm) their product."""
    first = sorted(numbers)[:SHOWN]
    return [len(numbers), sum(numbers), sum(map(log, numbers)), *first, *[0] * (SHOWN - len(first))]


def no_chain(
    subset: str, mode: str, ops: tuple[int, int], modulus: int | None, *, hidden: bool
) -> dict[str, float]:
    """Return the floor of each measured op, and over all if every op was; "mixed" tells its modes apart."""
    modes = ("forward", "reverse") if mode == "mixed" else (mode,)
    found = {
        op: [_measured().get((subset, one, modulus, hidden, op)) for one in modes]
        for op in range(ops[0], ops[1] + 1)
    }
    known = {
        op: sum(floor for floor in each if floor is not None) / len(each)
        for op, each in found.items()
        if None not in each
    }
    floors = {f"no chain op={op}": floor for op, floor in known.items()}
    if len(known) == len(found):
        floors = {"no chain": sum(known.values()) / len(known), **floors}
    return floors


@cache
def _measured() -> dict[tuple[str, str, int | None, bool, int], float]:
    rows = json.loads((files(__package__) / "no_chain.json").read_text())["rows"]
    return {(r["subset"], r["mode"], r["modulus"], r["hidden"], r["op"]): r["accuracy"] for r in rows}
