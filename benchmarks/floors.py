"""What this machine can do at best: the limits that the other benchmarks are held against."""

from collections.abc import Callable

import torch

from benchmarks.processor import Processor
from benchmarks.table import Cell, Table


def tables(repeats: int, tiny: bool, processor: Processor) -> dict[str, Callable[[], Table]]:
    """Return one table."""
    sizes = (64, 128) if tiny else (2048, 4096, 8192) if processor.gpu else (512, 1024, 2048)
    return {"limits": lambda: limits(processor, sizes, 8 if tiny else 256, repeats)}


def limits(processor: Processor, sizes: tuple[int, ...], megabytes: int, repeats: int) -> Table:
    """Time matrix products of several sizes and dtypes, and a copy."""
    rows: list[dict[str, Cell]] = [
        {
            "limit": f"matrix product, {size} x {size}, {str(dtype)[6:]}",
            "rate": processor.matmul_peak(dtype, size, repeats) / 1e9,
            "unit": "GFLOP/s",
        }
        for dtype in (torch.float32, torch.bfloat16)
        for size in sizes
    ]  # fmt: skip
    rows.append({
        "limit": f"copy of {megabytes} MB, read and written",
        "rate": processor.copy_bandwidth(megabytes, repeats) / 1e9,
        "unit": "GB/s",
    })  # fmt: skip
    where = "on one GPU" if processor.gpu else "in CPU time of one thread"
    return Table(rows=rows, note=f"The best of {repeats} repeats, {where}.")
