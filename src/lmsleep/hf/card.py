"""The model card (README.md) of a model that sleeps, as the Hub wants it."""

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lmsleep import gguf_file
from lmsleep.files import write_atomic
from lmsleep.sleep import Compact, Consolidator, Hard, Passes, SleepConfig, Sliding
from lmsleep.version import __version__

NAME, MARK = "README.md", "<!-- written by lmsleep; remove this line to keep changes -->"
LIMITS = """\
- What was evicted is remembered only as far as fast weights hold it, and only as well as the model was
  trained to sleep; `lmsleep probe FOLDER --text FILE` measures it.
- Fast weights cannot be rolled back: no speculative decoding, no cropping of the cache."""
USES = """- Uses, data and biases are those of the model that it was made from, and of what it was trained on
  since."""
NON_COMMERCIAL: dict[str, Any] = {
    "license": "other",
    "license_name": "nvidia-non-commercial",
    "license_link": "https://github.com/NVlabs/Jet-Nemotron",
}
LICENSES: dict[str, dict[str, Any]] = {"jet_nemotron": NON_COMMERCIAL, "ouro": {"license": "apache-2.0"}}


def write_card(folder: Path, config: Any, sleep: SleepConfig | None = None) -> None:
    """Write README.md beside a saved model; one that somebody else wrote stays.

    Args:
        folder: of the saved model.
        config: that of the model; `_name_or_path` is where it came from, whose card says the licence.
        sleep: how it sleeps; None: it does not say.

    Raises:
        OSError: if the folder cannot be written.
    """
    file = folder / NAME
    if not file.exists() or MARK in file.read_text(errors="replace"):
        write_atomic(file, card(config, sleep).encode())


def card(config: Any, sleep: SleepConfig | None) -> str:
    """Return the text of the card."""
    from huggingface_hub import ModelCardData

    kind, (source, base, terms) = config.model_type, origin_of(config)
    inserted = getattr(config.get_text_config(), "memory_layers", None)
    of_sleep = ["sleep", "fast-weights"] if sleep or inserted else []
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base,
        tags=["lmsleep", *of_sleep, kind],
        **terms,
    )
    origin = linked(base) if base else Path(source).name or "unknown"
    made_from = f"| made from | {origin} |\n|---|---|\n| licence | {licence(kind, terms)} |"
    text = _awake(kind, inserted, made_from) if sleep is None else _asleep(kind, sleep, made_from)
    return f"""---
{data.to_yaml()}
---
{MARK}

{text}
{USES}
"""


def _awake(kind: str, inserted: Any, made_from: str) -> str:
    """Describe a model that was converted and does not say how it sleeps."""
    title, rows, limit = f"# A `{kind}`", made_from, ""
    if inserted:
        places = " ".join(map(str, inserted["after"]))
        title += " with memory layers"
        rows += f"\n| memory layers | {inserted['kind']}, after blocks {places} |"
        limit = "\n- Memory layers say nothing until they are trained: `lmsleep finetune FOLDER --task ...`."
    return f"""{title}

Weights of the model that it was made from, in the dtype that config.json names; written by lmsleep
{__version__}.

{rows}

## Use

```python
import lmsleep.hf

model = lmsleep.hf.load_pretrained("FOLDER")  # this repository, downloaded
```

## Limits

- Weights that were quantised are as coarse as they were.{limit}"""


def _asleep(kind: str, sleep: SleepConfig, made_from: str) -> str:
    """Describe a model that sleeps."""
    return f"""# A `{kind}` that sleeps

This model {method(sleep)}

{made_from}
{settings(sleep)}

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

{LIMITS}"""


def origin_of(config: Any) -> tuple[str, str | None, dict[str, Any]]:
    """Return where a model came from, its name on the Hub, and its licence, as far as its folder knows."""
    source = str(getattr(config, "_name_or_path", "") or "")
    known = _metadata(Path(source)) if source else {}
    terms = LICENSES.get(config.model_type) or {k: v for k, v in known.items() if k.startswith("license")}
    # A model that was fine-tuned twice still names the one on the Hub.
    return source, _hub_name(source) or known.get("base_model"), terms


