"""What each command does; options are dataclasses, turned into flags by tyro."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from tyro.conf import Positional

from lmsleep import pretrained
from lmsleep.cli.options import (
    as_type,
    check_samples,
    chosen_sleep,
    given_options,
    listed,
    listed_tasks,
    parse,
    sleep_fields,
    task_field,
)
from lmsleep.evaluation import Score, evaluate, wilson
from lmsleep.evaluation.around_sleep import MOMENTS, Adaptation, Shifting, adaptation
from lmsleep.evaluation.cost import cost
from lmsleep.hf.loading import is_pretrained
from lmsleep.models import HybridConfig
from lmsleep.opening import open_backbone
from lmsleep.recipes import RECIPES
from lmsleep.recipes import demo as demo_command
from lmsleep.recipes import run as reproduce_command
from lmsleep.recipes.figure import plot_runs
from lmsleep.recipes.settings import PRESETS, preset
from lmsleep.sleep import Backbone, SleepConfig
from lmsleep.tasks import Task, Text, find_task
from lmsleep.training import (
    BASELINES,
    Interrupted,
    RunConfig,
    RunFolder,
    TrainConfig,
    Trainer,
    baseline,
    choose_device,
)
from lmsleep.training.models import Model, build


@dataclass(frozen=True, kw_only=True)
class ModelOptions(HybridConfig):
    """The hybrid decoder: attention and fast-weight blocks in any order."""

    vocab_size: tyro.conf.Suppress[int] = 256  # the task decides


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where the run goes and what it starts from."""

    out: Path | None = None
    """Folder of the run, which must not exist; default runs/TASK-N<passes or baseline>-seed<seed>."""
    preset: str = "demo"
    """Named setting that provides all defaults shown here; demo (small, CPU) or paper."""
    baseline: Literal[tuple(BASELINES)] | None = None  # type: ignore[valid-type]
    """Train a baseline of the run described by all other options instead; see lmsleep train --help."""


def train(argv: list[str]) -> None:
    """`lmsleep train TASK [OPTIONS]` or `lmsleep train --resume RUN`."""
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(TRAIN_HELP)
        return
    if argv[0] == "--resume":
        if len(argv) != 2:
            raise ValueError("--resume takes the folder of a run and nothing else: its own options hold")
        finish(RunFolder.open(argv[1]))
    else:
        finish(*_new_run(argv[0], argv[1:]))


def finish(folder: RunFolder, trainer: Trainer | None = None) -> None:
    """Train a run to its end, after the run whose model it goes on from, and say how it went."""
    if (before := folder.source()) is not None:
        try:
            (trainer or Trainer.take_up(before)).fit()
        except Interrupted as stop:
            raise Interrupted(
                stop.signum, f"stopped; to go on: lmsleep train --resume {folder.path}"
            ) from None
        trainer = None
    trainer = trainer or Trainer.take_up(folder)
    trainer.fit()
    sys.stdout.write(_score_text(folder, trainer.config, folder.report() or {}))


TRAIN_HELP = f"""usage: lmsleep train TASK [OPTIONS]
       lmsleep train --resume RUN

Train a hybrid that reads in windows of L tokens and sleeps N passes at the end of each.

{listed_tasks()}

Presets: {"; ".join(f"{task}: {', '.join(names)}" for task, names in PRESETS.items())}
All options, with their defaults: lmsleep train TASK --help

Baselines (--baseline NAME) of a run with N passes:
{listed({name: make.__doc__ for name, make in BASELINES.items()})}
"""


def _new_run(task: str, argv: list[str]) -> tuple[RunFolder, Trainer]:
    chosen = given_options(argv).get("preset", "demo")
    cls, sections = find_task(task), preset(task, chosen)
    model = as_type(ModelOptions, sections["model"])
    Options = make_dataclass(
        "Options",
        [
            task_field(task, sections),
            ("model", ModelOptions, model),
            *sleep_fields(sections["sleep"], argv),
            ("train", TrainConfig, sections["train"]),
            ("run", RunOptions, RunOptions(preset=chosen)),
        ],
        frozen=True,
        kw_only=True,
    )
    options = parse(Options, argv, f"lmsleep train {task}", cls.__doc__)
    architecture = as_type(HybridConfig, options.model)
    config = RunConfig(
        task=options.task, model=architecture, sleep=chosen_sleep(options), train=options.train
    )
    name = f"N{config.sleep.passes}"
    if options.run.baseline is not None:
        name, config = options.run.baseline, baseline(options.run.baseline, config)
    out = options.run.out or Path("runs") / f"{task.rpartition(':')[2]}-{name}-seed{config.train.seed}"
    check_samples(config)  # first, and the trainer too: what cannot begin leaves no folder
    trainer = Trainer(RunFolder(out), config)
    return RunFolder.create(out, config), trainer


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Evaluate the newest checkpoint of a run on held-out samples, at one or several numbers of passes.

    A Hugging Face model is evaluated on --data.
    """

    run: Positional[Path]
    """Folder of a run or of a Hugging Face model, or a shipped run: depo-N1, depo-N4."""
    passes: tuple[int, ...] = ()
    """Numbers of passes to read with; default the run's own."""
    batches: int = 32
    """Test batches of the run's batch size (4 for a Hugging Face model)."""
    window: int | None = None
    """L to read with; default the run's own."""
    length: int | None = None
    """Tokens in a sequence of --data; default the run's own, or four windows."""
    after: int | None = None
    """Count as "after eviction" what is predicted from this position on; default: the window."""
    data: tuple[Path, ...] = ()
    """Files or sets to evaluate on instead of those of a text run (what is held out of them)."""
    device: str = "auto"
    """auto (CUDA where present), cpu, cuda, ..."""
    json: bool = False
    """Print one JSON document instead of a table."""


