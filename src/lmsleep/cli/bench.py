"""`lmsleep bench`: the benchmarks that stand beside the sources."""

import importlib
import importlib.util
import sys
from pathlib import Path

# The checkout: this file is src/lmsleep/cli/bench.py in it.
SOURCES = Path(__file__).parents[3]


def bench(argv: list[str]) -> None:
    """Run `lmsleep bench NAME [OPTIONS]`: what `python -m benchmarks` does there, from anywhere.

    Raises:
        FileNotFoundError: for an installed wheel, which has no benchmarks.
        ValueError: if transformers, which they compare with, is not installed.
    """
    if not (SOURCES / "benchmarks").is_dir():
        raise FileNotFoundError(
            "the benchmarks stand beside the sources and are not part of the wheel: clone the repository and "
            "install it from there (pip install -e '.[dev]')"
        )
    # Said before anything is measured.
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("the benchmarks compare with transformers: pip install 'lmsleep[hf]'")
    # `benchmarks` is no part of the package: it is found by path, from whatever folder this is called.
    sys.path.insert(0, str(SOURCES))
    importlib.import_module("benchmarks.__main__").main(argv, "lmsleep bench")
