"""Parameters that FSDP2 shards over processes, gathered once for a text and not for every call of a block.

FSDP2 gathers the parameters of a block when the block is called, and frees them after the call. A model that
sleeps calls its blocks once a pass and window, as often as the rows of a process need it: processes that wait
for each other at every call would wait for ever where their rows differ in length, and send as many times the
model as there are passes. So everything is gathered before a text is read, and freed when its gradients are
there (which takes the memory of the gradients, as they are whole until the backward pass has reached the
first window); the optimizer's state and its parameters stay sharded.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def gathering(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let the `forward` of a module gather what FSDP2 sharded of it, once for all calls of its parts.

    Collectives are then the same on all processes, however often each of them calls a part. Gradients of a
    batch in parts are reduced after every part, for one that waits would be reduced at the first of the calls
    that some processes make and others do not.
    """

    @wraps(forward)
    def gathered(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        units = _units(module)
        for unit in units:
            with suppress(AssertionError):  # of torch's `replicate`, which has nothing to free
                unit.set_reshard_after_forward(False, recurse=False)
            unit.set_reshard_after_backward(False, recurse=False)
            unit.set_requires_gradient_sync(True, recurse=False)
            unit.reshard()  # a backward pass that never came has left old values there
            unit.unshard()
        try:
            out = forward(module, *args, **kwargs)
        except BaseException:
            _free(units)
            raise
        if units:
            _free_after_backward(units, out.values() if isinstance(out, dict) else out)
        return out

    return gathered


def _units(module: nn.Module) -> list[Any]:
    """Return the modules that FSDP2 shards, in an order that is the same on all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _free(units: Iterable[Any]) -> None:
    for unit in units:
        unit.reshard()


def _free_after_backward(units: list[Any], said: Iterable[Any]) -> None:
    """Free gathered parameters when the backward pass from any tensor of `said` has ended, or now."""
    ends = [t for t in said if isinstance(t, Tensor) and t.requires_grad]
    for end in ends:
        end.register_hook(partial(_when_done, units))
    if not ends:
        _free(units)


def _when_done(units: list[Any], gradient: Tensor) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(partial(_free, units))
