"""A model of `transformers` with a new LoRA adapter of `peft` on a copy that shares its weights."""

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from lmsleep.files import write_atomic
from lmsleep.foreign import PEFT, reading
from lmsleep.hf.backbone import HFBackbone
from lmsleep.hf.card import NAME
from lmsleep.hf.lora import ADAPTER, add_adapters, is_adapted
from lmsleep.layers import MemoryLayer

WEIGHTS, PREFIX = "adapter_model.safetensors", "base_model.model."  # as `peft` has them
# Families whose kernels read the weights of these maps directly: `peft` puts no adapter beside them.
FUSED, MAMBA = "out_proj", {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}


class Adapted(HFBackbone):
    """A backbone with a LoRA adapter that changes nothing at first and alone requires gradients.

    Its model is a copy that shares the weights of the original, which never sees the adapter. Adapters stand
    beside the linear maps of the model's own blocks: not beside routers of experts nor in inserted memory
    layers, so the adapter fits the model without these layers too.

    Args:
        backbone: the original.
        rank: of the adapter.
        alpha: its scale is `alpha / rank`.
        targets: last parts of the names of the maps that get one; default all of them.
        seed: of its first weights.

    Raises:
        ValueError: if `peft` is not installed, for targets that no map is called, or a model with an adapter.
    """

    def __init__(
        self, backbone: HFBackbone, *, rank: int, alpha: float, targets: Collection[str] = (), seed: int = 0
    ) -> None:
        if any(map(is_adapted, backbone.model.modules())):
            raise ValueError(
                "model: it has an adapter already; merge it (merge_and_unload() of peft) or unload it first"
            )
        super().__init__(_sharing(backbone.model), backbone.layouts)
        self.rank, self.alpha = rank, alpha
        fused = FUSED if self.model.config.model_type in MAMBA else None
        left_alone = [
            m
            for name, m in self.blocks.named_modules()
            if isinstance(m, MemoryLayer) or name.rpartition(".")[2] == fused
        ]
        with torch.random.fork_rng():  # the caller's draws stay what they are
            torch.manual_seed(seed)
            add_adapters(self.blocks, rank=rank, alpha=alpha, dropout=0.0, targets=targets, skip=left_alone)
        for p in self.parameters():
            if p.requires_grad:  # steps are lost in the digits of a low precision
                p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
        self.eval()

    def save(self, folder: Path, about: Mapping[str, str]) -> None:
        """Write adapter_config.json, the weights and a card into a folder that is there.

        `peft.PeftModel.from_pretrained(base, folder)` reads them.

        Args:
            folder: to write into.
            about: rows of the card's table.
        """
        from peft import LoraConfig

        base = self.model.name_or_path
        if base and Path(base).exists():
            base = str(Path(base).resolve())
        tensors = {
            PREFIX + name.replace(f".{ADAPTER}.", "."): p.detach().cpu().contiguous()
            for name, p in self.model.named_parameters()
            if p.requires_grad
        }
        write_atomic(folder / WEIGHTS, save(tensors, {"format": "pt"}))
        LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=[name for name, m in self.model.named_modules() if is_adapted(m)],
            task_type="CAUSAL_LM",
            base_model_name_or_path=base or None,
            inference_mode=True,
        ).save_pretrained(str(folder))
        write_atomic(folder / NAME, _card(base, about).encode())


def with_adapter(model: Any, folder: Path) -> Any:
    """Return a model of `transformers` with the adapter of `peft` in a folder merged into its weights.

    Raises:
        FileNotFoundError: if the folder holds none.
        ValueError: if `peft` is not installed, or the adapter does not fit the model.
    """
    if not (folder / PEFT).is_file():
        raise FileNotFoundError(f"{folder} holds no adapter of peft: {PEFT} is missing")
    try:
        from peft import PeftModel
    except ImportError:
        raise ValueError("LoRA needs peft: pip install 'lmsleep[hf]'") from None
    with reading(f"{folder}: peft cannot put this adapter on the model"):
        return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()


def _sharing(model: Any) -> Any:
    """Return a copy of a model in the memory of its weights, which require no gradients in the copy."""
    # What the memo holds already is not copied. Parameters are made anew, for whether they require gradients
    # is said on the object.
    shared: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()
    }
    shared |= {id(b): b for b in model.buffers()}
    return copy.deepcopy(model, shared)


def _card(base: str, about: Mapping[str, str]) -> str:
    """Return the text of the model card."""
    rows = "".join(f"| {name} | {value} |\n" for name, value in about.items())
    return f"""---
library_name: peft
tags: [lmsleep, lora, context-distillation]
---

# Slow weights: what a model had read, distilled into an adapter

| base model | {Path(base).name or "unknown"} |
|---|---|
{rows}
The adapter was trained until the model with it, and with nothing in view, predicts what the model without it
predicts of a text that it has read. It says what the text said: share it as you would share the text.

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "FOLDER")  # merge_and_unload() merges it, unload() takes it off
```
"""
