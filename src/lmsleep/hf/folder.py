"""Write a model as an ordinary folder of `transformers`, with the tokenizer that it came with."""

import shutil
from pathlib import Path
from typing import Any

from lmsleep.files import replacing_folder
from lmsleep.foreign import reading
from lmsleep.gguf_file import has_tokenizer, is_gguf
from lmsleep.hf.adapter import whole
from lmsleep.hf.card import NAME, write_card
from lmsleep.text.tokenizers import HuggingFace

GENERATION = "generation_config.json"
# What a folder does not take from the one it was made from: weights, and what describes them.
NOT_COPIED = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx",
    "*.index.json", "config.json", "README.md",
)  # fmt: skip


def write_folder(model: Any, source: Path, folder: Path) -> None:
    """Write a model, complete or not at all: weights, tokenizer, chat template, and a model card.

    Args:
        model: of `transformers`, which may sleep.
        source: folder or GGUF file that it was made from, or of an adapter that is on it; the tokenizer and
            other small files come along.
        folder: to write; what stood there is replaced.

    Raises:
        ValueError: for a model that `transformers` cannot save.
        OSError: if the folder cannot be written.
    """
    from transformers import GenerationConfig

    from lmsleep.hf.sleeping import saved_sleep  # which imports transformers

    # The folder's own is copied below, as it is: transformers 5.21 and 5.22 do not write what contradicts
    # itself (a temperature with do_sample=false), as published ones do.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    source = whole(source)
    with replacing_folder(folder) as partial:
        with reading(f"{folder}: transformers cannot save this model"):
            model.save_pretrained(partial)
        if not (partial / NAME).exists():  # a model that was made to sleep has written its own
            write_card(partial, model.config, saved_sleep(model.config, source))
        if is_gguf(source):
            _unpack(source, partial)
        else:
            _copy(source, partial)


def _copy(source: Path, folder: Path) -> None:
    """Copy the small files of a folder that the new one does not have."""
    if (source / GENERATION).is_file():
        (folder / GENERATION).unlink()
    for file in source.iterdir():
        if file.is_file() and not any(map(file.match, NOT_COPIED)) and not (folder / file.name).exists():
            shutil.copy(file, folder)


def _unpack(file: Path, folder: Path) -> None:
    """Write the tokenizer of a GGUF file, if it has one."""
    if has_tokenizer(file):
        HuggingFace(file).tokenizer.save_pretrained(folder)
