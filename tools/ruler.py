"""RULER's synthetic tasks (lm-eval): a model that sleeps beside the plain one, with all or some in attention.

    lmsleep convert smollm2-sleeps sleeping
    lmsleep convert smollm2 plain --insert 2     (layers are silent until trained: it computes what it did)
    python tools/ruler.py sleeping --plain plain --out runs/ruler --window 96 --passes 1 --limit 4

Needs `pip install wonderwords` beside lm-eval. A file for each reading and length is written to
--out, named by model and options too, and one that is there is not made again, so the same command goes on
after a kill; then the table is printed.
Lengths are read one at a time, since --limit takes the first samples, which all have the first length. Other
options are those of `lmsleep lm-eval`: --apply-chat-template, --batch-size 4, ...
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lmsleep import shipped
from lmsleep.cli.harness import harness

# Offline: the needle amid one repeated sentence, chains of variables, common and frequent words. Other
# needles lie in essays that lm-eval downloads.
TASKS = ("niah_single_1", "ruler_vt", "ruler_cwe", "ruler_fwe")
SEED = 0


def readings(
    model: Path, plain: Path | None, length: int, window: int, passes: Sequence[int]
) -> dict[str, Any]:
    """Return by name the arguments of `lmsleep lm-eval` for each reading of texts of one length."""
    found: dict[str, list[Any]] = {}
    if plain is not None:
        # In a window that is never full nothing is slept on, and attention has everything.
        found["full cache"] = [plain, "--window", 2 * length, "--passes", 1]
        found["sliding"] = [plain, "--window", window, "--passes", 1, "--eviction", "sliding"]
        found["evicted"] = [plain, "--window", window, "--passes", 1, "--eviction", "hard"]
    for n in passes:
        found[f"asleep, N = {n}"] = [model, "--window", window, "--passes", n]
    return found


def key(asked: Sequence[Any]) -> str:
    """Return a short name of a model, as its folder is today, and of all that it is asked."""
    model, *options = asked
    place = shipped.find(model)
    files = sorted(place.iterdir()) if place.is_dir() else [place]
    made = [(path.name, path.stat().st_mtime_ns) for path in files]
    said = json.dumps([str(place.resolve()), made, *map(str, options)])
    return hashlib.sha256(said.encode()).hexdigest()[:8]


def measure(arguments: Sequence[Any], tasks: Sequence[str], length: int, limit: int, out: Path) -> None:
    """Run the tasks at one length, by a model and options, and write what lm-eval found to `out`."""
    spec = find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise SystemExit("ruler: lm-eval is not installed: pip install 'lmsleep[eval,hf]' wonderwords")
    # Its own folder alone: indexing all of lm-eval's tasks takes half a minute each time.
    folder = Path(spec.origin).parent / "tasks" / "ruler"
    model, *options = map(str, arguments)
    argv = [model, "--tasks", *tasks, "--include-path", str(folder), *options, "--limit", str(limit)]
    harness([*argv, "--metadata", f"max_seq_lengths=[{length}]", "--seed", str(SEED), "--out", str(out)])


def table(found: dict[tuple[str, int], dict[str, Any]], tasks: Sequence[str]) -> str:
    """Write a line for each task and length, a column for each reading, with standard errors."""
    names = list(dict.fromkeys(name for name, _ in found))
    lines = [f"| task | tokens | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for task in tasks:
        for length in sorted({length for _, length in found}):
            cells = []
            for name in names:
                (results,) = found[name, length]["passes"].values()
                value, error = (results[task].get(f"{length}{kind},none") for kind in ("", "_stderr"))
                cells.append(f"{value:.2f}" + (f" ± {error:.2f}" if isinstance(error, float) else ""))
            lines.append(f"| {task} | {length} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Measure what is missing in --out, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of the model that sleeps")
    parser.add_argument("--plain", type=Path, help="folder of the same model with silent memory layers")
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=(1024, 2048, 4096), help="tokens, at least 1024"
    )
    parser.add_argument("--window", type=int, required=True, help="the one that the model was trained with")
    parser.add_argument("--passes", nargs="+", type=int, required=True)
    parser.add_argument("--limit", type=int, default=4, help="samples of each task and length")
    options, more = parser.parse_known_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    found = {}
    for length in options.lengths:
        cases = readings(options.model, options.plain, length, options.window, options.passes)
        for name, arguments in cases.items():
            asked = [*arguments, *more, *options.tasks, options.limit]
            out = options.out / f"{name.replace(' ', '').replace(',', '-')}-{length}-{key(asked)}.json"
            if not out.exists():
                measure([*arguments, *more], options.tasks, length, options.limit, out)
            found[name, length] = json.loads(out.read_text())
    sys.stdout.write(table(found, options.tasks) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
