"""Fine-tuning: which weights of a pretrained model are trained, and what becomes of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from lmsleep.files import write_atomic
from lmsleep.hf.adapter import changed, whole
from lmsleep.hf.backbone import HFBackbone
from lmsleep.hf.folder import write_folder
from lmsleep.hf.insertion import check_places, insert_memory_layers
from lmsleep.hf.loading import load_pretrained
from lmsleep.hf.lora import add_adapters, factors, is_adapted
from lmsleep.hf.saving import save_adapter
from lmsleep.hf.trial import adapt
from lmsleep.layers import MemoryKind, MemoryLayer
from lmsleep.sleep import SleepConfig

Trained = Literal["lora", "memory", "full"]
WEIGHTS = "trained.safetensors"


@dataclass(frozen=True, kw_only=True)
class FineTune:
    """A pretrained model and which of its weights are trained."""

    folder: Path
    """Hugging Face folder or GGUF file of the model."""
    train: Trained = "lora"
    """lora: adapters beside the linear maps of all blocks, those of the fast weights included, and whatever
    else fast weights are made with (decays, short convolutions, norms). memory: the layers with fast weights
    alone. full: everything."""
    lora: int = 16
    """Rank of the adapters."""
    lora_alpha: float = 32.0
    """Their scale is lora_alpha / lora."""
    lora_dropout: float = 0.0
    """Dropout on what the adapters read."""
    insert: int = 0
    """Memory layers to add to a model that has only attention; the paper: 6. They are trained in full."""
    insert_kind: MemoryKind = "gated_delta_net"
    """gated_delta_net or kda, which begin as the attention behind them and recall what was slept
    on, or jet (a JetBlock), as the paper adds them to Ouro."""
    insert_after: tuple[int, ...] = ()
    """Blocks that they follow, as many as `insert`; default: spread evenly. Blocks before the first need
    neither gradients nor, where hidden states are kept (`keep`), a pass."""
    targets: tuple[str, ...] = ()
    """Linear maps that get adapters, by the last part of their names (q_proj out_proj ...); default: all
    inside the blocks but routers of experts."""

    def __post_init__(self) -> None:
        if self.train not in get_args(Trained):
            raise ValueError(f"train must be one of {', '.join(get_args(Trained))}, got {self.train!r}")
        if self.lora < 1:
            raise ValueError(f"lora must be a rank of at least 1, got {self.lora}")
        if not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha must be positive, got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be at least 0 and less than 1, got {self.lora_dropout}")
        check_places(self.insert, self.insert_after)
        if self.targets and self.train != "lora":
            raise ValueError(f"targets are maps that get adapters; train={self.train!r} has none")


def pretrained_backbone(options: FineTune, *, bfloat16: bool = False) -> HFBackbone:
    """Load the model of the folder in float32, ready to be trained; new adapters change nothing yet.

    Args:
        options: the folder and what is trained.
        bfloat16: it will run under autocast to bfloat16, which rounds matrices in any case: frozen ones of
            the blocks are rounded once, with the same result in half the memory.

    Raises:
        FileNotFoundError: if the folder holds no model.
        ValueError: if it cannot be loaded, cannot sleep, or has no map of the name of a target.
    """
    backbone = adapt(_start(options).float())
    _choose(backbone, options)
    if bfloat16:
        from lmsleep.hf.cpu_attention import attend_in_float32  # which imports transformers

        attend_in_float32(backbone.model)
        for module in backbone.blocks.modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                module.weight.data = module.weight.data.bfloat16()
    return backbone


def _start(options: FineTune) -> Any:
    """Load the model that is trained, with the memory layers that are inserted."""
    model = load_pretrained(options.folder)
    wake_once(model)
    if options.insert:
        insert_memory_layers(model, options.insert, options.insert_kind, options.insert_after or "even")
    return model


def wake_once(model: Any) -> None:
    """Move the loop of Ouro from waking to sleep."""
    if getattr(model.config, "total_ut_steps", 1) > 1:
        model.config.total_ut_steps = 1


def _choose(backbone: HFBackbone, options: FineTune) -> None:
    """Let the weights that are trained require gradients, and no others."""
    backbone.requires_grad_(options.train == "full")
    layers = memory_layers(backbone)
    if options.train == "memory":
        for layer in layers:
            layer.requires_grad_(True)
    if options.train != "lora":
        return
    add_adapters(
        backbone.blocks,
        rank=options.lora,
        alpha=options.lora_alpha,
        dropout=options.lora_dropout,
        targets=options.targets,
        skip=[layer for layer in layers if isinstance(layer, MemoryLayer)],
    )
    for layer in layers:
        for module in layer.modules():
            if isinstance(layer, MemoryLayer) or not isinstance(module, nn.Linear):
                for p in module.parameters(recurse=False):
                    p.requires_grad_(True)


def memory_layers(backbone: HFBackbone) -> list[nn.Module]:
    """Find the layers with fast weights, one a block that has any: those with a decay, `A_log`."""
    return [
        layer
        for block in backbone.blocks
        for layer in block.children()
        if any(name.endswith("A_log") for name, _ in layer.named_parameters())
    ]


def save_trained(backbone: HFBackbone, folder: Path) -> None:
    """Write the weights that are trained into `folder`, which is made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: p.detach().cpu().contiguous()
        for name, p in backbone.model.named_parameters()
        if p.requires_grad
    }
    write_atomic(folder / WEIGHTS, save(tensors, {"format": "pt"}))


@torch.no_grad()
def load_trained(backbone: HFBackbone, folder: Path) -> None:
    """Load the weights that `save_trained` wrote.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: for a damaged file, or one of other weights.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no fine-tuned weights: {WEIGHTS} is missing")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    trained = {name: p for name, p in backbone.model.named_parameters() if p.requires_grad}
    if {n: p.shape for n, p in trained.items()} != {n: t.shape for n, t in tensors.items()}:
        raise ValueError(f"{path} holds other weights than those that the configuration trains")
    for name, p in trained.items():
        p.copy_(tensors[name])


@torch.no_grad()
def merged(backbone: HFBackbone, options: FineTune) -> Any:
    """Merge what was trained, and adapters, into the model of the folder, in its dtypes.

    The backbone is left as it is.
    """
    model = _start(options)
    for name, module in backbone.model.named_modules():
        if is_adapted(module):
            weight = model.get_parameter(f"{name}.weight")
            # Added in float32 and rounded once, to the dtype of the folder.
            weight.copy_(changed(weight, *factors(module)))
    own = dict(model.named_parameters())
    for name, p in backbone.model.named_parameters():
        if p.requires_grad and name in own:
            own[name].copy_(p)
    return model


def export(
    backbone: HFBackbone, options: FineTune, sleep: SleepConfig, folder: Path, about: Mapping[str, str]
) -> None:
    """Write what was trained as the folder of an adapter, or where that is everything, the whole model.

    It says how the model sleeps, is complete or not at all, and replaces what stood at `folder`; errors are
    those of `save_adapter` and `write_folder`. `about`: rows for the card of an adapter.
    """
    from lmsleep.hf.sleeping import sleepify  # which imports transformers

    if options.train == "full":
        write_folder(sleepify(merged(backbone, options), sleep), options.folder, folder)
    else:
        # In the dtype of the base, as a whole model would be: to the last digit what was trained.
        save_adapter(backbone, folder, base=whole(options.folder), sleep=sleep, dtype=None, about=about)
