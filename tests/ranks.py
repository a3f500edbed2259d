"""Several ranks, as torchrun would start them: forked off a process that has loaded all it needs."""

import atexit
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

WAIT = 120  # seconds; a test that hangs fails by it


class Failed(AssertionError):
    """A rank failed; the message holds what all of them said."""


def run(world, function, *args, group=True, expect=None, patience=WAIT, **environment):
    """Call `function(*args)`, of a test module, in `world` ranks; return what each returned.

    Each has torchrun's environment, a CPU thread, and with `group` a gloo group that has begun. `expect` are
    the exit codes that are right (None: any) in the place of zeros; then those are returned.
    """
    return _nursery().run(world, function, args, group, expect, patience, environment)


def _nursery(made=[]):  # noqa: B006 - one for each process that tests
    if not made:
        made.append(_Nursery())
        atexit.register(made[0].close)
    return made[0]


class _Nursery:
    def __init__(self):
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import ranks; ranks.nurse()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def run(self, world, function, args, group, expect, patience, environment):
        with tempfile.TemporaryDirectory() as place:
            asked = (
                world,
                function.__module__,
                function.__qualname__,
                args,
                group,
                environment,
                place,
                patience,
            )
            pickle.dump(asked, self.process.stdin)
            self.process.stdin.flush()
            codes = pickle.load(self.process.stdout)
            said = [(Path(place) / f"said-{rank}").read_text() for rank in range(world)]
            if expect is not None:
                if list(expect) != codes:
                    raise Failed(f"exit codes {codes}\n" + "\n".join(said))
                return said
            if any(codes):
                raise Failed(f"exit codes {codes}\n" + "\n".join(said))
            return [pickle.loads((Path(place) / f"result-{rank}").read_bytes()) for rank in range(world)]

    def close(self):
        self.process.stdin.close()
        self.process.wait(WAIT)
        self.process.stdout.close()


def nurse():
    """Read what is to be run, fork the ranks, and answer with their exit codes."""
    import torch._dynamo  # seconds, which DTensor takes with its first operation
    import torch.distributed.checkpoint  # once for all ranks

    import lmsleep.cli.evaluate
    import lmsleep.cli.train  # noqa: F401

    while True:
        try:
            asked = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        importlib.import_module(asked[1])  # what it imports, too
        begun = {}
        # As torchrun's agent has it: one that outlives the ranks.
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(asked[0]):
            if not (pid := os.fork()):
                _rank(rank, store.port, *asked[:-1])
            begun[pid] = rank
        codes, end = [None] * asked[0], time.monotonic() + asked[-1]
        while begun:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid in begun:
                codes[begun.pop(pid)] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                for pid in begun:
                    os.kill(pid, signal.SIGKILL)
                end += WAIT
            else:
                time.sleep(0.005)
        pickle.dump(codes, sys.stdout.buffer)
        sys.stdout.buffer.flush()


def _rank(rank, port, world, module, name, args, group, environment, place):
    said = os.open(f"{place}/said-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    place_of = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ.update({k: str(v) for k, v in {**place_of, **where, **environment}.items()})
    code = 0
    try:
        import torch

        # PyTorch's pool of threads does not outlive a fork: made anew before two threads would at once.
        torch.set_num_threads(1)
        function = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
        if group:
            torch.distributed.init_process_group("gloo")
        result = function(*args)
        if group:
            torch.distributed.destroy_process_group()
        Path(f"{place}/result-{rank}").write_bytes(pickle.dumps(result))
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
