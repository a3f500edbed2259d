"""Measure what a classifier reaches on GSM-Infinite that chains nothing, as floors of the task and in docs/.

python tools/no_chain.py [TRAINING problems an op, default 1200] [TEST problems, default 600]

It writes `no_chain.json` of the task and needs scikit-learn.
"""

import json
import sys
from pathlib import Path
from random import Random
from typing import Any

from sklearn.ensemble import ExtraTreesClassifier

from lmsleep.files import write_atomic
from lmsleep.recipes.table import as_markdown, published
from lmsleep.tasks.gsm_infinite import no_chain
from lmsleep.tasks.gsm_infinite.task import draw_problem
from lmsleep.training.runs import provenance

ROOT = Path(__file__).parents[1]
SEED = 0
OPS = 8
TREES = 200


def accuracy(cells: list[list[float]], answers: list[int], test: int) -> float:
    """Fit randomised trees to all but the last `test` problems; return the accuracy on these."""
    # Leaves of two: single problems of training would be learned by heart.
    trees = ExtraTreesClassifier(TREES, min_samples_leaf=2, max_features=0.5, random_state=SEED)
    trees.fit(cells[:-test], answers[:-test])
    return float(trees.score(cells[-test:], answers[-test:]))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the floors as Markdown: a line for each kind of problem, a column for each op."""
    lines = [["", *(f"op {op}" for op in range(1, OPS + 1))]]
    for kind in dict.fromkeys((r["subset"], r["mode"], r["modulus"], r["hidden"]) for r in rows):
        subset, mode, modulus, hidden = kind
        named = f"{subset} {mode}" + (f", modulo {modulus}" if modulus else "")
        named += ", noise with numbers" if hidden else ""
        own = {
            r["op"]: r["accuracy"]
            for r in rows
            if (r["subset"], r["mode"], r["modulus"], r["hidden"]) == kind
        }
        lines.append([named, *(f"{own[op]:.2f}" if op in own else "-" for op in range(1, OPS + 1))])
    return as_markdown(lines)


def main() -> None:
    """Measure every kind of problem and write the file."""
    train, test = (int(given) for given in (sys.argv[1:] or (1200, 600)))
    rows = []
    for subset in ("medium", "hard"):
        for mode in ("forward", "reverse"):
            for modulus in (None, 23):
                for op in range(1 + (subset == "medium"), OPS + 1):
                    random = Random(SEED)
                    cores = [
                        draw_problem(random, op, None, subset, mode, modulus)[0] for _ in range(train + test)
                    ]
                    for hidden in (False, True):
                        seen = [no_chain.features(core, hidden=hidden) for core in cores]
                        found = accuracy(seen, [core.answer for core in cores], test)
                        kind = {"subset": subset, "mode": mode, "modulus": modulus, "hidden": hidden}
                        rows.append({**kind, "op": op, "accuracy": round(found, 4)})
                        sys.stdout.write(f"{rows[-1]}\n")
                        sys.stdout.flush()
    made = provenance() | {"command": " ".join(["python tools/no_chain.py", *sys.argv[1:]])}
    about = {"made_by": made, "seed": SEED, "trees": TREES, "train": train, "test": test}
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = f'{json.dumps(about)[:-1]},\n"rows": [\n{lines}\n]}}\n'
    write_atomic(Path(no_chain.__file__).with_suffix(".json"), text.encode())
    page = ROOT / "docs/tasks.md"
    write_atomic(page, published(page.read_text(), {"floors:no-chain": table(rows)}).encode())


if __name__ == "__main__":
    main()
