"""`lmsleep train`: a model from random weights, on a task or on text."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional, Suppress

from lmsleep.backbones import find_kind
from lmsleep.cli.methods import BY, KEPT
from lmsleep.cli.options import (
    as_type,
    chosen_sleep,
    given_options,
    listed,
    listed_tasks,
    model_field,
    parse,
    say_rows,
    sleep_field,
    task_field,
)
from lmsleep.cli.scores import bits_text, floor_text
from lmsleep.cli.several import ProcessOptions
from lmsleep.recipes.settings import PRESETS, preset
from lmsleep.tasks import Text, find_task
from lmsleep.tasks.base import difficulty_text
from lmsleep.training import (
    BASELINES,
    Interrupted,
    Lost,
    Processes,
    RunConfig,
    RunFolder,
    TrainConfig,
    Trainer,
    baseline,
)

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TrainConfig):
    """Optimisation, evaluation and saving."""

    keep: Suppress[Path | None] = None  # for pretrained models


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
    trust: bool = False
    """Run the Python files that the run or model of --start names, though you never trained with them."""


def train(argv: list[str]) -> None:
    """Run `lmsleep train TASK [OPTIONS]` or `lmsleep train --resume RUN`."""
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(TRAIN_HELP)
        return
    if argv[0] == "--resume":
        resume(argv[1:])
    else:
        finish(*_new_run(argv[0], argv[1:]))


@dataclass(frozen=True, kw_only=True)
class ResumeOptions(ProcessOptions):
    """Go on with a run that was stopped, exactly where it was; all other options are its own.

    Under torchrun by as many processes as there are now.
    """

    run: Positional[Path]
    """Folder of the run."""
    trust: bool = False
    """Run the Python files that the run names, though you never trained with them."""


def resume(argv: list[str]) -> None:
    """Run `lmsleep train --resume RUN`, of whatever kind the run is."""
    options = parse(ResumeOptions, argv, "lmsleep train --resume")
    folder = RunFolder.open(options.run, trust=options.trust)
    device = folder.config().train.device
    finish(folder, Processes.join(device, shard=options.shard, patience=options.patience))


def finish(folder: RunFolder, processes: Processes, trainer: Trainer | None = None) -> None:
    """Train a run to its end, after the run whose model it goes on from, and say how it went."""
    # Locked before anything of the run is read: another process may be about to write it.
    with folder.locked_for(processes), _going_on(folder, processes):
        with processes.together():
            # The second of two stages: the first one exports the model that this one loads.
            before = folder.source()
        if before is not None:
            (trainer or Trainer.take_up(before, processes=processes)).fit()
            # It was that of the first stage, and that of the second could not be made without its export.
            trainer = None
        trainer = trainer or Trainer.take_up(folder, processes=processes)
        trainer.fit()
        # The report has what was spent beside the score; only who wrote it surely sees it by now.
        if processes.main:
            sys.stdout.write(_score_text(folder, trainer.config, folder.report() or {}))


@contextmanager
def _going_on(folder: RunFolder, processes: Processes) -> Iterator[None]:
    """Say how to go on where a run is stopped, another process was lost, or the disk is full."""
    resume = f"{'torchrun ... -m ' if processes.joined else ''}lmsleep train --resume {folder.path}"
    try:
        yield
    except Lost as lost:
        raise Lost(f"{lost}; to go on: {resume}") from lost
    except Interrupted as stop:
        # Named is the run that was asked for; resuming it takes the first of two stages up again.
        step = str(stop).partition(";")[0]
        raise Interrupted(stop.signum, f"{step}; to go on: {resume}") from None
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        said = f"{error.strerror}; make room, then {resume}"
        raise OSError(error.errno, said, error.filename) from None


TRAIN_HELP = f"""usage: lmsleep train TASK [OPTIONS]
       lmsleep train --resume RUN [--trust]
       torchrun --standalone --nproc-per-node=K -m lmsleep train ...

Train a hybrid that reads in windows of L tokens and sleeps N passes at the end of each; or a backbone of your
own, --backbone FILE.py:CLASS (docs/carry-on.md). Under torchrun K processes take the same steps together,
each on its own rows (docs/scale.md).

{listed_tasks()}

Presets: {"; ".join(f"{task}: {', '.join(names)}" for task, names in PRESETS.items())}
All options, with their defaults: lmsleep train TASK --help

Sleeps (--sleep NAME,OPTION=VALUE,...; FILE.py:CLASS), beside --passes N and --loop:
{BY.page()}

Evictions (--eviction NAME,OPTION=VALUE,...; FILE.py:CLASS):
{KEPT.page()}

Baselines (--baseline NAME) of a run with N passes:
{listed({name: make.__doc__ for name, make in BASELINES.items()})}
"""


def _new_run(task: str, argv: list[str]) -> tuple[RunFolder, Processes, Trainer]:
    """Return the folder of a new run, who trains it, and its trainer."""
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
            sleep_field(sections["sleep"], argv),
            ("train", TrainOptions, as_type(TrainOptions, sections["train"])),
            ("run", RunOptions, RunOptions(preset=chosen, backbone=kind.name)),
            ("processes", ProcessOptions, ProcessOptions()),
        ],
        frozen=True,
        kw_only=True,
    )
    options = parse(Options, argv, f"lmsleep train {task}", cls.__doc__)
    model = as_type(kind.options, options.model)
    sleep, train = chosen_sleep(options, sections["sleep"]), as_type(TrainConfig, options.train)
    config = RunConfig(task=options.task, model=model, sleep=sleep, train=train)
    name = f"N{config.sleep.passes}"
    if options.run.baseline is not None:
        # Of the run that all other options describe, hence after parsing.
        name, config = options.run.baseline, baseline(options.run.baseline, config)
    out = options.run.out or Path("runs") / f"{task.rpartition(':')[2]}-{name}-seed{config.train.seed}"
    say_rows(config.task)
    of = options.processes
    processes = Processes.join(config.train.device, shard=of.shard, patience=of.patience)
    trainer = Trainer.begin(out, config, trust=options.run.trust, processes=processes)
    return trainer.folder, processes, trainer


def _score_text(folder: RunFolder, config: RunConfig, report: dict[str, Any]) -> str:
    """Say the score of a finished run, what it cost, and what to do next."""
    score, task = report["eval"], config.task
    if isinstance(task, Text) and not task.asks:
        figures = f"{bits_text(task, score['bits'])} held out"
    else:
        floors = report["floors"]
        named = {difficulty_text(task, int(k)): v for k, v in score["per_difficulty"].items()}
        figures = "  ".join(f"{name}: {v:.3f}{floor_text(floors, name)}" for name, v in named.items())
    if folder.exported.exists():
        figures += f"\n{folder.exported} is the model, a folder for every command"
    return (
        f"{figures}\n{report['tokens']} tokens, {report['flops']:.3g} FLOP, {report['seconds']:.0f} s\n"
        f"{folder.path} is complete; next: lmsleep eval {folder.path} --passes 1 2 4\n"
    )
