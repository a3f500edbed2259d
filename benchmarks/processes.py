"""What it costs to be one of several processes: alone among them, two against two threads, what they send."""

import multiprocessing
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.processor import Processor
from benchmarks.step import AUTOMATON, PASSES, TINY, Setting
from benchmarks.table import Cell, Table
from benchmarks.timing import ms, ratio, take_turns
from lmsleep import SleepConfig
from lmsleep.environment import changed
from lmsleep.recipes.settings import preset
from lmsleep.training import Objective, RunConfig, TrainConfig, take_step
from lmsleep.training.batches import draw
from lmsleep.training.optim import optimizers
from lmsleep.training.processes import ALONE, Processes
from lmsleep.training.scale import Weights

SIZE = 2
OF = 8  # processes, of which one draws
DRAWN = ("rule110", "depo", "gsm-infinite")
TRAIN = TrainConfig(lr=1e-4, adam_lr=1e-5)


class Sent(TorchDispatchMode):
    """A mode that notes what this process sends to others.

    Attributes:
        found: name and bytes of each collective.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note it if it is a collective."""
        if DTensor in types:  # which says what it does to plain tensors
            return NotImplemented
        name = func.overloadpacket.__name__.strip("_")
        if func.namespace in ("c10d", "_c10d_functional") and not name.startswith(("wait", "wrap")):
            # Of what all have together: the largest tensor, or as many of it as there are processes.
            whole = max((t.nbytes for t in tree_leaves(args) if isinstance(t, torch.Tensor)), default=0)
            self.found.append((name, whole * (args[1] if name == "all_gather_into_tensor" else 1)))
        return func(*args, **(kwargs or {}))


class Steps:
    """Takes steps on one batch, of which this process reads its rows."""

    def __init__(
        self, setting: Setting, processes: Processes = ALONE, processor: Processor | None = None
    ) -> None:
        processor = processor or Processor(torch.device("cpu"))
        self.setting, self.processes = setting, processes
        self.batch = setting.drawn().to(processor.device)
        self.model = setting.made().to(processor.device)
        self.objective = Objective(self.model, TRAIN, bfloat16=processor.gpu)
        self.optimizers = optimizers(self.model, TRAIN)

    def take(self, passes: int) -> None:
        """Take a step with N = `passes`."""
        rows = self.batch.share(self.processes.rank, self.processes.size)
        sleep = SleepConfig(window=self.setting.window, passes=passes)
        take_step(
            self.objective, [rows], sleep, self.optimizers, clip=1.0, total=self.batch.num_predicted,
            processes=self.processes,
        )  # fmt: skip

    def sent(self, passes: int) -> list[tuple[str, int]]:
        """Take a step as `take` does; return name and bytes of each of its collectives."""
        with Sent() as sent:
            self.take(passes)
        return sent.found


def tables(repeats: int, tiny: bool) -> dict[str, Callable[[], Table]]:
    """Return four tables: seconds a step alone and of two, what is sent in one, what drawing takes."""
    setting = TINY if tiny else replace(AUTOMATON, batch=16)
    cpu = Processor(torch.device("cpu"))
    return {
        "joined": lambda: joined(cpu, setting, repeats),
        "scaling": lambda: scaling(setting, repeats),
        "sent": lambda: sent(setting),
        "drawn": lambda: drawn(repeats),
    }


def joined(processor: Processor, setting: Setting, repeats: int) -> Table:
    """Time the same step in a process alone and in one that torchrun has started by itself."""
    with _placed(0, 1, _free_port()):
        processes = Processes.join(processor.device.type)
        try:
            sides = {
                "alone": Steps(setting, ALONE, processor),
                "joined": Steps(setting, processes, processor),
            }
            calls = {(n, how): partial(steps.take, n) for n in PASSES for how, steps in sides.items()}
            spent = {case: processor.seconds(times) for case, times in take_turns(calls, repeats).items()}
        finally:
            processes.leave()
    rows: list[dict[str, Cell]] = [
        {
            "N": n,
            f"alone, {processor.clock} ms a step": ms(spent[n, "alone"]),
            f"one of one, {processor.clock} ms": ms(spent[n, "joined"]),
            "to alone": ratio(spent[n, "joined"], spent[n, "alone"]),
        }
        for n in PASSES
    ]
    note = (
        "What the path of several processes costs where there is one (`torchrun --nproc-per-node=1`): a "
        f"training step on {setting.batch} sequences of {sides['alone'].batch.tokens.shape[1]} tokens of "
        f"{type(setting.task).__name__}, L = {setting.window}, {len(setting.model.blocks)} blocks of width "
        f"{setting.model.d_model}, {processor.text}: medians of {repeats} repeats that took turns; ratios "
        "within a repeat: median [10th ... 90th percentile]. Aim: 1.02 at most."
    )
    return Table(rows=rows, note=note)


