"""`lmsleep probe`: what sleep does to a model as it is."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from lmsleep.cli.methods import MethodOptions
from lmsleep.cli.options import parse
from lmsleep.evaluation.facts import CHOICES, DROPPED, KEPT, Reading, zero_shot
from lmsleep.opening import open_model
from lmsleep.ops.matching import Method
from lmsleep.plain import to_json
from lmsleep.progress import progress
from lmsleep.sleep import Compact, Passes
from lmsleep.text.files import read_text, to_tokens

WINDOW = 512  # where neither the command nor the model says one


@dataclass(frozen=True, kw_only=True)
class ProbeOptions(MethodOptions):
    """Let an untrained model sleep: does it still predict its text, and does it remember planted facts?

    Each piece of the text is read with every N, and to compare with nothing evicted and nothing remembered.
    """

    model: Positional[Path]
    """A Hugging Face folder or adapter, a GGUF file, a run or a saved model."""
    text: Path
    """Text file (UTF-8) to read pieces of."""
    passes: tuple[int, ...] = (1, 2, 4)
    """Each N to read with."""
    window: int | None = None
    """L: tokens of a window; default the model's, or 512."""
    windows: int = 3
    """Windows in a piece."""
    samples: int = 16
    """Pieces; four facts are planted in each."""
    eviction: str | None = "hard"
    """What stays in attention after a sleep: nothing of the window (hard), its last L - 1 tokens (sliding),
    few keys a head of all windows (compact,keys=64,method=attention), or what FILE.py:CLASS keeps."""
    loop: tuple[int, int] | Literal["middle"] | None = None
    """Blocks first ... last - 1 that the passes loop, or the middle half; default all."""
    compact: tuple[float, ...] = ()
    """Read with keys and values compacted too, so many times fewer than a whole piece has (2 4 10 50, say).
    Then the model may have attention alone."""
    method: tuple[Method, ...] = ("attention",)
    """Of --compact, which keys a head keeps: those with the most attention, biases and values fitted
    (attention), or as they are (attended); those of smallest norm (norm); any (random)."""
    tokenizer: str | None = None
    """Of a saved model: bytes, or the folder of a Hugging Face tokenizer; default its own, or bytes. A run
    has its own."""
    device: str = "auto"
    """auto (CUDA where present), cpu, cuda, ..."""
    seed: int = 0
    """Of the pieces and the facts."""
    trust: bool = False
    """Run the Python files that the run or model names, though you have trained no run with them."""
    json: bool = False
    """Print one JSON document instead of a table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.compact and self.method != ProbeOptions.method:
            raise ValueError(f"--method {' '.join(self.method)} goes with --compact: add --compact 2 4, say")


def probe(argv: list[str]) -> None:
    """Run `lmsleep probe MODEL --text FILE`."""
    options = parse(ProbeOptions, argv, "lmsleep probe")
    model, own, tokenizer = open_model(
        options.model,
        options.tokenizer,
        options.device,
        trust=options.trust,
        attention_alone=bool(options.compact) or options.leaves_some,
    )
    window = options.window or own.window or WINDOW
    length = options.windows * window
    compacted = _compacted(options, length)
    # Without fast weights passes write nothing: what they leave is what is left when memory is dropped.
    writes = any(model.initial_state(1).memory.writes)
    passes = options.passes if writes else () if compacted else (1,)
    tokens = to_tokens(read_text(options.text), tokenizer, options.text).tolist()
    everywhere: dict[str, Any] = {"loop": None} if isinstance(own.consolidator, Passes) else {}
    sleep = options.over(replace(own, window=window, **everywhere))
    # Two more ways of reading: nothing evicted, and nothing remembered.
    others = {
        f"N = {n}, {name}" if passes else name: replace(sleep.with_passes(n), eviction=eviction)
        for n in passes or (1,)
        for name, eviction in compacted.items()
    }
    ways = 2 + len(set(passes)) + len(others)
    with progress(total=ways * options.samples, desc="pieces", leave=False) as bar:

        def read(way: str) -> None:
            bar.set_postfix_str(way, refresh=False)
            bar.update(1)

        found = zero_shot(
            model,
            tokenizer,
            tokens,
            sleep,
            passes,
            others=others,
            samples=options.samples,
            windows=options.windows,
            seed=options.seed,
            progress=read,
        )
        said = f"reading {options.samples} pieces of {length:,} tokens of {options.text} in {ways} ways"
        bar.write(said, file=sys.stderr)
        readings = []
        for reading in found:
            readings.append(reading)
            if not options.json:
                # As soon as there is one, above the bar.
                lines = [_row(reading)] if len(readings) > 1 else [_head(reading), _row(reading)]
                bar.write("\n".join(lines), file=sys.stdout)
                sys.stdout.flush()
    if options.json:
        document = {"chance": 1 / CHOICES, "readings": [r.to_dict() for r in readings]}
        sys.stdout.write(to_json(document) + "\n")
    else:
        chance = f"{'chance':<22} {'':>11} {f'{1 / CHOICES:.3f}':>8}"
        sys.stdout.write(f"{chance}\n{_verdict(readings)}\n")


def _compacted(options: ProbeOptions, length: int) -> dict[str, Compact]:
    """Return the compactions of `length` tokens that are asked for, by name.

    Raises:
        ValueError: for one that would keep nothing, or all.
    """
    for times in options.compact:
        if not 1 < times <= length:
            raise ValueError(
                f"--compact {times:g} must be more than 1 (which keeps all) and at most {length:,}, the "
                "tokens of a piece (or no key is kept)"
            )
    return {
        f"{method} 1/{times:g}": Compact(keys=round(length / times), method=method)
        for method in options.method
        for times in options.compact
    }


def _head(reading: Reading) -> str:
    """Name the columns of the table."""
    return f"{'':<22} {'perplexity':>11} {f'facts recalled, of {reading.questions}':>28}"


def _row(reading: Reading) -> str:
    """Write the line of a way of reading."""
    share, low, high = reading.recall
    return f"{reading.way:<22} {reading.perplexity:>11.4g} {f'{share:.3f} [{low:.3f}, {high:.3f}]':>28}"


def _verdict(readings: list[Reading]) -> str:
    """Say which N predicts the text best, and which remember facts."""
    by: dict[str, Any] = {r.way: r for r in readings}
    dropped, kept = by.pop(DROPPED), by.pop(KEPT)
    best = min(by.values(), key=lambda r: r.nats)
    said = [f"Text: {best.way} predicts best of those that evict; {_share(best, dropped, kept)}"]
    # By the lower end of the interval: a share above chance may be luck.
    known = [r.way for r in by.values() if r.recall[1] > 1 / CHOICES]
    said.append(
        f"Facts: {'; '.join(known)}: more than chance."
        if known
        else "Facts: none remembers more than chance; fine-tune with sleep first (lmsleep finetune --help)."
    )
    return "\n".join(said)


def _share(best: Reading, dropped: Reading, kept: Reading) -> str:
    """Say how much of what forgetting costs the best N wins back."""
    # How far a sleep gets from forgetting everything to keeping everything, in nats.
    gap = dropped.nats - kept.nats
    # No share of such a gap would mean anything; it is that of a text whose past does not help.
    if gap <= 0:
        return "keeping all is no better than forgetting all."
    return (
        f"it closes {(dropped.nats - best.nats) / gap:.0%} of the gap between forgetting all and keeping all."
    )
