"""Commands in processes of their own, which know nothing of what this one has imported or defined."""

import multiprocessing
import os
import sys
import traceback
from pathlib import Path

from lmsleep.cli import main

# Every process is forked off one that has imported torch and done nothing else: seconds less for each
# (_dynamo comes with the first optimizer).
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["torch", "torch._dynamo", "lmsleep.cli.options"])


def _run(folder: str, out: str, words: list[str]) -> None:
    os.chdir(folder)
    for stream, name in ((sys.stdout, f"{out}.out"), (sys.stderr, f"{out}.err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    try:
        main(words)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def in_a_process_of_its_own(folder: Path, *words: object) -> str:
    out = folder / ".said"
    process = FRESH.Process(target=_run, args=(str(folder), str(out), [*map(str, words)]))
    process.start()
    process.join(200)
    said, errors = (out.with_name(f".said.{kind}").read_text() for kind in ("out", "err"))
    assert process.exitcode == 0, errors
    return said
