"""`lmsleep inspect`: the microscope, on a run or on what a model reads."""

import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from lmsleep import shipped
from lmsleep.cli.opening import SleepOptions, open_session
from lmsleep.cli.options import parse
from lmsleep.microscope import Inspection, inspect, words
from lmsleep.plain import to_json
from lmsleep.text.files import read_text, to_tokens
from lmsleep.training import RunFolder

SAMPLES = 128  # of a run's task, unless told


@dataclass(frozen=True, kw_only=True)
class InspectOptions(SleepOptions):
    """What sleep writes into the fast weights, what can be read of it, and what depends on it.

    A run is looked at on held-out samples of its task; with --text or --file a run or a model is looked at
    while it reads that, after what a memory file holds.
    """

    model: Positional[Path]
    """A run, saved model, Hugging Face folder or adapter, a GGUF file, or a shipped model."""
    text: str | None = None
    """Text to read, or a task's own words (n3 n1 HOP_2)."""
    file: Path | None = None
    """File to read instead of --text."""
    memory: Path | None = None
    """Memory file to begin with; it is not changed."""
    samples: int | None = None
    """Samples of a run's task, without --text and --file; default 128."""
    html: Path | None = None
    """Write one self-contained page to this file, replacing an old one."""
    json: bool = False
    """Print all tables as one JSON document instead of sentences."""


def inspect_command(argv: list[str]) -> None:
    """Run `lmsleep inspect RUN|MODEL`."""
    options = parse(InspectOptions, argv, "lmsleep inspect")
    # Before the work of minutes, not after it.
    if options.html is not None and not options.html.parent.is_dir():
        raise FileNotFoundError(f"html={options.html}: there is no folder {options.html.parent}")
    seen = _look(options)
    if options.html is not None:
        seen.html(options.html)
    if options.json:
        sys.stdout.write(to_json(seen.to_dict()) + "\n")
        return
    for title, sentences in (
        ("Three layers of memory", words.layers(seen)),
        ("What does sleep change?", words.changes(seen)),
        ("Can one rely on it?", words.reliability(seen)),
        ("Not looked at", seen.notes),
    ):
        if sentences:
            sys.stdout.write(title + "\n" + "".join(f"  {sentence}\n" for sentence in sentences))
    sys.stdout.write("" if options.html is None else f"{options.html}\n")


def _look(options: InspectOptions) -> Inspection:
    """Inspect a run on its task, or a model on a text; raises ValueError for options that clash."""
    if options.text is None and options.file is None:
        if options.memory is not None:
            raise ValueError("--memory needs --text or --file: what the memory is asked for")
        for name in ("sleep", "eviction", "window", "passes", "loop", "tokenizer"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} is for --text or --file; a run has its own")
        if options.device not in ("auto", "cpu"):
            raise ValueError("--device is for --text or --file; a run is looked at on the CPU")
        samples = SAMPLES if options.samples is None else options.samples
        run = RunFolder.open(shipped.find(options.model), trust=options.trust)
        return inspect(run, samples=samples, progress=True)
    if options.samples is not None:
        raise ValueError("--samples is for a run, without --text and --file")
    if options.text is not None and options.file is not None:
        raise ValueError("--text and --file exclude each other")
    session = open_session(options.model, options, options.memory)
    if options.file is None:
        return inspect(session, options.text, progress=True)
    assert session.tokenizer is not None, "an opened model has one"
    tokens = to_tokens(read_text(options.file), session.tokenizer, options.file).tolist()
    return inspect(session, tokens, progress=True)
