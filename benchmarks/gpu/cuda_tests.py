"""The tests that need CUDA."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.part import Disagrees, Try
from benchmarks.table import Cell, Table

ROOT = Path(__file__).parents[2]


class _Counts:
    """What came of each test, by file; a plugin of pytest."""

    def __init__(self, run: Try) -> None:
        self.run = run
        self.outcomes: dict[str, Counter[str]] = {}
        self.failed: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test once, and what fails around one."""
        if report.when == "call" or report.outcome != "passed":
            self._count(report)

    def pytest_collectreport(self, report: Any) -> None:
        """Count a file that cannot be imported as a failure."""
        if report.outcome == "failed":
            self._count(report)

    def _count(self, report: Any) -> None:
        file, _, name = report.nodeid.partition("::")
        self.outcomes.setdefault(file, Counter())[report.outcome] += 1
        if report.outcome == "failed":
            said = str(report.longrepr).strip().splitlines() or [""]
            self.failed.setdefault(file, []).append(f"{name or 'import'}: {said[-1][:120]}")
        self.run.keep(self.table())

    def table(self) -> Table:
        """Return the counts so far."""
        rows: list[dict[str, Cell]] = [
            {
                "file": file,
                "passed": counts["passed"],
                "failed": counts["failed"],
                "skipped": counts["skipped"],
                "what failed": "; ".join(self.failed.get(file, [])),
            }
            for file, counts in sorted(self.outcomes.items())
        ]
        return Table(
            rows=rows, note="The tests that need CUDA: `pytest -m gpu`, warnings shown and no errors."
        )


def files() -> list[str]:
    """Return the files that have such tests: others need packages that a machine with a GPU need not have."""
    tests = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(path) for path in tests if "@pytest.mark.gpu" in path.read_text()]


def cuda_tests(run: Try) -> Table:
    """Run them, all of one interpreter.

    Raises:
        Disagrees: if one of them fails.
        RuntimeError: if there is none, or pytest cannot run.
    """
    chosen = ["-m", "gpu", *files()]
    if run.tiny:
        chosen = ["-m", "not gpu", "-k", "its_state_goes_on", str(ROOT / "tests/test_muon.py")]
    counts = _Counts(run)
    # Another PyTorch or Triton than that of the suite warns of other things.
    how = ["-q", "-W", "default", "--no-header", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    code = pytest.main([*how, "--rootdir", str(ROOT), *chosen], plugins=[counts])
    if not counts.outcomes:
        raise RuntimeError(f"pytest ran no test (exit code {int(code)})")
    table = counts.table()
    run.keep(table)
    if failed := sum(counter["failed"] for counter in counts.outcomes.values()):
        raise Disagrees(f"{failed} tests failed")
    return table
