"""The hybrid decoder of lmsleep as a kind of backbone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lmsleep.backbones.kind import KEY, SLEEP, Kind, Model
from lmsleep.models import HybridConfig, HybridLM
from lmsleep.sleep import SleepConfig


class Hybrid(Kind):
    """Attention and fast-weight blocks in any order, trained from random weights."""

    def to_dict(self, options: HybridConfig) -> dict[str, Any]:
        """Return the options in JSON-ready form, with the name of the kind."""
        # The name in the file is what finds the class again, in another process or years later.
        return {KEY: self.name, **options.to_dict()}

    def from_dict(self, data: Mapping[str, Any]) -> HybridConfig:
        """Return the options that `to_dict` made `data` of; raises ValueError for what is not."""
        if not isinstance(data, Mapping):
            return HybridConfig.from_dict(data)  # which says so
        # HybridConfig knows no kinds, and refuses fields that it does not have.
        return HybridConfig.from_dict({k: v for k, v in data.items() if k != KEY})

    def check(self, options: HybridConfig, sleep: SleepConfig) -> None:
        """Refuse a sleep that writes nothing, or that needs what these blocks do not have."""
        by = sleep.consolidator
        by.check_model(options)
        own = [options.for_block(i) for i in range(len(options.blocks))]
        by.check(
            [
                kind != "attention" or block.trained_mlp or block.in_place_mlp or bool(block.memory_tokens)
                for kind, block in zip(options.blocks, own, strict=True)
            ]
        )

    def check_start(self, options: HybridConfig, inserted: tuple[int, ...]) -> None:
        """Refuse inserted blocks that are none of the model."""
        if unknown := set(inserted) - set(range(len(options.blocks))):
            raise ValueError(f"inserted: no block {min(unknown)} among {len(options.blocks)} blocks")

    def build(self, options: HybridConfig, *, bfloat16: bool = False) -> HybridLM:
        """Make a model with random weights, in float32 for any autocast."""
        return HybridLM(options)

    def take_weights(self, model: Model, source: Model, inserted: tuple[int, ...]) -> None:
        """Begin with the weights of `source`, which has all blocks but the inserted ones."""
        if not isinstance(model, HybridLM) or not isinstance(source, HybridLM):
            raise ValueError(f"start: a hybrid takes the weights of a hybrid, not of {type(source).__name__}")
        model.take_weights(source, inserted)

    def save(self, model: Model, options: HybridConfig, folder: Path) -> None:
        """Write model and configuration as `HybridLM.save_pretrained` does."""
        assert isinstance(model, HybridLM)
        model.save_pretrained(folder)

    def load(
        self,
        options: HybridConfig,
        folder: Path,
        device: torch.device | str = "cpu",
        *,
        bfloat16: bool = False,
    ) -> HybridLM:
        """Return the model that `save` wrote; errors as for `Kind.load`."""
        model = HybridLM.from_pretrained(folder, device)
        # The folder says its own configuration; the run's must be the same, or tokens and S would not fit it.
        if model.config != options:
            raise ValueError(f"{folder} holds a model of another configuration than its run")
        return model

    def recognises(self, found: Mapping[str, Any]) -> bool:
        """Say whether config.json is that of `HybridLM.save_pretrained`."""
        # Folders of transformers have a model_type; some of them might list blocks as well.
        return "blocks" in found and "model_type" not in found

    def open(self, folder: Path, device: torch.device | str) -> tuple[Model, SleepConfig]:
        """Return a saved model, which does not say how it sleeps."""
        return HybridLM.from_pretrained(folder, device), SLEEP


def hybrid_options(options: Any) -> HybridConfig:
    """Return the options of a model that must be a hybrid.

    Raises:
        ValueError: if it is not.
    """
    if isinstance(options, HybridConfig):
        return options
    raise ValueError(f"model: this is for hybrids (HybridConfig), not for {type(options).__name__}")
