"""What is measured: a CPU in one thread and float32, or a GPU and bfloat16."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.timing import Times, take_turns


@dataclass(frozen=True)
class Processor:
    """A device with the arithmetic in which models train on it, and the clock that times it.

    On a CPU that is CPU time, which neighbours slow less than the wall's; on a GPU the wall's, between points
    where the GPU has nothing left to do.
    """

    device: torch.device
    tiny: bool = False
    """Its limits are those of small products, which say that it runs and no more."""

    @property
    def gpu(self) -> bool:
        """True if the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def clock(self) -> str:
        """The name of the clock, for columns."""
        return "GPU" if self.gpu else "CPU"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of matrix products in training."""
        return torch.bfloat16 if self.gpu else torch.float32

    @property
    def text(self) -> str:
        """The arithmetic in words, for notes."""
        return "bfloat16 (autocast) on one GPU" if self.gpu else "float32, one thread"

    def holds(self) -> int:
        """Return the bytes of the GPU's memory."""
        return torch.cuda.get_device_properties(self.device).total_memory

    def within(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Wrap a call so that it runs in that arithmetic."""

        def inside() -> Tensor:
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.gpu):
                return call()

        return inside

    def seconds(self, times: Times) -> list[float]:
        """Return what was measured, by the clock, in seconds."""
        return times.wall if self.gpu else times.cpu

    @property
    def square(self) -> int:
        """The size of a square matrix that keeps all of the device busy."""
        return 64 if self.tiny else 8192 if self.gpu else 1024

    def matmul_peak(
        self, dtype: torch.dtype | None = None, size: int | None = None, repeats: int = 50
    ) -> float:
        """Measure the FLOP/s of a square matrix product, the best of several: the limit."""
        size = size or self.square
        a, b = (torch.randn(size, size, device=self.device).to(dtype or self.dtype) for _ in "ab")
        out = torch.empty_like(a)
        times = take_turns({0: lambda: torch.mm(a, b, out=out)}, repeats)[0]
        return 2 * size**3 / min(self.seconds(times))

    def copy_bandwidth(self, megabytes: int, repeats: int = 7) -> float:
        """Measure the bytes/s of a copy (read and written) far larger than the caches; best of several."""
        source = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=self.device)
        target = torch.zeros_like(source)
        times = take_turns({0: lambda: target.copy_(source)}, repeats)[0]
        return 2 * source.nbytes / min(self.seconds(times))


def has_kernels() -> bool:
    """Say whether flash-linear-attention is installed."""
    return importlib.util.find_spec("fla") is not None