def evaluate_run(argv: list[str]) -> None:
    """`lmsleep eval RUN`."""
    options = parse(EvalOptions, argv, "lmsleep eval")
    device = choose_device(options.device)
    model, task, own, size, parts = _evaluated(options, device)
    result: dict[int, Score] = {}
    adapted: dict[int, Adaptation] = {}
    for n in options.passes or (own.passes,):
        sleep = own.with_passes(n)
        how: dict[str, Any] = {"batches": options.batches, "batch_size": size, "device": device}
        result[n] = evaluate(model, task, sleep, after=options.after, parts=parts, **how)
        if isinstance(task, Shifting) and sleep.window is not None and task.segment % sleep.window == 0:
            adapted[n] = adaptation(model, task, sleep, **how)
    if options.json:
        passes = {str(n): _eval_json(task, score, adapted.get(n)) for n, score in result.items()}
        document = {"run": str(options.run), "passes": passes, "floors": task.floors()}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        sys.stdout.write(_eval_text(task, result, adapted))


class _Evaluated(NamedTuple):
    model: Backbone
    task: Task
    sleep: SleepConfig
    batch_size: int
    parts: int


def _evaluated(options: EvalOptions, device: torch.device) -> _Evaluated:
    path = pretrained.find(options.run)
    if is_pretrained(path):
        if not options.data:
            raise ValueError(
                f"{options.run} was trained on no task of lmsleep: name files to read with --data"
            )
        model, sleep = open_backbone(path, options.device)
        sleep = replace(sleep, window=options.window or sleep.window)
        length = options.length or 4 * (sleep.window or 512)
        task = Text(data=options.data, tokenizer=str(path), length=length)
        return _Evaluated(model, task, sleep, 4, 1)
    folder = RunFolder.open(path)
    config = folder.config()
    task_of_run, sleep = config.task, replace(config.sleep, window=options.window or config.sleep.window)
    if options.data:
        if not isinstance(task_of_run, Text):
            raise ValueError(f"--data is for runs on text; {options.run} was trained on {config.task_name}")
        task_of_run = replace(task_of_run, data=options.data, length=options.length or task_of_run.length)
    size, parts = config.train.batch_size, config.train.accumulate
    return _Evaluated(folder.model(device), task_of_run, sleep, size, parts)


def _eval_json(task: Task, score: Score, adapted: Adaptation | None) -> dict[str, Any]:
    document = score.to_dict()
    if isinstance(task, Text) and not task.asks:
        document["bits_per_byte"] = score.bits() / task.bytes_per_token
    if adapted is not None:
        document["adaptation"] = adapted.to_list()
    return document


def _eval_text(task: Task, result: dict[int, Score], adapted: dict[int, Adaptation]) -> str:
    lines, floors = [], task.floors()
    for passes, score in result.items():
        line = f"N = {passes}:"
        if isinstance(task, Text) and not task.asks:
            line += f" {_bits(task, score.bits())}"
            if score.tokens["after_eviction"]:
                line += f", {score.bits('after_eviction'):.4f} after eviction"
                line += f" ({score.tokens['after_eviction']} {task.unit}s)"
        else:
            for key, accuracy in score.per_difficulty.items():
                low, high = wilson(score.correct[key], score.total[key])
                name = f"{task.difficulty_name}={key}"
                line += f"  {name}: {accuracy:.3f} [{low:.3f}, {high:.3f}]{_floor(floors, name)}"
        lines.append(line)
        if passes in adapted:
            lines += _adaptation_lines(adapted[passes])
    return "\n".join([*lines, f"floors of accuracy: {_floors_text(floors)}", ""])


def _floor(floors: dict[str, float], key: str) -> str:
    """The floors of one difficulty, to stand beside its accuracy."""
    own = [
        f"{name.removesuffix(key)}{floor:.3f}" for name, floor in floors.items() if name.endswith(f" {key}")
    ]
    return f" ({', '.join(own)})" if own else ""


def _floors_text(floors: dict[str, float]) -> str:
    """The floors over all difficulties."""
    return ", ".join(f"{name} {value:.3f}" for name, value in floors.items() if "=" not in name)


