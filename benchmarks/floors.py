"""What this machine can do at best, in one thread: the limits that the other benchmarks are held against."""

from collections.abc import Callable

import torch

from benchmarks.table import Cell, Table
from benchmarks.timing import copy_bandwidth, matmul_peak


def tables(repeats: int, tiny: bool) -> dict[str, Callable[[], Table]]:
    """One table."""
    return {"limits": lambda: limits((64, 128) if tiny else (512, 1024, 2048), 8 if tiny else 256, repeats)}


def limits(sizes: tuple[int, ...], megabytes: int, repeats: int) -> Table:
    """Matrix products of several sizes and dtypes, and a copy."""
    rows: list[dict[str, Cell]] = [
        {
            "limit": f"matrix product, {size} x {size}, {str(dtype)[6:]}",
            "rate": matmul_peak(dtype, size, repeats) / 1e9,
            "unit": "GFLOP/s",
        }
        for dtype in (torch.float32, torch.bfloat16)
        for size in sizes
    ]  # fmt: skip
    rows.append({
        "limit": f"copy of {megabytes} MB, read and written",
        "rate": copy_bandwidth(megabytes, repeats) / 1e9,
        "unit": "GB/s",
    })  # fmt: skip
    return Table(rows=rows, note=f"The best of {repeats} repeats, in CPU time of one thread.")
