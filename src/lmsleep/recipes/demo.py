"""`lmsleep demo`: the shipped models answer, then N = 1 and N = 4 are trained side by side and compared."""

import json
import secrets
import sys
import time
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from lmsleep import pretrained
from lmsleep.evaluation import Score, evaluate, wilson
from lmsleep.files import write_atomic
from lmsleep.opening import open_model
from lmsleep.recipes import figure
from lmsleep.recipes.catalogue import LIVE, RECIPES
from lmsleep.recipes.page import page, result_section, table
from lmsleep.recipes.results import Result
from lmsleep.recipes.run import train
from lmsleep.recipes.table import as_text
from lmsleep.session import Session
from lmsleep.tasks import stream
from lmsleep.training import RunFolder, TrainConfig

SHIPPED = ("depo-N1", "depo-N4")
GRAPHS = 512


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Show what longer sleep buys: two shipped models answer, then N = 1 and N = 4 are trained and compared.

    The two answer in seconds; the training takes about two minutes on two quiet cores. Stop it when you like: the
    same command goes on where it was.
    """

    out: Path = Path("runs/demo")
    """Folder for the runs, the tables, the pictures and the page."""
    full: bool = False
    """Train what the committed result was made of instead: N = 1, 2 and 4, at equal training tokens and at equal
    training compute, five seeds (an hour or two)."""
    seeds: tuple[int, ...] = ()
    """Seeds to train; default 0, with --full 0 1 2 3 4."""
    tasks: tuple[Literal["depo", "rule110"], ...] = ("depo",)
    """With --full: the pointer chase, Rule 110, or both."""
    workers: int | None = None
    """Runs at a time, one thread each; default one for each GPU, or without one for each core."""
    scale: float = 1.0
    """Shortens all runs alike, for a quick look at the mechanics (0.02: nothing is learned)."""
    json: bool = False
    """Print one JSON document instead of the tables."""


def run(options: DemoOptions) -> None:
    """Ask, train, report."""
    seeds = options.seeds or ((0, 1, 2, 3, 4) if options.full else (0,))
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must name each seed once, got {seeds}")
    if not 0 < options.scale <= 1:
        raise ValueError(f"scale must lie in (0, 1], got {options.scale}")
    if not options.full and options.tasks != ("depo",):
        raise ValueError(f"tasks={options.tasks}: only depo is trained without --full")
    say = sys.stderr.write if options.json else sys.stdout.write
    answers = Answers.drawn(secrets.randbelow(2**31))
    say(f"{answers.text()}\n")
    sys.stdout.flush()
    started = time.monotonic()
    trained = {}
    for name in options.tasks if options.full else ("live",):
        recipe = RECIPES[name] if options.full else LIVE
        cells = [cell.with_train(lambda t: _shortened(t, options.scale)) for cell in recipe.cells("demo")]
        if name == "live":
            say(f"Now the same from random weights, for {cells[0].config.train.steps:,} steps with N = 1 and "
                f"{cells[1].config.train.steps:,} with N = 4, side by side:\n")  # fmt: skip
            sys.stdout.flush()
        trained[name] = train(recipe, cells, seeds, options.workers, options.out)
    sections = ["<h2>The shipped models</h2>", f"<p>{ABOUT}</p>", table(answers.lines())]
    for name, result in trained.items():
        say(f"\n{result.recipe.title}\n{result.recipe.caution}\n\n{as_text(result.lines())}\n")
        sections.append(_section(result, options.out / name, "this run"))
    for name in ("depo", "rule110"):
        sections.append(_section(committed(name), options.out / f"committed-{name}", "the committed result"))
    write_atomic(options.out / "demo.html", page(sections).encode())
    say(_next_steps(options.out, time.monotonic() - started))
    if options.json:
        rows = {name: result.rows for name, result in trained.items()}
        sys.stdout.write(json.dumps({"shipped": answers.to_dict(), "trained": rows}) + "\n")


def _shortened(options: TrainConfig, scale: float) -> TrainConfig:
    return replace(options, steps=max(2, round(scale * options.steps)))


def _section(result: Result, folder: Path, whose: str) -> str:
    result.save(folder)
    figure.save(result, folder / "figure.png")
    return result_section(result, folder / "figure.png", whose)


def committed(name: str) -> Result:
    """The result of five seeds that the documentation quotes; it is shipped with the package."""
    return Result.load(RECIPES[name], Path(str(files("lmsleep.recipes"))) / "committed" / name)


ABOUT = (
    f"{SHIPPED[0]} was trained with one pass a sleep and {SHIPPED[1]} with four: the same model, for the same "
    "training compute. Each reads a hidden cycle of 8 nodes as 8 shuffled edges, sleeps as it was trained to, and "
    "forgets the text; then it is asked where a node leads after k hops."
)


@dataclass(frozen=True)
class Answers:
    """What the shipped models answer about graphs drawn just now, none of which training ever drew.

    Attributes:
        seed: of the draw.
        graph: one of them, as it is read.
        asked: questions about it, the right answer, and that of each model.
        scores: over `GRAPHS` of them, by model.
    """

    seed: int
    graph: str
    asked: list[list[str]]
    scores: dict[str, Score]

    @classmethod
    def drawn(cls, seed: int) -> "Answers":
        """Draw graphs and ask."""
        task = RunFolder.open(pretrained.find(SHIPPED[0])).config().task
        context = task.batch(stream(seed, "test", 0), 1, "test").context
        assert context is not None
        graph = task.spell(context[0].tolist())
        words = graph.split()
        edges = dict(zip(words[::2], words[1::2], strict=True))
        asked, scores = list[list[str]](), dict[str, Score]()
        node = words[0]
        for k in range(1, 5):
            node = edges[node]
            asked.append([f"HOP_{k} {words[0]}", node])
        for name in SHIPPED:
            model, sleep, tokenizer = open_model(name, device="cpu")
            session = Session(model, sleep, tokenizer)
            session.read(graph)
            session.sleep()
            for line in asked:
                line.append(str(session.fork().generate(line[0], max_new_tokens=1)))
            scores[name] = evaluate(model, task, sleep, batches=GRAPHS // 64, seed=seed)
        return cls(seed, graph, asked, scores)

    def lines(self) -> list[list[str]]:
        """Accuracy by hops, with its 95 % interval."""
        lines = [["k", *self.scores]]
        for k in next(iter(self.scores.values())).per_difficulty:
            cells = []
            for score in self.scores.values():
                low, high = wilson(score.correct[k], score.total[k])
                cells.append(f"{score.per_difficulty[k]:.3f} [{low:.3f}, {high:.3f}]")
            lines.append([str(k), *cells])
        return lines

    def text(self) -> str:
        """All of it for a terminal."""
        one = as_text([["question", "right", *self.scores], *self.asked])
        return (
            f"{ABOUT}\n\nA cycle that neither was trained on (drawn with seed {self.seed}):\n{self.graph}\n\n{one}\n\n"
            f"Accuracy on {GRAPHS} such cycles, eight questions each [95 % interval of the answers], chance 0.143:\n\n"
            f"{as_text(self.lines())}\n"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready figures."""
        return {"seed": self.seed, **{name: score.to_dict() for name, score in self.scores.items()}}


def _next_steps(out: Path, seconds: float) -> str:
    return (
        f"\n{seconds / 60:.1f} minutes of training. Look at {out / 'demo.html'}, with the committed result of five "
        "seeds.\n"
        "Go on with:  source .venv/bin/activate    (where make made the environment)\n"
        "             lmsleep eval depo-N4 --passes 1 2 3 4 6\n"
        "             lmsleep inspect depo-N4 --html inspect.html\n"
        "             lmsleep train depo --passes 4 --nodes 12 --hops 6 --names 12 --window 12 --steps 4000\n"
    )
