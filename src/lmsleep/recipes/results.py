"""From finished runs to rows, and from rows to the table: the result of a recipe is a folder of its own."""

import csv
import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import inf, isnan, log, nan
from pathlib import Path
from statistics import fmean
from typing import Any

from lmsleep.evaluation import evaluate, mean_interval, wilson
from lmsleep.files import write_atomic
from lmsleep.recipes.costs import COLUMNS, costs
from lmsleep.recipes.recipe import Cell, Recipe
from lmsleep.recipes.table import as_markdown, source
from lmsleep.tasks.base import difficulty_text
from lmsleep.training import Job, RunConfig, RunFolder, Trainer, choose_device, provenance

Row = dict[str, Any]
FLOORS = ("chance", "constant", "one hop", "no chain")  # those of a task have a line each
CURVES = ("per_difficulty", "loss_per_difficulty")
SPENT = ("step", "tokens", "flops", "seconds")
TIMED_STEPS = 3  # after one to warm up


@dataclass(frozen=True)
class Result:
    """What came of a recipe.

    Attributes:
        recipe: what was trained.
        key: the name of the difficulty.
        rows: one for each cell, seed, reading and difficulty.
        curves: one for each evaluation on the way.
        made_by: the command and where it ran, as Markdown.
    """

    recipe: Recipe
    key: str
    rows: list[Row]
    curves: list[Row]
    made_by: str

    @property
    def seeds(self) -> int:
        """Count the seeds that were trained."""
        return len({row["seed"] for row in self.rows})

    @property
    def named_seeds(self) -> str:
        """Name the seeds, and those of the cells that have others."""
        cells = dict.fromkeys(row["cell"] for row in self.rows)
        by_cell = {cell: {row["seed"] for row in self.rows if row["cell"] == cell} for cell in cells}
        most = max(by_cell.values(), key=len)
        others = "; ".join(f"{cell}: {_listed(own)}" for cell, own in by_cell.items() if own != most)
        return f"{_listed(most)} ({others})" if others else _listed(most)

    @property
    def difficulties(self) -> list[int]:
        """Return the difficulties that were asked for, rising; none where speed was measured."""
        return sorted({row["difficulty"] for row in self.rows if "difficulty" in row})

    @property
    def shown(self) -> list[int]:
        """Return the difficulties that its frontiers are drawn for."""
        known = self.difficulties
        return [*self.recipe.shown] or sorted({*known[:1], *known[-1:]})

    def named(self, difficulty: int) -> str:
        """Return what a difficulty is called in a table."""
        names = (row.get("named") for row in self.rows if row.get("difficulty") == difficulty)
        return next(names, None) or f"{self.key} = {difficulty}"

    def own(self, **where: Any) -> list[Row]:
        """Return the rows of runs that were read as they were trained, with these values."""
        return [
            r for r in self.rows
            if r["passes_read"] == r["passes"] and all(r[key] == value for key, value in where.items())
        ]  # fmt: skip

    def figure(self, rows: Sequence[Row]) -> str:
        """Write the mean of an accuracy as `interval`, in the table of this result."""
        return interval(rows, among=self.seeds)

    def lines(self) -> list[list[str]]:
        """Return the table: a line for each cell and reading with its means (`interval`), then the floors."""
        recipe, keys = self.recipe, self.difficulties
        # All rows of a result have a budget, or none has.
        budgets = ["tokens", "compute"] if "budget" in self.rows[0] else [None]
        before = ["at equal"] if budgets[0] else []
        axis = [] if recipe.axis is None else [recipe.axis]
        columns = [self.named(key) for key in keys] or ["tokens a second"]
        # Only where budgets are compared: elsewhere the difficulties are what the figure is about.
        whole = before and len(keys) > 1
        # Kinds of question have answers of different length, which bits of a token make comparable.
        bits = ["bits of an answer's token"] if recipe.together else []
        costly = [*COLUMNS] if recipe.costs else []
        lines = [
            [*before, "model", *axis, "steps", "TFLOP", *costly, *columns, *(["all"] if whole else []), *bits]
        ]
        rows = self.rows if axis else self.own()
        for budget in budgets:
            due = [r for r in rows if budget is None or r["budget"] in (budget, "both")]
            for cell, at in dict.fromkeys((r["cell"], r["at"]) for r in due):
                mine = [r for r in due if (r["cell"], r["at"]) == (cell, at)]
                figures = [self.figure([r for r in mine if r["difficulty"] == key]) for key in keys]
                figures = figures or [_mean([r["tokens_per_second"] for r in mine], digits=0, top=inf)]
                named = [*([budget] if budget else []), cell, *([str(at)] if axis else [])]
                spent = [str(mine[0]["step"]), f"{mine[0]['flops'] / 1e12:.3g}"]
                spent += [as_text(mine[0]) for as_text in COLUMNS.values()] if costly else []
                figures += [self.figure(mine)] if whole else []
                figures += [_bits(mine)] if bits else []
                lines.append([*named, *spent, *figures])
        for label, known in floors(self.rows, keys):
            # A mean of floors would need the number of answers of each difficulty.
            over_all = known[0] if len({*known}) == 1 else nan
            figures = ["" if isnan(f) else f"{f:.3f}" for f in (*known, *([over_all] if whole else []))]
            blank = ["" for _ in [*axis, "steps", "TFLOP", *costly]]
            lines.append([*("" for _ in before), label, *blank, *figures, *("" for _ in bits)])
        return lines

    def page(self) -> str:
        """Return the result as Markdown: what was asked, the table, and what made it."""
        said = "\n\n".join(text for text in (self.recipe.expects, self.recipe.caution) if text)
        named = self.named_seeds
        mean = f"Mean over {named} [95 % interval over them]."
        if self.seeds < 3:
            mean = f"S{named[1:]}{' [95 % interval of its answers]' if self.seeds == 1 else ''}."
        if self.recipe.value != "accuracy":  # repeats of a measurement
            mean = f"Mean over {self.seeds} measurements [95 % interval over them]."
            mean = mean if self.seeds > 1 else "One measurement, hence no interval."
        return f"# {self.recipe.title}\n\n{said}\n\n{mean}\n\n{as_markdown(self.lines())}\n\n{self.made_by}\n"

    def save(self, folder: Path) -> None:
        """Write `README.md`, `results.jsonl`, `results.csv` and `curves.jsonl`."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in (("results", self.rows), ("curves", self.curves)):
            write_atomic(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        text = io.StringIO()
        # Cells of different tasks may have different floors.
        writer = csv.DictWriter(text, list(dict.fromkeys(chain(*self.rows))), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomic(folder / "results.csv", text.getvalue().encode())
        write_atomic(folder / "README.md", f"{self.page()}\n![figure](figure.png)\n".encode())

    @classmethod
    def load(cls, recipe: Recipe, folder: Path) -> "Result":
        """Read what `save` wrote."""
        rows, curves = (
            [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
            for name in ("results", "curves")
        )
        page = (folder / "README.md").read_text().splitlines()
        # The line that `page` ends with; no other begins with a command.
        made_by = next(line for line in page if line.startswith("`"))
        return cls(recipe, _key(page), rows, curves, made_by)


def _listed(seeds: Collection[int]) -> str:
    """Name seeds: "seed 0", "seeds 0, 1", "seeds 0 ... 4"."""
    found = sorted(seeds)
    if len(found) > 2 and found == [*range(found[0], found[-1] + 1)]:
        return f"seeds {found[0]} ... {found[-1]}"
    return f"seed{'s' if len(found) > 1 else ''} {', '.join(map(str, found))}"


def _key(page: Sequence[str]) -> str:
    """Return the name of the difficulty, out of the header of a table with columns "k = 1"."""
    header = next(line for line in page if line.startswith("| "))
    return next((cell.split(" = ")[0] for cell in header.split(" | ") if " = " in cell), "")


def collect(recipe: Recipe, jobs: Sequence[tuple[Cell, Job]]) -> Result:
    """Read the result off finished runs: reports, curves, and how they answer when read otherwise."""
    rows, curves = list[Row](), list[Row]()
    measured: dict[str, Row] = {}
    for cell, job in jobs:
        run, config = RunFolder.open(job.path), job.config
        report = run.report()
        assert report is not None, f"{job.path} is not finished"
        who = _who(cell, config)
        spent = {key: report[key] for key in SPENT}
        # By which `tools/age.py` tells whether today's code would give the same.
        first = next((m for m in run.metrics() if "loss" in m), None)
        spent |= {"first_loss": [first["step"], first["loss"]]} if first else {}
        as_read = config if cell.reading is None else replace(config, sleep=cell.reading)
        readings = {cell.at: as_read} if recipe.read is None else recipe.read(config)
        if recipe.costs and cell.label not in measured:  # seeds cost the same
            measured[cell.label] = costs(run.model(choose_device(config.train.device)), as_read)
        spent |= measured.get(cell.label, {})
        for at, reading in readings.items():
            # A contestant is read on as many batches as its rivals' reports, another reading on half of them.
            batches = (2 if cell.reading is None else 4) * config.train.eval_batches
            score = report["eval"] if reading == config else _read(run, reading, batches)
            where = {"at": at, "passes_read": reading.sleep.passes}
            reached, each = reading.task.floors(), list[Row]()
            for key, accuracy in score["per_difficulty"].items():
                answers = score["answers"][key]
                found = {"difficulty": int(key), "accuracy": accuracy, "answers": answers}
                # Runs that were trained before they were measured have none.
                if "loss_per_difficulty" in score:
                    found["loss"] = score["loss_per_difficulty"][key]
                if "answer_tokens" in score:
                    found["answer_tokens"] = score["answer_tokens"][key]
                # Floors of this difficulty where the task tells them, else those over all.
                name = difficulty_text(reading.task, int(key))
                named = {low: reached.get(f"{low} {name}", reached.get(low)) for low in FLOORS}
                each.append({**found, **{low: value for low, value in named.items() if value is not None}})
            rows += [{**who, **where, **found, **spent} for found in together(each, recipe.together)]
        if cell.budget == "tokens" or cell.reading is not None:
            continue  # its curve is that of another run, or none of the contestants'
        for point in run.metrics():
            if "eval" in point:
                at_step = {key: point[key] for key in SPENT}
                scores = {key: point["eval"][key] for key in CURVES if key in point["eval"]}
                curves.append({**who, **at_step, **scores})
    made = [RunFolder.open(job.path).made_by() for _, job in jobs]
    return Result(recipe, jobs[0][1].config.task.difficulty_name, rows, curves, made_by(made))


def together(rows: Sequence[Row], sets: Mapping[str, Collection[int]]) -> list[Row]:
    """Return a row for each set of difficulties, numbered and named; without sets, the rows.

    Accuracies and floors are those over all answers of a set, losses those over all their tokens.
    """
    if not sets:
        return [*rows]
    found = []
    for number, (called, keys) in enumerate(sets.items()):
        mine = [row for row in rows if row["difficulty"] in keys]
        if not mine:
            continue
        over = {"loss": "answer_tokens", **dict.fromkeys(("accuracy", *FLOORS), "answers")}
        mean = {
            name: fmean([row[name] for row in mine], [row[weight] for row in mine])
            for name, weight in over.items()
            if all(name in row for row in mine)
        }
        total = {name: sum(row[name] for row in mine) for name in ("answers", "answer_tokens")}
        found.append({"difficulty": number, "named": called, **mean, **total})
    return found


def made_by(made: Sequence[Mapping[str, Any]]) -> str:
    """Say this command, and where its runs were made (perhaps by several, if it was stopped)."""
    return f"`{provenance()['command']}`, {'; '.join(dict.fromkeys(map(source, made)))}"


def _who(cell: Cell, config: RunConfig) -> Row:
    """Return what a row says of its run: cell, line, seed, N, and budget where there is one."""
    return {
        "cell": cell.label,
        "line": cell.line or cell.label,
        "seed": config.train.seed,
        "passes": config.sleep.passes,
        **({"budget": cell.budget} if cell.budget else {}),
        **({"aside": True} if cell.aside else {}),
    }


def _read(run: RunFolder, reading: RunConfig, batches: int) -> Row:
    """Score a finished run in another way of reading."""
    train, device = reading.train, choose_device(reading.train.device)
    how: dict[str, Any] = {"batches": batches, "batch_size": train.batch_size}
    how |= {"parts": train.accumulate, "device": device}
    return evaluate(run.model(device), reading.task, reading.sleep, **how).to_dict()


def time_steps(recipe: Recipe, cells: Sequence[Cell], repeats: int) -> Result:
    """Time training steps of each cell in tokens a second, one after the other; a row is a repeat."""
    rows = []
    for repeat in range(repeats):
        for cell in cells:
            config = cell.with_seed(repeat)
            # Nothing is written before the first save, and no step is saved.
            trainer = Trainer(RunFolder("unused"), config)
            trainer.train_step()
            # Taken after the warm-up step, in which kernels are chosen and memory is claimed.
            tokens, seconds = trainer.tokens, trainer.seconds
            for _ in range(TIMED_STEPS):
                trainer.train_step()
            speed = (trainer.tokens - tokens) / (trainer.seconds - seconds)
            where = {"at": cell.at, "passes_read": config.sleep.passes}
            spent = {"step": trainer.step, "tokens": trainer.tokens, "flops": trainer.flops}
            rows.append({**_who(cell, config), **where, "tokens_per_second": speed, **spent})
    return Result(recipe, "", rows, [], made_by([provenance()]))


def interval(rows: Sequence[Row], *, among: int = 1) -> str:
    """Write the mean of an accuracy over seeds, with a 95 % interval that says what it can.

    Three seeds or more have an interval over seeds (Student's t); two are shown as they are, since an
    interval of two says nothing; one has that of its own answers (Wilson), but none in a table `among` more
    seeds, whose intervals are of another kind. Difficulties are taken together.
    """
    right: dict[int, float] = {}
    answers: dict[int, int] = {}
    for row in rows:
        seed, count = row["seed"], row["answers"]
        right[seed] = right.get(seed, 0) + row["accuracy"] * count
        answers[seed] = answers.get(seed, 0) + count
    # Weighted by answers: difficulties need not be asked equally often.
    values = [right[seed] / answers[seed] for seed in right]
    if len(values) == among == 1:
        (seed,) = right
        low, high = wilson(round(right[seed]), answers[seed])
        return f"{values[0]:.3f} [{low:.3f}, {high:.3f}]"
    return _mean(values)


def _bits(rows: Sequence[Row]) -> str:
    """Write the mean over seeds of the bits of a token of an answer, over all difficulties."""
    found = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        mine = [row for row in rows if row["seed"] == seed]
        nats = fmean([row["loss"] for row in mine], [row["answer_tokens"] for row in mine])
        found.append(nats / log(2))
    return _mean(found, top=inf)


def _mean(values: Sequence[float], digits: int = 3, top: float = 1.0) -> str:
    """Write the mean with its interval over seeds, or up to two values as they are."""
    if len(values) < 3:
        return " ".join(f"{value:.{digits}f}" for value in values)
    mean, low, high = mean_interval(values)
    return f"{mean:.{digits}f} [{max(low, 0):.{digits}f}, {min(high, top):.{digits}f}]"


def floor(rows: Sequence[Row]) -> float:
    """Return the highest accuracy that is had without what is asked for.

    One of 1 is left out: of one hop all is had by who knows one hop, and that is what is asked.
    """
    return max(row[name] for row in rows for name in FLOORS if row.get(name, 1) < 1)


def floors(rows: Sequence[Row], keys: Sequence[int]) -> Iterator[tuple[str, list[float]]]:
    """Yield the floors by difficulty; for each cell where cells differ in them."""
    for name in FLOORS:
        per_cell: dict[str, dict[int, float]] = {}
        for row in rows:
            if name in row:
                per_cell.setdefault(row["cell"], {})[row["difficulty"]] = row[name]
        found = [(cell, [own.get(key, nan) for key in keys]) for cell, own in per_cell.items()]
        # One line for all, where every cell has the same task.
        if len({tuple(values) for _, values in found}) == 1:
            yield name, found[0][1]
        else:
            yield from ((f"{name}, {cell}", values) for cell, values in found)
