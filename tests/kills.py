"""Kill a command before each of its operations on files, and take it up: `kills.py NUMBERS COMMAND...`.

The command works on RUN, in a new folder each time; NUMBERS are START:STOP:STEP of operations. Printed is one
JSON object for each kill: how it went, and what is in the folder in the end. The first is of a command that
nobody killed.
"""

import json
import os
import sys
import traceback
from contextlib import redirect_stdout
from hashlib import sha256
from io import StringIO
from pathlib import Path

import torch

from lmsleep.cli import main
from lmsleep.training import Trainer, runs

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
KILLED = 137


def kill_before(number: int) -> None:
    """Kill this process before its operation `number`, counted from 0, on files of this folder."""
    left, here = number, Path.cwd()

    def hook(event: str, given: tuple) -> None:
        nonlocal left
        changes = event in CHANGES or (event == "open" and isinstance(given[2], int) and given[2] & WRITES)
        if not changes or not isinstance(given[0], str | os.PathLike):
            return
        if here in Path(os.fsdecode(given[0])).absolute().parents:
            if left == 0:
                os._exit(KILLED)
            left -= 1

    sys.addaudithook(hook)


def call(argv: list[str], number: int | None) -> tuple[int, str]:
    """Run a command in a process of its own; return its exit code and what it said of errors."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        code = 0
        sys.stdout, sys.stderr = StringIO(), os.fdopen(into, "w")
        try:
            if number is not None:
                kill_before(number)
            main(argv)
        except SystemExit as leaving:
            code = leaving.code
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)
    os.close(into)
    with os.fdopen(out) as said:
        text = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def contents() -> dict[str, str]:
    """Return what each file holds, without what differs from run to run."""
    found = {}
    # An empty lock, which stays where nobody locks again.
    for path in sorted(p for p in Path().rglob("*") if p.is_file() and p.suffix != ".lock"):
        if path.suffix == ".safetensors":
            found[str(path)] = sha256(path.read_bytes()).hexdigest()
        elif path.suffix in (".json", ".jsonl"):
            records = [json.loads(line) for line in [path.read_text()] if path.suffix == ".json"]
            records = records or [json.loads(line) for line in path.read_text().splitlines()]
            plain = [{k: v for k, v in r.items() if k not in ("seconds", "made_by")} for r in records]
            found[str(path)] = json.dumps(plain).replace(str(Path.cwd()), "HERE")
        else:
            found[str(path)] = ""
    return found


if __name__ == "__main__":
    Trainer.log_every = 1
    torch.set_num_threads(1)
    numbers, argv, root = range(*map(int, sys.argv[1].split(":"))), sys.argv[2:], Path.cwd()
    # Children inherit what is imported. Where a run was made is told by git, which takes its time.
    runs.provenance = dict
    (root / "first").mkdir()
    os.chdir(root / "first")
    with redirect_stdout(StringIO()):
        main(argv)
    for number in [None, *numbers]:
        (root / f"killed-{number}").mkdir()
        os.chdir(root / f"killed-{number}")
        code, said = call(argv, number)
        ended = code != KILLED
        resumed = "the same"
        if not ended:
            code, said = call(argv, None)
            if code == 2 and "--resume" in said:
                resumed = said
                code, said = call([argv[0], "--resume", "RUN"], None)
        print(
            json.dumps(
                {
                    "killed": number,
                    "code": code,
                    "said": said[-500:] if code else "",
                    "resumed": resumed,
                    "files": contents(),
                }
            )
        )
        sys.stdout.flush()
        if ended and number is not None:
            break
