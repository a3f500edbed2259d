"""What memories still know, stored in fewer bits and merged: the shipped models on held-out graphs."""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.table import Cell, Table
from benchmarks.timing import ms, take_turns
from lmsleep import Backbone, HybridConfig, HybridLM, Memory, Session, State, shipped, sleep_forward
from lmsleep.evaluation import EVAL_SEED, wilson
from lmsleep.sleep import SleepConfig
from lmsleep.state import Storage
from lmsleep.tasks import Batch, batch_rng
from lmsleep.training import RunFolder

GRAPHS = 64  # in a batch
STORAGES: tuple[Storage, ...] = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class Reader:
    """A shipped model that reads graphs into memories and answers from memories."""

    model: Backbone
    sleep: SleepConfig
    task: Any

    @classmethod
    def shipped(cls, name: str) -> "Reader":
        """Open a shipped model by name."""
        run = RunFolder.open(shipped.find(name))
        return cls(run.model(), run.config().sleep, run.config().task)

    def batches(self, count: int) -> Iterator[Batch]:
        """Draw graphs that training never drew."""
        for index in range(count):
            yield self.task.batch(batch_rng(EVAL_SEED, "test", index), GRAPHS, "test")

    @torch.no_grad()
    def read(self, context: Tensor) -> Memory:
        """Return the memories of graphs `[B, T]`, each slept on to its end."""
        return sleep_forward(
            self.model, context, None, self.sleep, evict_last=True, return_logits=False
        ).memory

    @torch.no_grad()
    def answers(self, batch: Batch, memory: Memory) -> Tensor:
        """Return the answer to every question `[R]`, from the memory of its graph."""
        assert batch.context_row is not None
        state = State(memory, self.model.initial_state(memory.batch_size).cache).rows(batch.context_row)
        out = sleep_forward(self.model, batch.tokens[:, :-1], None, self.sleep, state=state)
        assert out.logits is not None
        return out.logits[:, -1].argmax(-1)


def stored(batches: int) -> Table:
    """Score the same memories through files of three kinds."""
    rows: list[dict[str, Cell]] = []
    for name in shipped.runs():
        reader = Reader.shipped(name)
        right, given = ({s: list[Tensor]() for s in STORAGES} for _ in range(2))
        size, hops = {}, []
        for batch in reader.batches(batches):
            assert batch.context is not None
            memory = reader.read(batch.context)
            hops.append(batch.difficulty)
            for storage in STORAGES:
                again, size[storage] = _through_file(memory, reader.model, storage)
                given[storage].append(reader.answers(batch, again))
                right[storage].append(given[storage][-1] == batch.tokens[:, -1])
        for storage in STORAGES:
            changed = torch.cat(given[storage]) != torch.cat(given["float32"])
            rows.append({"model": name, "stored as": storage, "bytes of S": size[storage],
                         **_accuracy(torch.cat(right[storage]), torch.cat(hops)),
                         "answers that differ": f"{int(changed.sum()):,} of {len(changed):,}"})  # fmt: skip
    note = (
        "Accuracy per hop from memories that went through a file, and answers that differ from those of "
        f"float32. Bytes of S: of one memory. {batches * GRAPHS:,} held-out graphs; 95 % intervals (Wilson)."
    )
    return Table(rows=rows, note=note)


def _through_file(memory: Memory, model: Backbone, storage: Storage) -> tuple[Memory, int]:
    """Return the memory out of a file, and the bytes there of one row."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memories"
        memory.save(path, model, storage=storage)
        header = int.from_bytes(path.read_bytes()[:8], "little") + 8
        return Memory.load(path, model), (path.stat().st_size - header) // memory.batch_size


def merged(batches: int) -> Table:
    """Score two graphs read apart and added up, and the two halves of one graph."""
    cases: dict[str, Callable[[Reader, Tensor], Memory]] = {
        "one graph, read whole": Reader.read,
        "two graphs, mean of their memories": lambda r, c: r.read(c).merge([_others(r, c)]),
        "two graphs, sum": lambda r, c: r.read(c).merge([_others(r, c)], [1.0, 1.0]),
        "two halves of one graph, mean": lambda r, c: _half(r, c, 0).merge([_half(r, c, 1)]),
        "two halves of one graph, sum": lambda r, c: _half(r, c, 0).merge([_half(r, c, 1)], [1.0, 1.0]),
        "one half alone": lambda r, c: _half(r, c, 0),
        "nothing (S = 0)": lambda r, c: r.read(c).map(torch.zeros_like),
    }
    rows: list[dict[str, Cell]] = []
    for name in reversed(shipped.runs()):
        reader = Reader.shipped(name)
        for case, remember in cases.items():
            right, hops = [], []
            for batch in reader.batches(batches):
                assert batch.context is not None
                found = reader.answers(batch, remember(reader, batch.context))
                right.append(found == batch.tokens[:, -1])
                hops.append(batch.difficulty)
            rows.append({"model": name, "memory": case, **_accuracy(torch.cat(right), torch.cat(hops))})
    note = (
        "Accuracy per hop. Two graphs: over the same 8 names, so they contradict each other; asked about one "
        "of them. Two halves: 4 of the 8 edges each, read apart; they agree, but paths cross between them. "
        f"{batches * GRAPHS:,} held-out graphs; 95 % intervals (Wilson)."
    )
    return Table(rows=rows, note=note)


def _others(reader: Reader, context: Tensor) -> Memory:
    """Return the memories of other graphs: for each row the one before it."""
    return reader.read(context.roll(1, dims=0))


def _half(reader: Reader, context: Tensor, which: int) -> Memory:
    return reader.read(context.chunk(2, dim=1)[which])


def _accuracy(right: Tensor, hops: Tensor) -> dict[str, Cell]:
    """Return the share of right answers per hop, with its interval."""
    cells: dict[str, Cell] = {}
    for k in hops.unique().tolist():
        correct, total = int(right[hops == k].sum()), int((hops == k).sum())
        low, high = wilson(correct, total)
        cells[f"k={k}"] = f"{correct / total:.3f} [{low:.3f}, {high:.3f}]"
    return cells


def identified(config: HybridConfig, repeats: int) -> Table:
    """Load, fork and save a session of a model, whose weights are read once: for the first of them."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = HybridLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for weight in model.parameters():
            weight.uniform_(-0.02, 0.02)
    session = Session(model, SleepConfig(window=8, passes=1))
    session.read(range(8))
    session.sleep()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.mem"
        began = time.perf_counter()
        session.save(path)
        first = time.perf_counter() - began
        calls = {
            "load": lambda: Session.load(path, model),
            "fork": session.fork,
            "save": lambda: session.save(path),
            "load, fork and save": lambda: Session.load(path, model).fork().save(path),
        }
        times = take_turns(calls, repeats)
    weights = sum(p.numel() for p in model.parameters())
    rows: list[dict[str, Cell]] = [
        {
            "call": call,
            "CPU ms": ms(times[call].cpu),
            "wall ms": ms(times[call].wall),
            "least wall ms": ms(times[call].wall, 0),
            "bytes of S": session.memory.nbytes,
        }
        for call in calls
    ]
    note = (
        f"A session of a model with {weights / 1e9:.3g} billion weights in bfloat16 (random; "
        f"{len(config.blocks)} blocks of width {config.d_model}, {config.blocks.count('gated_delta_net')} of "
        f"them with fast weights). The very first save takes {first:.2g} s: it reads all weights for the "
        f"fingerprint of the model. Medians and least of {repeats} repeats that took turns; files are synced "
        "to disk."
    )
    return Table(rows=rows, note=note)