def scaling(setting: Setting, repeats: int) -> Table:
    """Time the same step in one process of two threads and in two of one thread."""
    alone, before = Steps(setting), torch.get_num_threads()
    with _two(setting) as both:

        def threads(n: int) -> None:
            torch.set_num_threads(SIZE)
            alone.take(n)

        calls: dict[tuple[str, int], Callable[[], object]] = {}
        for n in PASSES:
            calls["threads", n] = partial(threads, n)
            calls["processes", n] = partial(both, "take", n)
        try:
            spent = {case: times.wall for case, times in take_turns(calls, repeats).items()}
        finally:
            torch.set_num_threads(before)
    rows: list[dict[str, Cell]] = [
        {
            "N": n,
            "one process of two threads, ms a step": ms(spent["threads", n]),
            "two of one thread, ms": ms(spent["processes", n]),
            "times as fast": ratio(spent["threads", n], spent["processes", n]),
        }
        for n in PASSES
    ]
    note = (
        f"A training step on {setting.batch} sequences of {alone.batch.tokens.shape[1]} tokens of "
        f"{type(setting.task).__name__}, L = {setting.window}, {len(setting.model.blocks)} blocks of width "
        f"{setting.model.d_model}, float32, CPU, gloo: wall time, medians of {repeats} repeats that took "
        "turns; ratios within a repeat: median [10th ... 90th percentile]."
    )
    return Table(rows=rows, note=note)


def sent(setting: Setting) -> Table:
    """Count the collectives of a step."""
    sums = Weights.of(setting.made(), TRAIN).sums
    with _two(setting) as both:
        found = {n: both("sent", n)[0] for n in PASSES}
    rows: list[dict[str, Cell]] = [
        {
            "N": n,
            "collectives": len(found[n]),
            "of gradients": sum(nbytes in sums for _, nbytes in found[n]),
            "their bytes": sum(nbytes for _, nbytes in found[n] if nbytes in sums),
            "by the formula": sum(sums),
            "bytes of the others": sum(nbytes for _, nbytes in found[n] if nbytes not in sums),
        }
        for n in PASSES
    ]
    note = "What each of two replicated processes sums with the other in the gradients of a step, on a CPU."
    return Table(rows=rows, note=note)


def drawn(repeats: int) -> Table:
    """Time what one of eight processes draws of a step at the paper's settings, in CPU time."""
    rows: list[dict[str, Cell]] = []
    for name in DRAWN:
        options, steps = preset(name, "paper"), count()
        run = RunConfig(**{part: options[part] for part in ("task", "model", "sleep", "train")})
        run = replace(run, train=replace(run.train, curriculum=0))
        several = replace(run, train=replace(run.train, draws=OF))
        calls = {
            "whole": lambda run=run, steps=steps: draw(run, next(steps), 0, OF),
            "own": lambda run=several, steps=steps: draw(run, next(steps), 0, OF),
        }
        spent = {case: times.cpu for case, times in take_turns(calls, repeats).items()}
        whole, own = spent["whole"], spent["own"]
        rows.append(
            {
                "task": name,
                "rows a step": run.train.batch_size,
                "--draws 1, ms": ms(whole),
                f"--draws {OF}, ms": ms(own),
                "times less": ratio(whole, own),
            }
        )
    note = (
        f"What one of {OF} processes draws for a step of the preset `paper`, in CPU time: the whole batch, "
        f"of which it reads its rows, or its own of {OF} draws. Medians of {repeats} repeats that took turns."
    )
    return Table(rows=rows, note=note)


@contextmanager
def _two(setting: Setting) -> Iterator[Callable[[str, int], list[Any]]]:
    """Start two processes; yield what has both of them call a method of `Steps`."""
    context, port = multiprocessing.get_context("spawn"), _free_port()
    pipes = [context.Pipe() for _ in range(SIZE)]
    begun = [
        context.Process(target=_serve, args=(rank, port, setting, theirs), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in begun:
        process.start()

    def both(method: str, passes: int) -> list[Any]:
        for mine, _ in pipes:
            mine.send((method, passes))
        return [mine.recv() for mine, _ in pipes]

    try:
        yield both
    finally:
        for mine, _ in pipes:
            mine.send(None)
        for process in begun:
            process.join()


def _serve(rank: int, port: int, setting: Setting, pipe: Any) -> None:
    """Be one of the processes: take steps as long as somebody asks."""
    torch.set_num_threads(1)
    with _placed(rank, SIZE, port):
        processes = Processes.join("cpu")
        steps = Steps(setting, processes)
        while (asked := pipe.recv()) is not None:
            method, passes = asked
            pipe.send(getattr(steps, method)(passes))
        processes.leave()


@contextmanager
def _placed(rank: int, size: int, port: int) -> Iterator[None]:
    """Say in the environment what torchrun says."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with changed({name: str(value) for name, value in {**place, **where}.items()}):
        yield


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port
