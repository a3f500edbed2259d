"""python -m benchmarks NAME [--json] [--repeats N]: run one benchmark, print a table or JSON."""

import argparse
import json
import statistics
from collections.abc import Callable

from benchmarks import data
from lmsleep.training.runs import provenance

# Each returns, by what was measured, a call that gives one measurement; and says in what unit.
BENCHMARKS: dict[str, tuple[Callable[[], dict[str, Callable[[], float]]], str]] = {
    "data": (data.cases, data.UNIT),
}


def main() -> None:
    """Measure every case of a benchmark a few times."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each case")
    options = parser.parse_args()
    cases, unit = BENCHMARKS[options.name]
    rows = []
    for name, measure in cases().items():
        values = [measure() for _ in range(max(1, options.repeats))]
        median = statistics.median(values)
        rows.append({"case": name, "median": median, "lowest": min(values), "highest": max(values)})
    made = provenance() | {"command": f"python -m benchmarks {options.name}"}
    if options.json:
        print(json.dumps({"made_by": made, "unit": unit, "rows": rows}, indent=2))
        return
    print(f"| {unit} | median | lowest ... highest |\n|---|---|---|")
    for row in rows:
        print(f"| {row['case']} | {row['median']:,.0f} | {row['lowest']:,.0f} ... {row['highest']:,.0f} |")
    where = f"{made['hardware']}, torch {made['torch']}, commit {made['commit']}"
    print(f"\n`{made['command']}`, {options.repeats} repeats, {where}")


if __name__ == "__main__":
    main()
