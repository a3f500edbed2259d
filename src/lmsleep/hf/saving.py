"""`save_adapter`: what was trained of a model, as a folder that is small and belongs to its base model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmsleep import shipped
from lmsleep.files import replacing_folder, write_atomic
from lmsleep.foreign import read_json
from lmsleep.hf.adapter import CONFIG, LINK, SETTINGS, Adapter, BaseModel, is_adapter
from lmsleep.hf.adapter_card import adapter_card
from lmsleep.hf.backbone import HFBackbone
from lmsleep.hf.card import NAME
from lmsleep.hf.difference import difference
from lmsleep.hf.loading import load_pretrained
from lmsleep.sleep import SleepConfig


@dataclass(frozen=True)
class SavedAdapter:
    """A record of what `save_adapter` wrote.

    Attributes:
        folder: of the adapter.
        parameters: how many numbers it has.
        bytes: of its weights.
        lost: the largest share of what was learned of a tensor (its distance from the base's, or from zero)
            that `rank` and `dtype` left out.
        worst: the tensor of which that is.
    """

    folder: Path
    parameters: int
    bytes: int
    lost: float
    worst: str


def save_adapter(
    model: Any,
    folder: str | Path,
    *,
    base: str | Path,
    sleep: SleepConfig | None = None,
    rank: int | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    license: str | None = None,
    base_model: str | None = None,
    about: Mapping[str, str] | None = None,
) -> SavedAdapter:
    """Write what a model has beyond its base, complete or not at all; `load_adapter` puts it on again.

    That is whatever differs: inserted memory layers, adapters of `peft`, any weight that was trained. The
    folder holds safetensors, config.json and a model card, as the Hub wants it.

    Args:
        model: a model of `transformers`, or its backbone; left as it is.
        folder: is made, or replaced if it is one of an adapter.
        base: what it was made from: a folder, a file or the name of a model that a package brings.
        sleep: how it sleeps; default as `sleepify` was told.
        rank: of the changes of matrices, memory layers' from the matrix of an attention that they began as,
            wherever two factors take fewer numbers. None: whole matrices. Adapters of `peft` keep theirs.
        dtype: of factors, and of new matrices (None: that of the base); vectors, and whole weights of the
            base, keep theirs.
        license: of the adapter, for the card: an identifier as the Hub has them; default that of the base.
        base_model: name of the base on the Hub, for the card; default as its folder says.
        about: rows for the card, such as {"Recipe": ..., "Data": ...}.

    Returns:
        Its size, and how much of what was learned is not in it.

    Raises:
        FileNotFoundError: if there is no base.
        FileExistsError: if something else is at `folder`, or an adapter that holds its base model.
        ValueError: if the model was not made from base, shares no weight with it, or nobody says how it
            sleeps.
    """
    model = model.model if isinstance(model, HFBackbone) else model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            "model: a prompt that was learned is no part of its weights, so no adapter can hold it"
        )
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    folder, place = Path(folder), shipped.find(base)
    if folder.exists() and not is_adapter(folder):
        raise FileExistsError(f"folder={str(folder)!r} exists and is no adapter; name another")
    link = folder / LINK
    if link.exists() and not link.is_symlink():
        raise FileExistsError(
            f"folder={str(folder)!r} holds a base model ({LINK}), which would be replaced with it; move that "
            "away and link it there, or name another folder"
        )
    if is_adapter(place):
        raise ValueError(f"base={str(base)!r} is an adapter itself; name the model that it belongs to")
    told = getattr(model.config, "sleep", None) if sleep is None else sleep.to_dict()
    if told is None:
        raise ValueError("sleep: nobody says how the model sleeps; pass sleep=SleepConfig(...)")
    origin = load_pretrained(place)
    found = difference(model, origin, rank=rank, dtype=dtype or origin.dtype)
    configs = model.config.get_text_config(), origin.config.get_text_config()
    now, before = ({name: getattr(c, name, None) for name in SETTINGS} for c in configs)
    name = shipped.name_of(place) or str(place.resolve())
    adapter = Adapter(
        BaseModel.of(origin, name),
        {name: value for name, value in now.items() if value != before[name]},
        told,
        _ends(origin),
        found.inherits,
        found.tensors,
    )
    saved = SavedAdapter(
        folder,
        sum(t.numel() for t in found.tensors.values()),
        sum(t.nbytes for t in found.tensors.values()),
        found.lost,
        found.worst,
    )
    rows = {"numbers": f"{saved.parameters:,} ({saved.bytes / 1e6:.1f} MB)", **(about or {})}
    card = adapter_card(
        origin.config,
        SleepConfig.from_dict(told),
        rows,
        license=license,
        base_model=base_model,
    )
    with replacing_folder(folder) as partial:
        if (
            link.is_symlink()
            and read_json(folder / CONFIG)["base"]["fingerprint"] == adapter.base.fingerprint
        ):
            (partial / LINK).symlink_to(link.readlink())
        adapter.write(partial)
        write_atomic(partial / NAME, card.encode())
    return saved


def _ends(model: Any) -> Any:
    """Return the tokens at which `generate` of a model ends: a number, a list, or None."""
    said = [getattr(model, name, None) for name in ("generation_config", "config")]
    return next((ends for c in said if (ends := getattr(c, "eos_token_id", None)) is not None), None)
