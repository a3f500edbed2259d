"""Sum recurrences in the precision of `S`, whatever autocast says."""

from contextlib import AbstractContextManager, nullcontext

import torch


def exact(device: torch.device) -> AbstractContextManager[object]:
    """Return a context without autocast on that device."""
    known = torch.amp.is_autocast_available(device.type)  # not by "meta", which counts costs
    return torch.autocast(device.type, enabled=False) if known else nullcontext()
