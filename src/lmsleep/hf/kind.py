"""Models of `transformers` as a kind of backbone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmsleep.backbones import Kind, Model
from lmsleep.hf.adapter import whole
from lmsleep.hf.backbone import HFBackbone
from lmsleep.hf.finetune import FineTune, export, load_trained, pretrained_backbone, save_trained
from lmsleep.hf.kept import KeptBackbone
from lmsleep.hf.loading import check_can_sleep, has_tokenizer, load_pretrained
from lmsleep.hf.trial import adapt
from lmsleep.sleep import Hard, SleepConfig


class Pretrained(Kind):
    """A pretrained model, of which some weights are trained."""

    def check(self, options: FineTune, sleep: SleepConfig) -> None:
        """Refuse sleeps that these models cannot have, and those that no session could go on with."""
        sleep.consolidator.check_model(options)
        if sleep.wake_passes != 1:
            raise ValueError(f"wake_passes={sleep.wake_passes}: a pretrained model wakes in one pass only")

    def check_start(self, options: FineTune, inserted: tuple[int, ...]) -> None:
        """Refuse: the folder is the start."""
        raise ValueError("start is for models trained from scratch; a fine-tuned one starts from folder")

    def check_keep(self, options: FineTune, sleep: SleepConfig) -> None:
        """Refuse where more than memory layers is trained, or windows do not begin with nothing."""
        if options.train != "memory":
            raise ValueError(
                f"keep: hidden states change where train={options.train!r}; train 'memory' alone"
            )
        if sleep.window is None or not isinstance(sleep.eviction, Hard):
            raise ValueError("keep: windows must begin with nothing in attention; use eviction='hard'")
        loop = getattr(sleep.consolidator, "loop", None)
        if sleep.passes > 1 and (loop is None or loop[0] == 0):
            raise ValueError(
                "keep: a loop over all blocks leaves none whose hidden states could be kept; give one that "
                f"begins later (loop), got {loop}"
            )

    def keep(self, model: Model, folder: Path, *, bfloat16: bool) -> HFBackbone:
        """Return the model as one that keeps hidden states; errors of `KeptBackbone`."""
        assert isinstance(model, HFBackbone)
        return KeptBackbone(model, folder, bfloat16=bfloat16)

    def build(self, options: FineTune, *, bfloat16: bool = False) -> HFBackbone:
        """Load the pretrained model; arguments and errors as for `pretrained_backbone`."""
        return pretrained_backbone(options, bfloat16=bfloat16)

    def weights(self, model: Model) -> dict[str, Tensor]:
        """Return what is trained of the model, by the names of `save`."""
        assert isinstance(model, HFBackbone)
        return {name: p.detach() for name, p in model.model.named_parameters() if p.requires_grad}

    def save(self, model: Model, options: FineTune, folder: Path) -> None:
        """Write what is trained of the model."""
        assert isinstance(model, HFBackbone)
        save_trained(model, folder)

    def load(
        self, options: FineTune, folder: Path, device: torch.device | str = "cpu", *, bfloat16: bool = False
    ) -> HFBackbone:
        """Return the pretrained model with what `save` wrote; errors as for `Kind.load`."""
        model = pretrained_backbone(options, bfloat16=bfloat16)
        load_trained(model, folder)
        return model.to(device)

    def recognises(self, found: Mapping[str, Any]) -> bool:
        """Say whether config.json is that of a model of `transformers`."""
        return "model_type" in found

    def check_place(self, folder: Path) -> None:
        """Refuse a model with attention alone; see `Kind.check_place`."""
        check_can_sleep(folder)

    def open(self, folder: Path, device: torch.device | str) -> tuple[Model, SleepConfig]:
        """Return the model of a folder of `transformers`, and the sleep that it was exported with.

        Whoever has no use for a model with attention alone has asked `check_place`.
        """
        loaded = load_pretrained(folder).to(device)
        from lmsleep.hf.sleeping import saved_sleep  # which imports transformers

        told = saved_sleep(loaded.config, folder)
        model = adapt(loaded, attention_alone=True)
        if told is None and not any(model.initial_state(1).memory.writes):
            return model, SleepConfig(window=512)  # further passes would write nothing
        return model, told or SleepConfig(window=512, passes=4, loop="middle")

    def outline(self, folder: Path) -> tuple[Model, SleepConfig]:
        """Return the opened model: only a loaded one shows which of its blocks have fast weights."""
        return self.open(folder, "cpu")

    def shapes(self, options: FineTune) -> Model:
        """Return the built model, for the same reason."""
        return self.build(options, bfloat16=True)

    def tokenizer(self, folder: Path) -> str:
        """Return the folder itself, which holds the tokenizer too; of an adapter, its base model."""
        folder = whole(folder)
        if not has_tokenizer(folder):
            raise ValueError(f"{folder} holds no tokenizer; pass --tokenizer FOLDER (or bytes)")
        return str(folder)

    def source(self, options: FineTune) -> Path:
        """Return the folder that is fine-tuned."""
        return options.folder

    def export(
        self, model: Model, options: FineTune, sleep: SleepConfig, folder: Path, about: Mapping[str, str]
    ) -> None:
        """Write an adapter, or the whole model where all of it was trained, complete or not at all."""
        assert isinstance(model, HFBackbone)
        export(model, options, sleep, folder, about)
