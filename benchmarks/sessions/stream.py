"""A long stream: time, and memory that must stay flat. Each length in a process of its own (Linux)."""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks.table import Cell, Table
from lmsleep import HybridConfig, HybridLM, Session, SleepConfig

SLEEP = SleepConfig(window=256, passes=2)
WARM_UP = 32  # windows; by then the allocator has what it needs
PIECE = 16  # windows read at a time, as by `lmsleep read`


def lengths(config: HybridConfig, counts: tuple[int, ...]) -> Table:
    """Measure the same stream, cut at several lengths."""
    context = multiprocessing.get_context("spawn")
    rows = []
    for count in counts:
        with ProcessPoolExecutor(1, context) as alone:
            rows.append(alone.submit(read, config, count).result())
    note = (
        f"Reading random bytes: {len(config.blocks)} blocks of width {config.d_model}, L = {SLEEP.window}, "
        f"N = {SLEEP.passes}, float32, one thread. Growth: of the process's peak resident memory after a "
        f"warm-up of {WARM_UP} windows. Carried: most bytes of fast weights and working memory "
        "(`session.stats.peak_bytes`)."
    )
    return Table(rows=rows, note=note)


def read(config: HybridConfig, count: int) -> dict[str, Cell]:
    """Read `count` tokens after a warm-up; return one row."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = HybridLM(config)
    _read(Session(model, SLEEP), WARM_UP * (SLEEP.window or 0))
    session, resident = Session(model, SLEEP), peak_resident()
    wall, cpu = time.perf_counter(), time.process_time()
    _read(session, count)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "tokens": session.stats.tokens,
        "s": wall,
        "s of CPU": cpu,
        "tokens/s": count / wall,
        "tokens/s of CPU": count / cpu,
        "sleeps": session.stats.sleeps,
        "carried, bytes": session.stats.peak_bytes,
        "peak resident, MB": resident / 1e6,
        "growth, MB": (peak_resident() - resident) / 1e6,
    }


def _read(session: Session, count: int) -> None:
    piece = PIECE * (SLEEP.window or 0)
    generator = torch.Generator().manual_seed(0)
    for start in range(0, count, piece):
        session.read(torch.randint(256, (min(piece, count - start),), generator=generator))


def peak_resident() -> int:
    """Return the most bytes that this program had in memory; unlike ru_maxrss without its parent's."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in status if line.startswith("VmHWM")))
