"""`lmsleep eval`: a run or a model on held-out samples, at one or several numbers of passes."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from tyro.conf import Positional

from lmsleep.cli.methods import MethodOptions
from lmsleep.cli.options import parse, say_rows
from lmsleep.cli.scores import bits_text, floor_text, floors_text
from lmsleep.evaluation import Score, evaluate, wilson
from lmsleep.evaluation.around_sleep import MOMENTS, AroundSleep, Shifting, around_sleep
from lmsleep.opening import Place, find
from lmsleep.plain import to_json, to_plain
from lmsleep.progress import progress
from lmsleep.sleep import Backbone, SleepConfig
from lmsleep.tasks import Task, Text
from lmsleep.tasks.base import difficulty_text
from lmsleep.tasks.reading import check_known
from lmsleep.text import Split
from lmsleep.training import Processes, data
from lmsleep.training.sources import software


@dataclass(frozen=True, kw_only=True)
class EvalOptions(MethodOptions):
    """Evaluate the newest checkpoint of a run on held-out samples, at one or several numbers of passes.

    A saved model or a Hugging Face model is evaluated on --data.
    """

    run: Positional[Path]
    """A run, saved model or Hugging Face folder, a GGUF file, or a shipped run: depo-N1, depo-N4."""
    passes: tuple[int, ...] = ()
    """Numbers of passes to read with; default the run's own."""
    batches: int = 32
    """Test batches of the run's batch size (4 for a model that is no run)."""
    length: int | None = None
    """Tokens in a sequence of text; default the run's own, or four windows."""
    split: Split = "test"
    """test: held-out samples; train: such as training draws, to tell what was learned by heart."""
    after: int | None = None
    """Count as "after eviction" what is predicted from this position on; default: the window."""
    data: tuple[Path, ...] = ()
    """Files or sets to evaluate on instead of those of a text run (what is held out of them)."""
    device: str = "auto"
    """auto (CUDA where present), cpu, cuda, ..."""
    trust: bool = False
    """Run the Python files that the run or model names, though you have trained no run with them."""
    json: bool = False
    """Print one JSON document instead of a table."""


def evaluate_run(argv: list[str]) -> None:
    """Run `lmsleep eval RUN`."""
    options = parse(EvalOptions, argv, "lmsleep eval")
    processes = Processes.join(options.device)
    with processes.together():
        place = find(options.run, trust=options.trust, attention_alone=options.leaves_some)
        model, task, own, size, parts = _evaluated(place, options)
    if processes.joined:
        with processes.together():
            # Each has opened the newest checkpoint, and the run may be in training.
            newest = None if place.run is None else place.folder.latest().name
            facts = {**to_plain(options), **software(), "checkpoint": newest, "data": data.hashes(task)}
        processes.check_same(facts)
    if options.data:
        say_rows(task)
    result: dict[int, Score] = {}
    around: dict[int, AroundSleep] = {}
    # All of them, before the first is read with.
    sleeps = {n: own.with_passes(n) for n in options.passes or (own.passes,)}
    with progress(total=len(sleeps) * options.batches, desc="batches", leave=False) as bar:
        for n, sleep in sleeps.items():
            how: dict[str, Any] = {"batches": options.batches, "batch_size": size, "split": options.split}
            how["device"] = model.device
            counted: dict[str, Any] = {"after": options.after, "parts": parts, "progress": bar.update}
            share = (processes.rank, processes.size)
            score = evaluate(model, task, sleep, share=share, **counted, **how)
            result[n] = Score.joined(processes.gather(score))
            # Bits around a sleep need shifts that fall on window ends, or one window would hold two segments.
            if (
                isinstance(task, Shifting)
                and processes.main
                and sleep.window is not None
                and task.segment % sleep.window == 0
            ):
                around[n] = around_sleep(model, task, sleep, **how)
    if options.json:
        passes = {
            str(n): _eval_json(task, score, around.get(n), options.split) for n, score in result.items()
        }
        document = {"run": str(options.run), "split": options.split, "passes": passes}
        document["floors"] = task.floors()
        sys.stdout.write(to_json(document) + "\n")
    else:
        sys.stdout.write(_eval_text(task, result, around, options.split))


