"""python -m benchmarks NAME: run one benchmark; print its tables or JSON, or publish them in docs/.

python -m benchmarks gpu: all that is to be measured on a GPU, in minutes (options of its own: gpu --help).
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import Parser
from benchmarks.processor import Processor
from benchmarks.table import Table, as_page
from lmsleep.files import write_atomic
from lmsleep.plain import to_json
from lmsleep.recipes.table import published
from lmsleep.training import choose_device
from lmsleep.training.runs import provenance

ROOT = Path(__file__).parents[1]
Measures = dict[str, Callable[[], Table]]
ON_CPU = ("capacity", "compaction", "data", "processes", "recall", "serve", "sessions", "slow_weights")
ON_ANY = ("floors", "recurrence", "rules", "step", "window")


def measures(name: str, repeats: int, tiny: bool, *processor: Processor) -> Measures:
    """Return by name what measures the tables of a benchmark.

    Args:
        name: one of `ON_CPU` or `ON_ANY`.
        repeats: measurements of each case.
        tiny: no more than shows that it runs.
        processor: what is measured, of those `ON_ANY`.
    """
    # Imported when asked for: each needs packages that the others do not.
    found: Measures = import_module(f"benchmarks.{name}").tables(repeats, tiny, *processor)
    return found


def main(argv: list[str], prog: str = "python -m benchmarks") -> None:
    """Measure, on a CPU in one thread."""
    if argv[:1] == ["gpu"]:
        from benchmarks.gpu import command as gpu

        gpu.main(argv[1:], f"{prog} gpu")
        return
    parser = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted([*ON_CPU, *ON_ANY, "gpu"]))
    parser.add_argument("--only", nargs="+", metavar="TABLE", help="measure these tables; default: all")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each case")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                        help="cuda: on a GPU, in bfloat16; its results are called NAME-cuda")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="seconds, to see that it runs")
    parser.add_argument("--publish", action="store_true",
                        help="write benchmarks/results/NAME.json and the tables in docs/")  # fmt: skip
    options = parser.parse_args(argv)
    if options.name == "gpu":
        parser.error("gpu has options of its own, which follow it; put it first")
    repeats, result = options.repeats, options.name
    if repeats < 1:
        parser.error(f"--repeats must be at least 1, got {repeats}")
    if options.name in ON_CPU:
        if options.device != "cpu":
            parser.error(f"--device {options.device}: {options.name} is measured on a CPU; leave it out")
        tables = measures(options.name, repeats, options.tiny)
    else:
        try:
            processor = Processor(choose_device(options.device))
        except ValueError as error:
            parser.error(f"--device: {error}")
        tables = measures(options.name, repeats, options.tiny, processor)
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
