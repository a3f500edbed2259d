"""What a model costs: parameters, bytes of memory, FLOPs of waking and of sleeping."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lmsleep.backbones import build
from lmsleep.flops import flops_of
from lmsleep.sleep import SleepConfig, read_window


def cost(model: Any, sleep: SleepConfig, *, dtype_bytes: int = 4) -> dict[str, Any]:
    """Count parameters, bytes of memory and FLOPs for one sequence (batch of 1).

    FLOPs are those of matrix products (multiply and add count as two), counted by PyTorch's own
    counter on the real forward pass: one more token at the end of a full window, and the passes
    2 ... N of a sleep on it. Keys and values take `dtype_bytes` per number, fast weights four.

    Args:
        model: a `Model` on the device "meta" (`on_meta`), where nothing is computed, or the options of one
            with random weights: `HybridConfig`, or those of a backbone of one's own.
        sleep: its window and passes; the window defaults to 64 tokens where nothing is evicted.
        dtype_bytes: bytes of a key or value: 4 in float32, 2 in bfloat16.
    """
    L = sleep.window or 64
    if not isinstance(model, nn.Module):
        with torch.device("meta"):
            model = on_meta(build(model))  # also what the context did not catch
    # On "meta" shapes are computed and numbers are not: a model of any size is counted in milliseconds.
    tokens = torch.zeros(1, L, dtype=torch.int64, device="meta")
    empty = model.initial_state(1)
    with torch.no_grad():
        # L - 1 tokens in attention: the next one fills the window and sees as much as any token ever does.
        _, full = read_window(model, tokens[:, 1:], empty, sleep, passes=1, logits=False)

        def wake() -> None:
            read_window(model, tokens[:, :1], full, sleep, passes=1)

        def read(passes: int) -> None:
            read_window(model, tokens, empty, sleep, passes=passes, logits=False)

        wake_flops = flops_of(wake)
        # The difference leaves the passes 2 ... N, with everything that surrounds a window counted in both.
        sleep_flops = flops_of(lambda: read(sleep.passes)) - flops_of(lambda: read(1))
    kv_bytes = sum(
        c[0, 0].numel() * dtype_bytes
        for kind, layer in zip(model.kinds, full.cache.layers, strict=True)
        if "attention" in kind
        for c in layer[:2]
    )
    memory_bytes = empty.memory.nbytes
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "blocks": list(model.kinds),
        "window": sleep.window,
        "passes": sleep.passes,
        "fast_weight_bytes": memory_bytes,
        "kv_bytes_per_token": kv_bytes,
        "kept_bytes": sleep.eviction.kept_bytes(model, full.cache, L) if sleep.window else 0,
        "break_even_tokens": memory_bytes // kv_bytes + 1 if kv_bytes else None,
        "flops_wake_token": wake_flops,
        "flops_sleep": sleep_flops,
        "flops_sleep_per_token": sleep_flops / L,
    }


def on_meta(model: Any) -> Any:
    """Move a model to the device "meta", where weights that it uses in several places stay one."""
    shared = [names for names in parameter_names(model) if len(names) > 1]
    model = model.to("meta")  # which makes a parameter anew wherever it is used
    for first, *others in shared:
        share(model, others, model.get_parameter(first))
    return model


def parameter_names(model: nn.Module) -> list[list[str]]:
    """Return the names of every parameter, of which one that is used in several places has several."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return [*names.values()]


def share(model: nn.Module, names: Iterable[str], parameter: nn.Parameter) -> None:
    """Make `parameter` the one of all these names."""
    for name in names:
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, parameter)