class _Evaluated(NamedTuple):
    model: Backbone
    task: Task
    sleep: SleepConfig
    batch_size: int
    parts: int


def _evaluated(place: Place, options: EvalOptions) -> _Evaluated:
    """Return what is evaluated, and on which task: the run's own, or --data."""
    if place.run is None and not options.data:
        raise ValueError(f"{options.run} was trained on no task of lmsleep: name files to read with --data")
    if place.run is not None and not isinstance(place.run.task, Text):
        for flag, given in (("--data", options.data), ("--length", options.length is not None)):
            if given:
                raise ValueError(
                    f"{flag} is for runs on text; {options.run} was trained on {place.run.task_name}"
                )
    model, sleep = place.backbone(options.device)
    sleep = options.over(sleep)
    if place.run is None:
        # Four windows, so that most of what is predicted comes after an eviction.
        length, name = 4 * (sleep.window or 512), place.tokenizer_name()
        length = length if options.length is None else options.length
        text = Text(data=options.data, tokenizer=name, length=length)
        check_known(text, f"--data in {name}", model.vocab_size)
        # Small batches: nothing is known of the size of the model, and logits of large vocabularies are wide.
        return _Evaluated(model, text, sleep, 4, 1)
    task, train = place.run.task, place.run.train
    if isinstance(task, Text):
        # The run's own tokenizer stays, for the model knows no other tokens.
        length = task.length if options.length is None else options.length
        task = replace(task, data=options.data or task.data, length=length)
    if isinstance(task, Text) and options.data:
        check_known(task, f"--data in {task.tokenizer}", model.vocab_size)
    else:
        place.folder.check_data("name what to evaluate on with --data")
    return _Evaluated(model, task, sleep, train.batch_size, train.accumulate)


def _eval_json(task: Task, score: Score, around: AroundSleep | None, split: Split) -> dict[str, Any]:
    """Return the figures of one number of passes in JSON-ready form."""
    document = score.to_dict()
    # Bytes per token are those of what is held out.
    if isinstance(task, Text) and not task.asks and (split == "test" or task.unit == "byte"):
        document["bits_per_byte"] = score.bits() / task.bytes_per_token
    if around is not None:
        document["around_sleep"] = around.to_list()
    return document


def _eval_text(task: Task, result: dict[int, Score], around: dict[int, AroundSleep], split: Split) -> str:
    """Write a line for each number of passes, then the floors, for a terminal."""
    lines, floors = ["samples as in training:"] if split == "train" else [], task.floors()
    for passes, score in result.items():
        line = f"N = {passes}:"
        if isinstance(task, Text) and not task.asks:
            line += f" {bits_text(task, score.bits(), split)}"
            if score.tokens["after_eviction"]:
                line += f", {score.bits('after_eviction'):.4f} after eviction"
                line += f" ({score.tokens['after_eviction']} {task.unit}s)"
        else:
            for key, accuracy in score.per_difficulty.items():
                low, high = wilson(score.correct[key], score.total[key])
                name = difficulty_text(task, key)
                line += f"  {name}: {accuracy:.3f} [{low:.3f}, {high:.3f}]{floor_text(floors, name)}"
        lines.append(line)
        if passes in around:
            lines += _around_lines(around[passes])
    return "\n".join([*lines, f"floors of accuracy: {floors_text(floors)}", ""])


def _around_lines(around: AroundSleep) -> list[str]:
    """Write bits around each sleep: a row for each sleep since the shift, a column for each moment."""
    head = f"  {'sleeps since the shift':<24}" + "".join(f"{moment:>8}" for moment in MOMENTS)
    rows = [f"  {s:<24}" + "".join(f"{bits:>8.3f}" for bits in row) for s, row in enumerate(around.bits)]
    return [f"{head}   (a window is read; bits per predicted token of the next)", *rows]
