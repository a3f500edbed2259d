"""Low-rank adapters (LoRA; Hu et al., arXiv 2106.09685) on the linear maps inside blocks, through `peft`."""

import sys
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

# Maps that choose experts: without the auxiliary loss of their model they are better left alone.
ROUTERS = ("gate", "router", "shared_expert_gate")
ADAPTER = "default"  # the name that peft gives the only one
PLAIN = (f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight")  # its parameters, one and the other


def add_adapters(
    blocks: nn.ModuleList,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Collection[str] = (),
    skip: Sequence[nn.Module] = (),
) -> None:
    """Freeze `blocks` and put an adapter, which changes nothing at first, beside each of their linear maps.

    The blocks are handed to `peft` without the model around them, whose type would make it refuse the output
    projections of Mamba-2: a fused kernel reads their weights directly, but only where no state is carried.

    Args:
        blocks: decoder blocks.
        rank: of the adapters.
        alpha: their scale is `alpha / rank`.
        dropout: on what they read.
        targets: last parts of the names of the maps; default all but routers.
        skip: modules inside which nothing gets an adapter.

    Raises:
        ValueError: if `peft` is not installed, or for targets that no map is called.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError("LoRA needs peft: pip install 'lmsleep[hf]'") from None
    left_alone = {id(inner) for module in skip for inner in module.modules()}
    maps = [
        name
        for name, module in blocks.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in left_alone and _last(name) not in ROUTERS
    ]
    names = sorted({_last(name) for name in maps})
    if unknown := set(targets) - set(names):
        raise ValueError(
            f"targets: no linear map is called {', '.join(sorted(unknown))}; there are {', '.join(names)}"
        )
    wanted = [name for name in maps if not targets or _last(name) in targets]
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=wanted)
    inject_adapter_in_model(config, blocks)


def is_adapted(module: nn.Module) -> bool:
    """Return True if a module is a linear map with an adapter beside it."""
    return hasattr(module, "lora_A")


def check_plain(model: nn.Module) -> None:
    """Refuse adapters of `peft` that are more than two factors beside linear maps, or merged and still there.

    Raises:
        ValueError: naming a module or parameter.
    """
    if "peft" not in sys.modules:  # so there are none
        return
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    odd = [
        name
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and (type(module) is not Linear or module.merged)
    ]
    odd += [
        name
        for name, _ in model.named_parameters()
        if ".modules_to_save." in name or (".lora_" in name and not name.endswith(PLAIN))
    ]
    if odd:
        raise ValueError(
            f"model: {odd[0]} is of no plain LoRA adapter called {ADAPTER!r} on linear maps, the only kind "
            "that is taken apart; merge it first (merge_and_unload of peft)"
        )


def factors(module: Any) -> tuple[Tensor, Tensor]:
    """Return the two matrices, `[out, r]` and `[r, in]`, whose product an adapter adds to a weight."""
    up, down = module.lora_B[ADAPTER].weight, module.lora_A[ADAPTER].weight
    return up * module.scaling[ADAPTER], down


def _last(name: str) -> str:
    return name.rpartition(".")[2]
