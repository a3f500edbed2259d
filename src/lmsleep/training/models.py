"""The two kinds of model that a run trains: one from scratch, and a pretrained one.

Everything else of training knows them as a `Backbone` with weights.
"""

from pathlib import Path

import torch

from lmsleep.hf import HFBackbone
from lmsleep.hf.finetune import FineTune, export, load_trained, pretrained_backbone, save_trained
from lmsleep.models import HybridConfig, HybridLM

Model = HybridLM | HFBackbone


__all__ = ["Model", "build", "export", "load", "save"]


def build(options: HybridConfig | FineTune, *, bfloat16: bool = False) -> Model:
    """A model with random weights, or the pretrained one; `bfloat16`: as for `pretrained_backbone`.

    Raises:
        FileNotFoundError: if there is no pretrained model.
        ValueError: if it does not fit.
    """
    if isinstance(options, FineTune):
        return pretrained_backbone(options, bfloat16=bfloat16)
    return HybridLM(options)


def save(model: Model, folder: Path) -> None:
    """Write the weights that training changes into `folder`."""
    if isinstance(model, HFBackbone):
        save_trained(model, folder)
    else:
        model.save_pretrained(folder)


def load(
    options: HybridConfig | FineTune,
    folder: Path,
    device: torch.device | str = "cpu",
    *,
    bfloat16: bool = False,
) -> Model:
    """The model that `save` wrote.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged or of another configuration.
    """
    if isinstance(options, FineTune):
        backbone = pretrained_backbone(options, bfloat16=bfloat16)
        load_trained(backbone, folder)
        return backbone.to(device)
    model = HybridLM.from_pretrained(folder, device)
    if model.config != options:
        raise ValueError(f"{folder} holds a model of another configuration than its run")
    return model
