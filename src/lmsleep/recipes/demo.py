"""`lmsleep demo`: the shipped models answer, then N = 1 and N = 4 are trained side by side and compared."""

import secrets
import sys
import time
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Literal

import torch

from lmsleep.files import check_folder, write_atomic
from lmsleep.plain import to_json
from lmsleep.recipes import figure
from lmsleep.recipes.answers import ABOUT, Answers
from lmsleep.recipes.catalogue import LIVE, RECIPES
from lmsleep.recipes.grid import GridOptions
from lmsleep.recipes.page import page, result_section, table
from lmsleep.recipes.results import Result
from lmsleep.recipes.run import train
from lmsleep.recipes.table import as_text
from lmsleep.training import TrainConfig


@dataclass(frozen=True, kw_only=True)
class DemoOptions(GridOptions):
    """Show what longer sleep buys: two shipped models answer, then N = 1 and N = 4 are trained and compared.

    The two answer in seconds; the training takes three minutes on two quiet cores. Stop it when you like:
    the same command goes on where it was.
    """

    out: Path = Path("runs/demo")
    """Folder for the runs, the tables, the pictures and the page."""
    full: bool = False
    """Train what the committed result was made of instead: N = 1, 2 and 4, at equal training tokens and at
    equal training compute, five seeds (about an hour)."""
    seeds: tuple[int, ...] = ()
    """Seeds to train; default 0, with --full 0 1 2 3 4."""
    tasks: tuple[Literal["depo", "rule110"], ...] = ("depo",)
    """With --full: the pointer chase, Rule 110, or both."""
    scale: float = 1.0
    """Shortens all runs alike, for a quick look at the mechanics (0.02: nothing is learned)."""
    json: bool = False
    """Print one JSON document instead of the tables."""


def run(options: DemoOptions) -> None:
    """Let the shipped models answer, train, compare, and write it all down."""
    seeds = options.seeds or ((0, 1, 2, 3, 4) if options.full else (0,))
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be named each once, got {seeds}")
    if min(seeds) < 0:
        raise ValueError(f"seeds must not be negative, got {seeds}")
    launcher = options.found()
    check_folder(options.out, "out")
    if not 0 < options.scale <= 1:
        raise ValueError(f"scale must lie in (0, 1], got {options.scale}")
    if len(set(options.tasks)) != len(options.tasks):
        raise ValueError(f"tasks must be named each once, got {' '.join(options.tasks)}")
    if not options.full and options.tasks != ("depo",):
        raise ValueError(f"tasks={options.tasks}: only depo is trained without --full")
    # With --json standard output is the document alone.
    say = sys.stderr.write if options.json else sys.stdout.write
    torch.set_num_threads(1)  # products are small: more threads wait for each other
    # Another draw in every call: nothing is shown that was picked.
    answers = Answers.drawn(secrets.randbelow(2**31))
    say(f"{answers.text()}\n")
    sys.stdout.flush()
    # After the answers: the time that is reported is that of the training.
    started = time.monotonic()
    trained = {}
    for name in options.tasks if options.full else ("live",):
        recipe = RECIPES[name] if options.full else LIVE
        cells = [cell.with_train(lambda t: _shortened(t, options.scale)) for cell in recipe.cells("demo")]
        if name == "live":
            say(f"Now the same from random weights, for {cells[0].config.train.steps:,} steps with N = 1 and "
                f"{cells[1].config.train.steps:,} with N = 4, side by side:\n")  # fmt: skip
            sys.stdout.flush()
        trained[name] = train(recipe, cells, seeds, options.out, options.workers, launcher)
    sections = ["<h2>The shipped models</h2>", f"<p>{ABOUT}</p>", table(answers.lines())]
    for name, result in trained.items():
        say(f"\n{result.recipe.title}\n{result.recipe.caution}\n\n{as_text(result.lines())}\n")
        sections.append(_section(result, options.out / name, "this run"))
    for name in ("depo", "rule110"):
        # The committed result stands beside what one seed gave just now.
        sections.append(_section(committed(name), options.out / f"committed-{name}", "the committed result"))
    write_atomic(options.out / "demo.html", page(sections).encode())
    say(_next_steps(options.out, time.monotonic() - started))
    if options.json:
        rows = {name: result.rows for name, result in trained.items()}
        sys.stdout.write(to_json({"shipped": answers.to_dict(), "trained": rows}, indent=None) + "\n")


def _shortened(options: TrainConfig, scale: float) -> TrainConfig:
    """Return the training with a share of its steps."""
    # Two at least: with one, a shorter run would leave the longer one before its first step.
    return replace(options, steps=max(2, round(scale * options.steps)))


def _section(result: Result, folder: Path, whose: str) -> str:
    """Save a result with its figure, and return its part of the page."""
    result.save(folder)
    figure.save(result, folder / "figure.png")
    return result_section(result, folder / "figure.png", whose)


def committed(name: str) -> Result:
    """Return the result of five seeds that the documentation quotes and the package carries."""
    return Result.load(RECIPES[name], Path(str(files("lmsleep.recipes"))) / "committed" / name)


def _next_steps(out: Path, seconds: float) -> str:
    """Say how long it took, where to look, and how to go on."""
    return (
        f"\n{seconds / 60:.1f} minutes. Look at {out / 'demo.html'}, with the committed result beside it.\n"
        "Go on with:  source .venv/bin/activate    (where make made the environment)\n"
        "             lmsleep eval depo-N4 --passes 1 2 3 4 6\n"
        "             lmsleep inspect depo-N4 --html inspect.html\n"
        "             lmsleep train depo --passes 4 --nodes 12 --hops 6 --names 12 --window 12 --steps 4000\n"
    )
