"""Recurrences are summed in the precision of `S`, whatever autocast says."""

from contextlib import AbstractContextManager, nullcontext

import torch


def exact(device: torch.device) -> AbstractContextManager[object]:
    """No autocast on that device, within."""
    known = torch.amp.is_autocast_available(device.type)  # not by "meta", which counts costs
    return torch.autocast(device.type, enabled=False) if known else nullcontext()
