"""Where a run computes, and in what precision."""

import torch

from lmsleep.training.config import TrainConfig


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
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r} is none that PyTorch knows; use 'auto', 'cpu' or 'cuda'") from None


def in_bfloat16(train: TrainConfig, device: torch.device) -> bool:
    """Say whether the blocks of a run compute in bfloat16 on `device`."""
    if train.precision != "auto":
        return train.precision == "bfloat16"
    # Not on a CPU: few have instructions for it, and most would be slower.
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def autocast(device: torch.device, bfloat16: bool) -> torch.autocast:
    """Return the context that blocks compute in."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16)
