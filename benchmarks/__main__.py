"""python -m benchmarks NAME: run one benchmark; print its tables or JSON, or publish them in docs/."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import data, sessions
from benchmarks.table import Table, as_markdown, source, with_tables
from lmsleep.files import write_atomic
from lmsleep.training.runs import provenance

ROOT = Path(__file__).parents[1]
# Each measures every case `repeats` times (tiny: no more than shows that it runs), and returns named tables.
BENCHMARKS: dict[str, Callable[[int, bool], dict[str, Table]]] = {
    "data": data.tables,
    "sessions": sessions.tables,
}


def main() -> None:
    """Run a benchmark in one thread."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each case")
    parser.add_argument("--tiny", action="store_true", help="seconds, to see that it runs")
    parser.add_argument("--publish", action="store_true",
                        help="write benchmarks/results/NAME.json and the tables in docs/")  # fmt: skip
    options = parser.parse_args()
    torch.set_num_threads(1)
    command = ["python -m benchmarks", *(arg for arg in sys.argv[1:] if arg not in ("--publish", "--json"))]
    made = provenance() | {"command": " ".join(command)}
    tables = BENCHMARKS[options.name](max(1, options.repeats), options.tiny)
    result = {"made_by": made, "tables": {name: asdict(table) for name, table in tables.items()}}
    if options.publish:
        publish(options.name, result)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for table in tables.values():
        print(f"{table.note}\n\n{as_markdown(table.rows)}\n")
    print(source(result))


def publish(name: str, result: dict[str, Any], root: Path = ROOT) -> None:
    """Make `result` the committed one: benchmarks/results/NAME.json and the tables in docs/."""
    folder = root / "benchmarks/results"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())
    for path in sorted((root / "docs").glob("*.md")):
        page = path.read_text()
        if (new := with_tables(page, name, result)) != page:
            write_atomic(path, new.encode())


if __name__ == "__main__":
    main()