def linked(base: str) -> str:
    """Write the name of a model on the Hub as a link."""
    return f"[{base}](https://huggingface.co/{base})"


def settings(sleep: SleepConfig) -> str:
    """Write how a model sleeps as rows of a table."""
    return "\n".join(f"| `{name}` | `{value!r}` |" for name, value in _changed(sleep).items())


def method(sleep: SleepConfig) -> str:
    """Say how a model sleeps, after "the model"."""
    by, L = sleep.consolidator, sleep.window
    window = "evicts nothing" if L is None else f"reads windows of {L} tokens"
    evicts = f"lets {type(sleep.eviction).__name__} choose what stays in its key-value cache"
    if isinstance(sleep.eviction, Hard) or L is None:
        evicts = "clears its key-value cache (hard eviction)"
    elif isinstance(sleep.eviction, Sliding):
        evicts = f"keeps keys and values of {L - 1} tokens (sliding eviction)"
    elif isinstance(sleep.eviction, Compact):
        evicts = "keeps few keys and values a head of all that was read (compaction)"
    return f"""{window}. When a window is full and the text goes on, {_consolidates(by)}
into the fast weights of its recurrent blocks, and {evicts}: the method of
["Do Language Models Need Sleep?"](https://arxiv.org/abs/2605.26099), implemented by lmsleep {__version__}."""


def _changed(sleep: SleepConfig) -> dict[str, Any]:
    """Return the options of a sleep that differ from the defaults."""
    said: dict[str, Any] = {"window": sleep.window}
    for name, choice, default in (
        ("consolidator", sleep.consolidator, Passes()),
        ("eviction", sleep.eviction, Hard()),
    ):
        if type(choice) is not type(default):
            said[name] = type(choice).__name__
        values = {f.name: (getattr(choice, f.name), f.default) for f in fields(choice)}
        said |= {name: value for name, (value, usual) in values.items() if value != usual}
    return said if sleep.sleep_on_loss else {**said, "sleep_on_loss": False}


def _consolidates(by: Consolidator) -> str:
    """Say what happens to a window, up to "into the fast weights"."""
    if not isinstance(by, Passes):
        return f"it lets {type(by).__name__} (N = {by.passes}) write it"
    if by.passes == by.wake_passes == 1:
        return "it has already written what it read"
    loop = "all blocks" if by.loop is None else "the middle half of its blocks"
    if isinstance(by.loop, tuple):
        loop = f"blocks {by.loop[0]} ... {by.loop[1] - 1}"
    return f"it makes {by.passes} pass(es) over it through {loop}, which write it"


def licence(kind: str, terms: Mapping[str, Any]) -> str:
    """Say the licence of a model of that type, as far as it is known."""
    name = terms.get("license_name") or terms.get("license") or "not stated by what it was made from"
    limit = (
        "; research and evaluation only, as for all that is derived from it" if kind == "jet_nemotron" else ""
    )
    return f"{name}{limit}"


def _metadata(folder: Path) -> dict[str, Any]:
    """Read what the card of the model that this one was made from says, or its GGUF file."""
    from huggingface_hub import ModelCard

    try:
        if gguf_file.is_gguf(folder):
            found = gguf_file.licence(folder)
            return {} if found is None else {"license": found}
        said: dict[str, Any] = vars(ModelCard((folder / NAME).read_text()).data)
    except (OSError, ValueError):
        return {}
    return said


def _hub_name(source: str) -> str | None:
    """Return the `owner/name` of a folder in the cache of the Hub."""
    found = re.search(r"models--([\w.-]+?)--([\w.-]+)", source)
    return f"{found[1]}/{found[2]}" if found else None
