"""Models in the format GGUF: one file of weights, tokenizer and chat template, read by `transformers`."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lmsleep.foreign import reading

# Tensors of blocks that carry more than keys and values: recurrences and short convolutions.
RECURRENT = (".ssm_", ".time_mix", ".shortconv")
# What `transformers` leaves out, and without which a model computes something else: factors of positions.
IGNORED = ("rope_freqs", "rope_factors")
SCALED, READ_SCALED = ".rope.scaling.type", ("gpt-oss",)  # scaled positions, and of whom they are read


def is_gguf(path: Path) -> bool:
    """Say whether `path` is a file in the format GGUF, by its name."""
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def header(file: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Read what a file says of itself, in milliseconds, whatever it holds.

    Returns:
        Its fields, of a list of words the length alone, and the names of its tensors.

    Raises:
        ValueError: for a file that is damaged or cut off, or if a package is missing.
        OSError: if it cannot be read.
    """
    _check_packages(file)
    from transformers.integrations.gguf import GgufHeader, read_gguf_metadata

    size = file.stat().st_size
    with reading(f"{file} is no whole GGUF file (copy it again)"):
        if not size:
            raise ValueError("it is empty")
        fields, names = read_gguf_metadata(str(file))
    end = 0
    # Of types whose size it does not know (Q5_0 ...) another reader of transformers reads the tensors.
    with suppress(ValueError):
        found = GgufHeader.from_file(str(file))
        end = max((found.data_start + t.offset + t.nbytes for t in found.tensors), default=0)
    if end > size:
        raise ValueError(f"{file} is cut off after {size:,} of {end:,} bytes; copy it again")
    return fields, names


def check(file: Path) -> None:
    """Refuse a file of which `transformers` would make another model, before it takes seconds to read it.

    Raises:
        ValueError: as `header`, for one of several files of a model, and for tensors that would be left out.
        OSError: as `header`.
    """
    fields, names = header(file)
    if fields.get("split.count", 0) > 1:
        raise ValueError(f"{file} is one of {fields['split.count']} files of a model; join them first")
    left_out = [name for name in names if name.startswith(IGNORED)]
    left_out += [
        f"{name}={kind!r}"
        for name, kind in fields.items()
        if name.endswith(SCALED) and kind != "none" and not name.startswith(READ_SCALED)
    ]
    if left_out:
        raise ValueError(
            f"{file} holds {left_out[0]}, which transformers leaves out; use the folder of the model that it "
            "was made from"
        )


def has_tokenizer(file: Path) -> bool:
    """Say whether there is a tokenizer in a file; errors as of `header`."""
    return "tokenizer.ggml.tokens" in header(file)[0]


def attention_only(file: Path) -> bool:
    """Say whether the model in a file has attention alone, by its tensors; errors as of `header`."""
    return not any(part in name for name in header(file)[1] for part in RECURRENT)


def licence(file: Path) -> str | None:
    """Return the licence that a file states, as the Hub calls it; errors as of `header`."""
    found = header(file)[0].get("general.license")
    return found if isinstance(found, str) else None


@contextmanager
def source(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the arguments by which `from_pretrained` reads a file, and nothing that lies beside it.

    `transformers` would take an adapter or a tokenizer from the folder of the file.
    """
    with (
        TemporaryDirectory() as empty,
        open(os.devnull, "w") as nowhere,  # noqa: PTH123
        # Its bar ignores what transformers is told about bars: a terminal alone shows them.
        redirect_stderr(sys.stderr if sys.stderr.isatty() else nowhere),
    ):
        yield {"pretrained_model_name_or_path": empty, "gguf_file": str(file.resolve())}


def _check_packages(file: Path) -> None:
    try:
        import gguf  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        raise ValueError(f"{str(file)!r} needs the package gguf: pip install 'lmsleep[hf,gguf]'") from None
