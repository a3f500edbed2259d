"""`load_pretrained`: a model of `transformers` from a local folder, checked before anything is computed."""

import json
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lmsleep.hf import insertion
from lmsleep.text.tokenizers import HuggingFace

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
LICENSES = {
    "jet_nemotron": "the published weights of Jet-Nemotron, and what is trained from them, are licensed "
    "for non-commercial use only (NVIDIA License, section 3.3)"
}
NAMED = 5  # tensors or files that a message names before it counts the rest


def load_pretrained(path: str | Path, *, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """Load a causal language model of `transformers` from a local folder; nothing is downloaded.

    Args:
        path: a folder with config.json and safetensors, in one file or sharded.
        dtype: of the weights; default that of the checkpoint.
        options: further arguments of `from_pretrained`, such as `device_map` or `attn_implementation`.

    Returns:
        A `transformers.PreTrainedModel` in evaluation mode.

    Raises:
        FileNotFoundError: for a folder without model, or a shard that is missing.
        ValueError: for a damaged file, an architecture that is not supported, tensors that are missing, left
            over or of another shape, or a tokenizer with more tokens than the model; names the file or field.
    """
    folder = Path(path)
    config = _config(folder)
    _check_weights(folder)
    _check_tokenizer(folder, config)
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    inserted = getattr(config.get_text_config(), insertion.FIELD, None)
    own = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with _quiet():
        model, found = (insertion.with_memory(own) if inserted else AutoModelForCausalLM).from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name them all
            **options,
        )
    _check_tensors(folder, found)
    if inserted:
        # The class that made memory layers has done its work; from here on the model is of its own family.
        model.__class__ = own
    if note := LICENSES.get(config.model_type):
        logging.getLogger(__name__).warning("%s: %s", folder, note)
    return model


def is_pretrained(folder: Path) -> bool:
    """Return True if the folder's config.json is that of a model of `transformers`."""
    file = folder / "config.json"
    return file.is_file() and "model_type" in _json(file)


def has_tokenizer(folder: Path) -> bool:
    """Return True if there is a tokenizer of `transformers` in the folder."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _config(folder: Path) -> Any:
    """Read the configuration of a supported model."""
    try:
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
    except ImportError:
        raise ValueError(f"model={str(folder)!r} needs transformers: pip install 'lmsleep[hf]'") from None
    # Importing registers the two families that transformers does not have.
    import lmsleep.hf.jet_nemotron
    import lmsleep.hf.ouro  # noqa: F401  known to transformers from here on

    file = folder / "config.json"
    if not file.is_file():
        adapter = (folder / "adapter_config.json").is_file()
        hint = " (it holds an adapter; name its base model)" if adapter else ""
        raise FileNotFoundError(f"{folder} holds no model: config.json is missing{hint}")
    fields = _json(file)
    kind = fields.get("model_type")
    if not isinstance(kind, str):
        raise ValueError(f"{file}: the field model_type is missing, so this is no model of transformers")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: model_type={kind!r} cannot be configured: {reason}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{file}: model_type={kind!r} is no causal language model, which alone can sleep")
    return config


def _check_weights(folder: Path) -> None:
    """Check that all files of the checkpoint are there, whole, and hold what the index says."""
    if (folder / INDEX).is_file():
        where = _json(folder / INDEX).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise ValueError(f"{folder / INDEX}: the field weight_map is missing")
    elif (folder / WEIGHTS).is_file():
        where = dict.fromkeys(_names(folder / WEIGHTS), WEIGHTS)
    else:
        raise FileNotFoundError(
            f"{folder} holds no weights: neither {WEIGHTS} nor {INDEX} is there "
            "(other formats are not read; save the model as safetensors)"
        )
    shards = sorted(set(where.values()))
    if lost := [s for s in shards if not (folder / s).is_file()]:
        raise FileNotFoundError(
            f"{folder}: {_some(lost)} named by {INDEX} is missing; copy all {len(shards)} shards"
        )
    for shard in shards:
        wanted = {name for name, file in where.items() if file == shard}
        # Only headers are read here, so a damaged shard of many gigabytes is found at once.
        if absent := wanted - _names(folder / shard):
            raise ValueError(f"{folder / shard} lacks {_some(absent)}, which {INDEX} says it holds")


def _names(file: Path) -> set[str]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return set(tensors.keys())
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); copy it again") from error


def _check_tokenizer(folder: Path, config: Any) -> None:
    """Check that a tokenizer beside the model knows no token that the model does not."""
    if not has_tokenizer(folder):
        return
    numbers = HuggingFace(folder).tokenizer.get_vocab().values()
    size, rows = max(numbers, default=-1) + 1, config.get_text_config().vocab_size
    if size == 0:
        raise ValueError(f"{folder}: its tokenizer has no tokens; copy the files of the tokenizer again")
    if size > rows:
        raise ValueError(
            f"{folder}: its tokenizer has {size} tokens, the model (vocab_size in config.json) only {rows}; "
            "use the tokenizer that the model was trained with"
        )


def _check_tensors(folder: Path, found: dict[str, Any]) -> None:
    """Check that the checkpoint holds the tensors of the model, all of them and no others."""
    if missing := found["missing_keys"]:
        raise ValueError(f"{folder}: the weights lack {_some(missing)}, which config.json asks for")
    if extra := found["unexpected_keys"]:
        raise ValueError(f"{folder}: the weights hold {_some(extra)}, for which config.json has no place")
    if wrong := found["mismatched_keys"]:
        shapes = [f"{name} {tuple(has)} instead of {tuple(wanted)}" for name, has, wanted in wrong]
        raise ValueError(f"{folder}: shapes contradict config.json: {_some(shapes)}")
    if errors := found["error_msgs"]:
        raise ValueError(f"{folder}: {_some(errors)}")


def _json(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); copy it again") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} is no JSON object; copy it again")
    return fields


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    rest = f" and {len(ordered) - NAMED} more" if len(ordered) > NAMED else ""
    return ", ".join(ordered[:NAMED]) + rest


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the report of `transformers` on tensors (ours is an error); show a bar only on a terminal."""
    from transformers.utils import logging

    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()
