"""Measure on one GPU all that is to be measured on one, within so many minutes.

First checks: the kernels of flash-linear-attention in the passes, against the definition in float64, and the
tests that need CUDA. Then speed. Then figure 2a at the paper's size, for as long as is left. Every part is
written into benchmarks/results/gpu and docs/performance.md as soon as it is done. One that fails, or takes
longer than its share, is noted there, and the next begins. The same command goes on where it was.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch

from benchmarks.arguments import Parser
from benchmarks.gpu.page import publish
from benchmarks.gpu.part import Outcome, Part, Try
from benchmarks.gpu.plan import PARTS, WHOLE
from benchmarks.processor import Processor
from lmsleep.training import Interrupted

ROOT = Path(__file__).parents[2]
RESULTS, RUNS, PAGE = (ROOT / path for path in ("benchmarks/results/gpu", "runs/gpu", "docs/performance.md"))
GRACE = 10.0  # seconds in which a part that is told to stop saves what it has
AGAIN = "the same command goes on with it"


def main(argv: list[str], prog: str = "python -m benchmarks gpu") -> None:
    """Run the parts that are not done yet; leave with 1 if one of them failed."""
    options = _options(argv, prog)
    command = " ".join(["python -m benchmarks gpu", *argv])
    made = {"command": command, "commit": options.commit}
    folder = Path(tempfile.mkdtemp(prefix="lmsleep-rehearsal-")) if options.rehearse else RESULTS
    outcomes = {part.name: Outcome(folder / f"{part.name}.json", made, options.rehearse) for part in PARTS}
    chosen = [part for part in PARTS if options.only is None or part.name in options.only]
    # Kernels that were chosen by trying them are remembered beside those that were compiled.
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    until = time.monotonic() + 60 * options.minutes
    try:
        _import()
        for part in chosen:
            outcome, left = outcomes[part.name], until - time.monotonic() - GRACE
            if outcome.finished() and not options.again:
                _say(part, "was done before (--again measures it anew)")
                continue
            if left <= 0:
                _say(part, f"no time is left: {AGAIN}")
                continue
            share = part.seconds * 60 * options.minutes / WHOLE
            limit = left if part is PARTS[-1] else min(share, left)
            _say(part, f"{part.title} (at most {limit:.0f} s)")
            begun = time.monotonic()
            _run(part, outcome, folder / "runs" if options.rehearse else RUNS, limit, options.again)
            found = outcome.read()
            said = found.get("error") or found.get("unfinished") or "done"
            _say(part, f"{said}, {time.monotonic() - begun:.0f} s: {outcome.path}")
            if not options.rehearse:
                publish({name: each.read() for name, each in outcomes.items()}, PAGE)
    except KeyboardInterrupt:
        sys.stderr.write(f"{prog}: stopped: {AGAIN}\n")
        sys.exit(128 + signal.SIGINT)
    if options.rehearse:
        print(f"A rehearsal, which says nothing about a GPU: {folder}")
    sys.exit(any("error" in outcomes[part.name].read() for part in chosen))


def _options(argv: list[str], prog: str) -> argparse.Namespace:
    names = "\n".join(f"  {part.name:<12} {part.title}" for part in PARTS)
    parser = Parser(
        prog=prog,
        description=__doc__,
        epilog=f"parts, in turn:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=12.0, help="for all of it (default 12)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts; default: all")
    parser.add_argument("--again", action="store_true", help="also what was done before")
    parser.add_argument("--commit", help="of these sources, where there is no git to ask")
    parser.add_argument("--rehearse", action="store_true",
                        help="tiny sizes on the CPU; results go to a temporary folder")  # fmt: skip
    options = parser.parse_args(argv)
    if not 0 < options.minutes < float("inf"):
        parser.error(f"--minutes must be more than 0, got {options.minutes:g}")
    if unknown := set(options.only or ()) - {part.name for part in PARTS}:
        known = ", ".join(part.name for part in PARTS)
        parser.error(f"--only: no part {', '.join(sorted(unknown))}; there are {known}")
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device here; --rehearse runs all parts at tiny sizes on the CPU")
    return options


def _say(part: Part, text: str) -> None:
    number = f"{1 + PARTS.index(part)}/{len(PARTS)}"
    print(f"[{number:>5}] {part.name}: {text}", flush=True)


def _server() -> Any:
    """Return what parts are forked from: it has imported what they need, and not touched the GPU."""
    context = multiprocessing.get_context("forkserver")
    modules = dict.fromkeys(part.measure.partition(":")[0] for part in PARTS)
    context.set_forkserver_preload([__name__, *modules])
    return context


def _import() -> None:
    """Have everything imported, which may take a while and is no part's own time."""
    print("imports ...", flush=True)
    first = _server().Process(target=time.time)
    first.start()
    first.join()


def _run(part: Part, outcome: Outcome, runs: Path, limit: float, again: bool) -> None:
    """Run a part in a process of its own, which what goes wrong in it cannot outlive; note how it ended."""
    process = _server().Process(target=_attempt, args=(part, outcome, runs / part.name, again))
    process.start()
    try:
        process.join(limit)
        late = process.exitcode is None
    finally:
        _stop(process)
    if late and "unfinished" not in outcome.read() and not outcome.finished():
        outcome.write(unfinished=f"stopped after {limit:.0f} s, its share of the time; {AGAIN}")
    elif process.exitcode and not late and "error" not in outcome.read():
        outcome.write(error=f"the process of this part ended with code {process.exitcode}")


def _stop(process: BaseProcess) -> None:
    """End a process and what it has started, after a time to save."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        if process.exitcode is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signum)
        process.join(GRACE)


def _attempt(part: Part, outcome: Outcome, folder: Path, again: bool) -> None:
    """Make the table of a part, and write it or what went wrong."""
    os.setsid()  # so that all that it starts can be stopped with it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    device = torch.device("cpu" if outcome.rehearsal else "cuda")
    processor = Processor(device, tiny=outcome.rehearsal)
    # What is kept on the way is all that there is if this process ends without a word.
    keep = partial(outcome.write, unfinished=f"stopped on the way; {AGAIN}")
    run = Try(processor, outcome.rehearsal, folder, {} if again else outcome.read(), keep)
    table: Any = None
    why = dict[str, str]()
    try:
        table = resolve_name(part.measure)(run)
    except Interrupted as error:
        why = {"unfinished": f"{error.args[0].partition(';')[0]}; {AGAIN}"}
    except Exception as error:
        traceback.print_exc()
        why = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
    # A table that was kept stays where there is no other.
    outcome.write(table, **why)
    sys.exit(bool("error" in why))
