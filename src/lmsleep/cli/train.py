"""`lmsleep train`: a model from random weights, on a task or on text."""

import sys
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any, Literal

from lmsleep.backbones import find_kind
from lmsleep.cli.options import (
    as_type,
    check_samples,
    chosen_sleep,
    given_options,
    listed,
    listed_tasks,
    model_field,
    parse,
    sleep_fields,
    task_field,
)
from lmsleep.cli.scores import bits_text, floor_text
from lmsleep.recipes.settings import PRESETS, preset
from lmsleep.tasks import Text, find_task
from lmsleep.training import (
    BASELINES,
    Interrupted,
    RunConfig,
    RunFolder,
    TrainConfig,
    Trainer,
    baseline,
)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where the run goes and what it starts from."""

    out: Path | None = None
    """Folder of the run, which must not exist; default runs/TASK-N<passes or baseline>-seed<seed>."""
    preset: str = "demo"
    """Named setting that provides all defaults shown here; demo (small, CPU) or paper."""
    backbone: str = "hybrid"
    """What is trained: hybrid, or FILE.py:CLASS, a backbone of your own, whose options stand in a group of
    their own; the defaults of a preset are tuned for the hybrid."""
    baseline: Literal[tuple(BASELINES)] | None = None  # type: ignore[valid-type]
    """Train a baseline of the run described by all other options instead; see lmsleep train --help."""


def train(argv: list[str]) -> None:
    """Run `lmsleep train TASK [OPTIONS]` or `lmsleep train --resume RUN`."""
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
    # The second of two stages: the first one exports the model that this one loads.
    if (before := folder.source()) is not None:
        try:
            (trainer or Trainer.take_up(before)).fit()
        except Interrupted as stop:
            # Named is the run that was asked for; resuming it takes the first stage up again.
            raise Interrupted(
                stop.signum, f"stopped; to go on: lmsleep train --resume {folder.path}"
            ) from None
        # It was that of the first stage, and that of the second could not be made without its export.
        trainer = None
    trainer = trainer or Trainer.take_up(folder)
    trainer.fit()
    # The report has what was spent beside the score.
    sys.stdout.write(_score_text(folder, trainer.config, folder.report() or {}))


TRAIN_HELP = f"""usage: lmsleep train TASK [OPTIONS]
       lmsleep train --resume RUN

Train a hybrid that reads in windows of L tokens and sleeps N passes at the end of each; or a backbone of your
own, --backbone FILE.py:CLASS (docs/carry-on.md).

{listed_tasks()}

Presets: {"; ".join(f"{task}: {', '.join(names)}" for task, names in PRESETS.items())}
All options, with their defaults: lmsleep train TASK --help

Baselines (--baseline NAME) of a run with N passes:
{listed({name: make.__doc__ for name, make in BASELINES.items()})}
"""


def _new_run(task: str, argv: list[str]) -> tuple[RunFolder, Trainer]:
    """Return the folder of a new run, and its trainer."""
    # Read before parsing: the preset has the defaults that --help shows.
    chosen = given_options(argv).get("preset", "demo")
    cls, sections = find_task(task), preset(task, chosen)
    kind = find_kind(given_options(argv).get("backbone", "hybrid"))
    if kind.name == "hf":
        raise ValueError("backbone='hf': models of transformers are trained by lmsleep finetune MODEL_DIR")
    Options = make_dataclass(
        "Options",
        [
            task_field(task, sections),
            model_field(kind, sections),
            *sleep_fields(sections["sleep"], argv),
            ("train", TrainConfig, sections["train"]),
            ("run", RunOptions, RunOptions(preset=chosen, backbone=kind.name)),
        ],
        frozen=True,
        kw_only=True,
    )
    options = parse(Options, argv, f"lmsleep train {task}", cls.__doc__)
    model = as_type(kind.options, options.model)
    config = RunConfig(task=options.task, model=model, sleep=chosen_sleep(options), train=options.train)
    name = f"N{config.sleep.passes}"
    if options.run.baseline is not None:
        # Of the run that all other options describe, hence after parsing.
        name, config = options.run.baseline, baseline(options.run.baseline, config)
    out = options.run.out or Path("runs") / f"{task.rpartition(':')[2]}-{name}-seed{config.train.seed}"
    check_samples(config)  # first, and the trainer too: what cannot begin leaves no folder
    trainer = Trainer(RunFolder(out), config)
    return RunFolder.create(out, config), trainer


def _score_text(folder: RunFolder, config: RunConfig, report: dict[str, Any]) -> str:
    """Say the score of a finished run, what it cost, and what to do next."""
    score, task = report["eval"], config.task
    if isinstance(task, Text) and not task.asks:
        figures = f"{bits_text(task, score['bits'])} held out"
    else:
        name = task.difficulty_name
        floors = report["floors"]
        figures = "  ".join(
            f"{name}={k}: {v:.3f}{floor_text(floors, f'{name}={k}')}"
            for k, v in score["per_difficulty"].items()
        )
    if folder.exported.exists():
        figures += f"\n{folder.exported} is the model, a Hugging Face folder"
    return (
        f"{figures}\n{report['tokens']} tokens, {report['flops']:.3g} FLOP, {report['seconds']:.0f} s\n"
        f"{folder.path} is complete; next: lmsleep eval {folder.path} --passes 1 2 4\n"
    )
