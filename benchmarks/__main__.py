"""python -m benchmarks NAME: run one benchmark; print its tables or JSON, or publish them in docs/."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks import capacity, data, floors, processes, recurrence, rules, serve, sessions, step, window
from benchmarks.processor import Processor
from benchmarks.table import Table, as_page
from lmsleep.files import write_atomic
from lmsleep.plain import to_json
from lmsleep.recipes.table import published
from lmsleep.training import choose_device
from lmsleep.training.runs import provenance

ROOT = Path(__file__).parents[1]
Measures = dict[str, Callable[[], Table]]
# By name what measures a table: every case `repeats` times (tiny: no more than shows that it runs).
ON_CPU: dict[str, Callable[[int, bool], Measures]] = {
    "capacity": capacity.tables,
    "data": data.tables,
    "processes": processes.tables,
    "serve": serve.tables,
    "sessions": sessions.tables,
}
ON_ANY: dict[str, Callable[[int, bool, Processor], Measures]] = {
    "floors": floors.tables,
    "recurrence": recurrence.tables,
    "rules": rules.tables,
    "step": step.tables,
    "window": window.tables,
}


class _Parser(argparse.ArgumentParser):
    """Says in one line what does not fit."""

    def error(self, message: str) -> NoReturn:
        """Leave with 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see --help)\n")


def main(argv: list[str], prog: str = "python -m benchmarks") -> None:
    """Measure, on a CPU in one thread."""
    parser = _Parser(prog=prog, description=__doc__)
    parser.add_argument("name", choices=sorted([*ON_CPU, *ON_ANY]))
    parser.add_argument("--only", nargs="+", metavar="TABLE", help="measure these tables; default: all")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each case")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                        help="cuda: on a GPU, in bfloat16; its results are called NAME-cuda")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="seconds, to see that it runs")
    parser.add_argument("--publish", action="store_true",
                        help="write benchmarks/results/NAME.json and the tables in docs/")  # fmt: skip
    options = parser.parse_args(argv)
    repeats, result = options.repeats, options.name
    if repeats < 1:
        parser.error(f"--repeats must be at least 1, got {repeats}")
    if options.name in ON_CPU:
        if options.device != "cpu":
            parser.error(f"--device {options.device}: {options.name} is measured on a CPU; leave it out")
        tables = ON_CPU[options.name](repeats, options.tiny)
    else:
        try:
            processor = Processor(choose_device(options.device))
        except ValueError as error:
            parser.error(f"--device: {error}")
        tables = ON_ANY[options.name](repeats, options.tiny, processor)
        result += "-cuda" if processor.gpu else ""
    if unknown := set(options.only or ()) - set(tables):
        parser.error(f"--only: no table {', '.join(sorted(unknown))}; there are {', '.join(tables)}")
    torch.set_num_threads(1)
    command = ["python -m benchmarks", *(arg for arg in argv if arg not in ("--publish", "--json"))]
    made = provenance() | {"command": " ".join(command)}
    results: dict[str, Any] = {}
    for name in options.only or tables:
        results[name] = {"made_by": made, **asdict(tables[name]())}
        if options.publish:
            publish(result, {name: results[name]})
        if not options.json:
            print(f"{as_page(results[name])}\n")
    if options.json:
        print(to_json(results))


def publish(name: str, results: dict[str, Any], root: Path = ROOT) -> None:
    """Make `results` the committed ones: in benchmarks/results/NAME.json and in the tables of docs/."""
    path = root / "benchmarks/results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text()) if path.exists() else {}
    write_atomic(path, (json.dumps({**kept, **results}, indent=1) + "\n").encode())
    blocks = {f"benchmark:{name}.{table}": as_page(result) for table, result in results.items()}
    for page in sorted((root / "docs").glob("*.md")):
        text = page.read_text()
        if (new := published(text, blocks)) != text:
            write_atomic(page, new.encode())


if __name__ == "__main__":
    main(sys.argv[1:])
