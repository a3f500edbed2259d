"""Find how many hard GSM-Infinite problems of each make to throw away, so that the mix is the original's.

python tools/thinning.py [PROBLEMS per op, default 3000] writes the table in tasks/gsm_infinite/thinning.py.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from random import Random

from lmsleep.tasks.gsm_infinite import thinning
from lmsleep.tasks.gsm_infinite.graph import draw_graph
from lmsleep.tasks.gsm_infinite.meaning import draw_core

ROOT = Path(__file__).parents[1]
ORIGINAL = ROOT / "tests/golden/gsm_infinite_hard.json"
TRIES = 3.0  # times as many draws as without thinning, at most: what is rarer yet stays too rare
COMMON = 0.012  # the share from which on a make of problem has a number of its own


def drawn(ops: int, problems: int) -> Counter[str]:
    """Count the kinds of necessary parameters of problems that are not thinned."""
    random, found = Random(ops), Counter[str]()
    while found.total() < problems:
        graph = draw_graph(random, ops, hard=True, reverse=False)
        if graph is not None and draw_core(random, graph, reverse=False, modulus=None) is not None:
            found[thinning.kinds(graph.order)] += 1
    return found


def kept(original: dict[str, int], ours: Counter[str]) -> dict[str, float]:
    """Return the share to keep of each common make, and of all others under ""."""
    there, here = sum(original.values()), ours.total()
    common = [make for make, number in ours.most_common() if number / here >= COMMON]
    wanted = {make: original.get(make, 0) / there for make in common}
    share = {make: ours[make] / here for make in common}
    wanted[""], share[""] = 1 - sum(wanted.values()), 1 - sum(share.values())
    ratio = {make: wanted[make] / share[make] for make in share if share[make] > 0}
    most = min(TRIES, max(ratio.values()))
    return {"": 1.0} | {make: round(min(1.0, r / most), 2) for make, r in ratio.items()}


def main() -> None:
    """Draw, compare, and write the table."""
    problems = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
    original = json.loads(ORIGINAL.read_text())["ops"]
    thinning.KEPT.clear()
    lines = []
    for op in original:
        table = kept(original[op]["orders"], drawn(int(op), problems))
        if len(table) > 2:  # one make alone needs none
            said = ", ".join(f'"{make}": {share:g}' for make, share in table.items())
            lines.append(f"    {op}: {{{said}}},\n")
    path = Path(thinning.__file__)
    text, rows = path.read_text(), "".join(lines)
    path.write_text(re.sub(r"(KEPT: .*? = \{\n).*?^\}", lambda m: f"{m[1]}{rows}}}", text, flags=re.S | re.M))


if __name__ == "__main__":
    main()
