"""The model card (README.md) of a model that sleeps, as the Hub wants it."""

import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lmsleep.files import write_atomic
from lmsleep.sleep import SleepConfig
from lmsleep.version import __version__

NAME, MARK = "README.md", "<!-- written by lmsleep; remove this line to keep changes -->"
NON_COMMERCIAL: dict[str, Any] = {
    "license": "other",
    "license_name": "nvidia-non-commercial",
    "license_link": "https://github.com/NVlabs/Jet-Nemotron",
}
LICENSES: dict[str, dict[str, Any]] = {"jet_nemotron": NON_COMMERCIAL, "ouro": {"license": "apache-2.0"}}


def write_card(folder: Path, config: Any, sleep: SleepConfig) -> None:
    """Write README.md beside a saved model; one that somebody else wrote stays.

    Args:
        folder: of the saved model.
        config: that of the model; `_name_or_path` is where it came from, whose card says the licence.
        sleep: how it sleeps.

    Raises:
        OSError: if the folder cannot be written.
    """
    file = folder / NAME
    if not file.exists() or MARK in file.read_text(errors="replace"):
        write_atomic(file, card(config, sleep).encode())


def card(config: Any, sleep: SleepConfig) -> str:
    """The text of the card."""
    from huggingface_hub import ModelCardData

    source, kind = str(getattr(config, "_name_or_path", "") or ""), config.model_type
    known = _metadata(Path(source)) if source else {}
    base = _hub_name(source) or known.get("base_model")
    terms: dict[str, Any] = LICENSES.get(kind) or {k: v for k, v in known.items() if k.startswith("license")}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base,
        tags=["lmsleep", "sleep", "fast-weights", kind],
        **terms,
    )
    default = SleepConfig()
    changed = [f.name for f in fields(sleep) if getattr(sleep, f.name) != getattr(default, f.name)]
    settings = "\n".join(f"| `{name}` | `{asdict(sleep)[name]!r}` |" for name in changed)
    window = "evicts nothing" if sleep.window is None else f"reads windows of {sleep.window} tokens"
    loop = "all blocks" if sleep.loop is None else "the middle half of its blocks"
    if isinstance(sleep.loop, tuple):
        loop = f"blocks {sleep.loop[0]} ... {sleep.loop[1] - 1}"
    evicts = (
        "clears its key-value cache" if sleep.kept == 0 else f"keeps keys and values of {sleep.kept} tokens"
    )
    return f"""---
{data.to_yaml()}
---
{MARK}

# A `{kind}` that sleeps

This model {window}. When a window is full and the text goes on, it makes {sleep.passes} pass(es)
over it through {loop}, which write it into the fast weights of its recurrent blocks, and {evicts}
({sleep.eviction} eviction): the method of
["Do Language Models Need Sleep?"](https://arxiv.org/abs/2605.26099), implemented by lmsleep {__version__}.

| made from | {f"[{base}](https://huggingface.co/{base})" if base else Path(source).name or "unknown"} |
|---|---|
| licence | {_licence(kind, terms)} |
{settings}

## Use

```python
from transformers import AutoTokenizer
import lmsleep.hf

model = lmsleep.hf.from_pretrained("FOLDER")  # this repository, downloaded
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
prompt = tokenizer("Text of any length", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))
```

or `lmsleep read FOLDER book.txt --memory book.mem` and `lmsleep ask FOLDER --memory book.mem "..."`.
Other tools find a `{kind}` that does not sleep.

## Limits

- What was evicted is remembered only as far as fast weights hold it, and only as well as the model was
  trained to sleep; `lmsleep probe FOLDER --text FILE` measures it.
- Fast weights cannot be rolled back: no speculative decoding, no cropping of the cache.
- Uses, data and biases are those of the model that it was made from, and of what it was trained on since.
"""


def _licence(kind: str, terms: Mapping[str, Any]) -> str:
    name = terms.get("license_name") or terms.get("license") or "not stated by what it was made from"
    limit = (
        "; research and evaluation only, as for all that is derived from it" if kind == "jet_nemotron" else ""
    )
    return f"{name}{limit}"


def _metadata(folder: Path) -> dict[str, Any]:
    """What the card of the model that this one was made from says."""
    from huggingface_hub import ModelCard

    try:
        found: dict[str, Any] = vars(ModelCard((folder / NAME).read_text()).data)
    except (OSError, ValueError):
        return {}
    return found


def _hub_name(source: str) -> str | None:
    """`owner/name` of a folder in the cache of the Hub."""
    found = re.search(r"models--([\w.-]+?)--([\w.-]+)", source)
    return f"{found[1]}/{found[2]}" if found else None
