"""The model card (README.md) of an adapter, as the Hub wants it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmsleep.hf.card import LIMITS, USES, licence, linked, method, origin_of, settings
from lmsleep.sleep import SleepConfig


def adapter_card(
    config: Any,
    sleep: SleepConfig,
    rows: Mapping[str, str],
    *,
    license: str | None = None,
    base_model: str | None = None,
) -> str:
    """Return the text of the card.

    Args:
        config: that of the base model; `_name_or_path` is where it lies, whose card says the licence.
        sleep: how the model sleeps with the adapter.
        rows: what else the table says, such as the recipe and the data.
        license: of the adapter, as the Hub has it; default that of the base.
        base_model: name of the base on the Hub; default as its folder says.
    """
    from huggingface_hub import ModelCardData

    kind, (source, known, terms) = config.model_type, origin_of(config)
    base, terms = base_model or known, terms if license is None else {"license": license}
    data = ModelCardData(
        library_name="lmsleep",
        pipeline_tag="text-generation",
        base_model=base,
        base_model_relation="adapter" if base else None,
        tags=["lmsleep", "adapter", "sleep", "fast-weights", kind],
        **terms,
    )
    said = "".join(f"| {_cell(name)} | {_cell(value)} |\n" for name, value in rows.items())
    return f"""---
{data.to_yaml()}
---

# An adapter with which a `{kind}` sleeps

With it the model {method(sleep)}

| base model | {linked(base) if base else _cell(Path(source).name)} |
|---|---|
| licence | {licence(kind, terms)} |
{said}{settings(sleep)}

The weights here are what the model has beyond its base, without which, or on another one, they are refused.
`config.json` says which it is.

## Use

```python
import lmsleep

session = lmsleep.Session(*lmsleep.open("FOLDER"))  # this repository, downloaded
session.read("A text")
session.sleep()  # so that the last window, which is not full, leaves attention too
print(session.generate("..."))
```

or `lmsleep read FOLDER text.txt --memory text.mem --sleep-at-end` and
`lmsleep ask FOLDER --memory text.mem "..."`. If the base model lies elsewhere than `config.json` says, link
its folder (or file) as `FOLDER/base`.
`lmsleep.hf.load_adapter("FOLDER")` is the model of transformers.

## Limits

{LIMITS}
{USES}
"""


def _cell(text: str) -> str:
    """Write a text on one line of a table."""
    return " ".join(text.split()).replace("|", "\\|")