def _adaptation_lines(adapted: Adaptation) -> list[str]:
    head = f"  {'sleeps since the shift':<24}" + "".join(f"{moment:>8}" for moment in MOMENTS)
    rows = [f"  {s:<24}" + "".join(f"{bits:>8.3f}" for bits in row) for s, row in enumerate(adapted.bits)]
    return [f"{head}   (a window is read; bits per predicted token of the next)", *rows]


def _bits(task: Text, bits: float) -> str:
    if task.unit == "byte":
        return f"{bits:.4f} bits per byte"
    return f"{bits:.4f} bits per token (about {bits / task.bytes_per_token:.4f} per byte)"


def _score_text(folder: RunFolder, config: RunConfig, report: dict[str, Any]) -> str:
    score, task = report["eval"], config.task
    if isinstance(task, Text) and not task.asks:
        figures = f"{_bits(task, score['bits'])} held out"
    else:
        name = task.difficulty_name
        floors = report["floors"]
        figures = "  ".join(
            f"{name}={k}: {v:.3f}{_floor(floors, f'{name}={k}')}" for k, v in score["per_difficulty"].items()
        )
    if folder.exported.exists():
        figures += f"\n{folder.exported} is the model, a Hugging Face folder"
    return (
        f"{figures}\n{report['tokens']} tokens, {report['flops']:.3g} FLOP, {report['seconds']:.0f} s\n"
        f"{folder.path} is complete; next: lmsleep eval {folder.path} --passes 1 2 4\n"
    )


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """Draw loss and accuracy of runs into one picture."""

    runs: Positional[tuple[Path, ...]]
    """Folders of the runs."""
    out: Path = Path("curves.png")
    """Picture to write: .png, .svg or .pdf."""
    x: Literal["tokens", "flops", "seconds", "step"] = "tokens"
    """Quantity of the horizontal axis."""


def plot(argv: list[str]) -> None:
    """`lmsleep plot RUN...`."""
    options = parse(PlotOptions, argv, "lmsleep plot")
    if options.out.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"out={options.out} must end in .png, .svg or .pdf")
    plot_runs([RunFolder.open(path) for path in options.runs], options.out, options.x)
    sys.stdout.write(f"{options.out}\n")


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """Cost of a run's or model's architecture, before anyone pays it."""

    path: Positional[Path]
    """Folder of a run or of a saved model, or a shipped one: depo-N1, depo-N4."""
    window: int | None = None
    """L; default the run's, or 64."""
    passes: int | None = None
    """N; default the run's, or 4."""
    json: bool = False
    """Print one JSON document instead of text."""


def info(argv: list[str]) -> None:
    """`lmsleep info RUN|MODEL`."""
    options = parse(InfoOptions, argv, "lmsleep info")
    folder = RunFolder(pretrained.find(options.path))
    model: Model
    if folder.is_run():
        config = folder.config()
        model, sleep = build(config.model), config.sleep
    else:
        model, sleep = open_backbone(folder.path, "cpu")
    sleep = replace(
        sleep,
        window=sleep.window if options.window is None else options.window,
        consolidator=sleep.with_passes(
            sleep.passes if options.passes is None else options.passes
        ).consolidator,
    )
    figures = cost(model.to("meta"), sleep)
    if options.json:
        sys.stdout.write(json.dumps(figures, indent=2) + "\n")
        return
    sys.stdout.write(
        INFO.format_map({**figures, "blocks": " ".join(figures["blocks"]), "break_even": _even(figures)})
    )


INFO = """parameters               {parameters:,}
blocks                   {blocks}
fast weights             {fast_weight_bytes:,} bytes a sequence (float32), whatever its length
keys and values          {kv_bytes_per_token:,} bytes a token (float32)
{break_even}
a wake token             {flops_wake_token:,} FLOP (the last of a window of {window})
a sleep, N = {passes}           {flops_sleep:,} FLOP, {flops_sleep_per_token:,.0f} a token of the window
"""


def _even(figures: dict[str, Any]) -> str:
    tokens = figures["break_even_tokens"]
    if tokens is None:
        return "break-even               none: no block has a cache that grows"
    return f"break-even               the fast weights are the smaller of the two from {tokens:,} tokens on"


def demo(argv: Sequence[str]) -> None:
    """`lmsleep demo`."""
    options = parse(demo_command.DemoOptions, argv, "lmsleep demo")
    demo_command.run(options)


def reproduce(argv: Sequence[str]) -> None:
    """`lmsleep reproduce FIGURE`."""
    cls = reproduce_command.ReproduceOptions
    options = parse(cls, argv, "lmsleep reproduce", f"{cls.__doc__}\n\nFigures:\n{_figures()}")
    reproduce_command.run(options)


def _figures() -> str:
    return "\n".join(f"  {name:<10} {recipe.title}" for name, recipe in RECIPES.items())
