"""Where a run computes, and in what precision."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lmsleep.training.config import TrainConfig

# What PyTorch says on the CPU, where it has no error of its own for it, and of sizes beyond 63 bits.
NO_MEMORY = ("can't allocate memory", "out of memory", "overflow")


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; "auto": CUDA where PyTorch sees it, else the CPU.

    Raises:
        ValueError: if there is none of that name here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    # torch.device accepts the name anywhere; the first tensor would fail, long after the command began.
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}: PyTorch sees no CUDA device here; use device='cpu' or 'auto'")
    try:
        device = torch.device(name)
        # There and back: names that no backend answers to fail in many ways, and "meta" holds no numbers.
        torch.ones(1, device=device).cpu()
    except Exception as error:
        raise ValueError(
            f"device={name!r} cannot compute here ({type(error).__name__}); use 'auto', 'cpu' or 'cuda'"
        ) from None
    # PyTorch takes any number behind "cpu", readers of files none.
    if device.type != "cpu":
        return device
    if device.index:
        raise ValueError(f"device={name!r}: there is one CPU; use 'cpu'")
    return torch.device("cpu")


@contextmanager
def fitting(what: str) -> Iterator[None]:
    """Say of `what` that it does not fit where memory runs out, as one who asked for it can understand.

    Raises:
        ValueError: instead of the error of NumPy or PyTorch.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(f"{what} does not fit into memory; choose a smaller one") from error


def is_out_of_memory(error: Exception) -> bool:
    """Say whether NumPy or PyTorch raised this because memory ran out."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY))


def in_bfloat16(train: TrainConfig, device: torch.device) -> bool:
    """Say whether the blocks of a run compute in bfloat16 on `device`."""
    if train.precision != "auto":
        return train.precision == "bfloat16"
    # Not on a CPU: few have instructions for it, and most would be slower.
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def autocast(device: torch.device, bfloat16: bool) -> torch.autocast:
    """Return the context that blocks compute in."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16)
