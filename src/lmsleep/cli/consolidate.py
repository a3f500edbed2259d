"""`lmsleep memory consolidate`: what a memory holds, and a text, as slow weights."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tyro.conf import Positional

from lmsleep.cli.opening import SleepOptions, open_session
from lmsleep.cli.options import as_type
from lmsleep.evaluation.slow_weights import nats
from lmsleep.files import check_place, locked
from lmsleep.plain import to_json
from lmsleep.session import Distillation, Session
from lmsleep.sleep import Backbone
from lmsleep.state import State
from lmsleep.text.files import read_text, to_tokens


@dataclass(frozen=True, kw_only=True)
class ConsolidateOptions(Distillation, SleepOptions):
    """Distil what a memory holds, and a text, into a LoRA adapter of the model: slow weights.

    The teacher is the model with the memory, and with a window of the text in view; the student is the model
    with the adapter and nothing else. It learns to predict what the teacher predicts, on the text and on what
    the teacher writes after it. A memory file keeps no text: give it again (--text), or the adapter learns
    from what the teacher writes alone; then take many --samples. For models of transformers; neither memory
    nor model is changed. Printed is what the adapter knows, and with --plain what else it changes.

    Use it: lmsleep convert MODEL OUT --adapter ADAPTER, or PeftModel.from_pretrained of peft.
    """

    model: Positional[Path]
    """A Hugging Face folder, adapter or GGUF file. One with attention alone gets memory layers first (lmsleep
    convert MODEL OUT --insert 6); the adapter fits it without them too."""
    memory: Path | None = None
    """Memory file whose S and open window the teacher has; default an empty memory."""
    text: Path | None = None
    """Text file (UTF-8) that the teacher has in view, window by window."""
    out: Path
    """Folder to write, which must not exist: adapter_config.json and safetensors of peft."""
    prompt: str = ""
    """What each text that the teacher writes begins with; default nothing where something is in view, and
    else what the tokenizer puts before a text, or a line end."""
    plain: Path | None = None
    """Text file that has nothing to do with it: is it predicted as before?"""
    json: bool = False
    """Print one JSON document instead of text."""


def consolidate(options: ConsolidateOptions) -> None:
    """Distil, write the adapter, and print what it knows."""
    if options.memory is None and options.text is None:
        raise ValueError(
            "there is nothing to distil: name a memory file by --memory, a text by --text, or both"
        )
    if options.out.exists():
        raise FileExistsError(f"--out {options.out} exists; name a folder that does not")
    check_place(options.out)
    # Slow weights need no fast ones.
    session = open_session(options.model, options, options.memory, attention_alone=True)
    text, plain = (_windows(path, session) for path in (options.text, options.plain))
    with locked(options.out):
        made = session.consolidate(
            torch.cat([*text]) if text else None,
            as_type(Distillation, options),
            prompt=options.prompt,
            progress=True,
        )
        made.save(options.out)
    begun = None if options.memory is None else session.stream.state
    bits = _known(session.model, made.model, begun, {"text": text, "plain": plain})
    document = {
        "adapter": str(options.out),
        "rank": options.rank,
        "bytes": made.nbytes,
        "seconds": made.seconds,
        "text_tokens": made.text_tokens,
        "sampled_tokens": made.sampled_tokens,
        "divergence": [x / math.log(2) for x in made.divergence],
        "bits": bits,
    }
    sys.stdout.write(to_json(document) + "\n" if options.json else _page(document))


def _windows(path: Path | None, session: Session) -> Sequence[Tensor]:
    """Return the tokens of a text file, in windows of the session."""
    if path is None:
        return ()
    assert session.tokenizer is not None
    tokens = to_tokens(read_text(path), session.tokenizer, path, first=True)
    if len(tokens) < 2:
        raise ValueError(f"{path} has no text of at least two tokens, of which one predicts the other")
    return session.tokens(torch.from_numpy(tokens.copy())).split(session.sleep_config.window or len(tokens))


def _known(
    model: Backbone, adapted: Backbone, begun: State | None, texts: Mapping[str, Sequence[Tensor]]
) -> dict[str, dict[str, float]]:
    """Return bits a token, by what is known and by the text; `begun` is what a memory holds."""
    readings: dict[str, Callable[[Sequence[Tensor]], float]] = {"nothing": lambda text: nats(model, text)}
    if begun is not None:
        readings["memory"] = lambda text: nats(model, text, begun)
    readings["text in view"] = lambda text: nats(model, text, begun, in_view=True)
    readings["adapter"] = lambda text: nats(adapted, text)
    return {
        known: {
            name: reading(text) / math.log(2)
            for name, text in texts.items()
            if text and (known, name) != ("text in view", "plain")
        }
        for known, reading in readings.items()
    }


def _page(said: Mapping[str, Any]) -> str:
    """Write what was made, and a table of what is known by it."""
    first, last = said["divergence"][0], said["divergence"][-1]
    read = f"{said['text_tokens']:,} tokens of text and {said['sampled_tokens']:,} that were sampled"
    lines = [
        f"{said['adapter']}: rank {said['rank']}, {said['bytes']:,} bytes, {said['seconds']:.0f} s on {read}",
        f"divergence from the teacher, bits a token: {first:.3f} at first, {last:.3f} at last",
    ]
    names = [*said["bits"]["nothing"]]
    if names:
        lines.append(f"{'bits a token, known by':<24}" + "".join(f"{name:>10}" for name in names))
    for known, row in said["bits"].items():
        if row:
            cells = (f"{row[name]:.3f}" if name in row else "" for name in names)
            lines.append(f"{known:<24}" + "".join(f"{cell:>10}" for cell in cells))
    return "".join(f"{line.rstrip()}\n" for line in lines)
