"""From finished runs to rows: accuracy per reading and difficulty, learning curves, training speed."""

import csv
import io
import json
from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import Any

from lmsleep.evaluation import evaluate, mean_interval
from lmsleep.files import write_atomic
from lmsleep.reproduce.recipe import Cell, Recipe
from lmsleep.training import Job, RunConfig, RunFolder, Trainer, choose_device

Row = dict[str, Any]
FLOORS = ("chance", "constant")
TIMED_STEPS = 3  # after one to warm up


def collect(recipe: Recipe, jobs: Sequence[tuple[Cell, Job]]) -> tuple[list[Row], list[Row]]:
    """Results (one row a cell, seed, reading and difficulty) and learning curves of finished runs."""
    results, curves = [], []
    for cell, job in jobs:
        run, config = RunFolder.open(job.path), job.config
        report = run.report()
        assert report is not None, f"{job.path} is not finished"
        who = _who(cell, config)
        spent = {key: report[key] for key in ("step", "tokens", "flops", "seconds")}
        readings = {cell.at: config} if recipe.read is None else recipe.read(config)
        for at, reading in readings.items():
            score = report["eval"] if reading == config else _read(run, reading)
            where = {"at": at, "passes_read": reading.sleep.passes}
            floors, name = reading.task.floors(), reading.task.difficulty_name
            for key, accuracy in score["per_difficulty"].items():
                answers = score["answers"][key]
                found = {"difficulty": int(key), "accuracy": accuracy, "answers": answers}
                own = {floor: floors.get(f"{floor} {name}={key}", floors[floor]) for floor in FLOORS}
                results.append({**who, **where, **found, **own, **spent})
        for point in run.metrics():
            if "eval" in point:
                at_step = {key: point[key] for key in ("step", "tokens", "flops", "seconds")}
                curves.append({**who, **at_step, "per_difficulty": point["eval"]["per_difficulty"]})
    return results, curves


def _who(cell: Cell, config: RunConfig) -> Row:
    return {
        "cell": cell.label,
        "line": cell.line or cell.label,
        "seed": config.train.seed,
        "passes": config.sleep.passes,
    }


def _read(run: RunFolder, reading: RunConfig) -> Row:
    train, device = reading.train, choose_device(reading.train.device)
    how: dict[str, Any] = {"batches": 2 * train.eval_batches, "batch_size": train.batch_size}
    how |= {"parts": train.accumulate, "device": device}
    return evaluate(run.model(device), reading.task, reading.sleep, **how).to_dict()


def time_steps(cells: Sequence[Cell], repeats: int) -> list[Row]:
    """Tokens a second of training steps of each cell, a row a repeat; one after the other, nothing saved."""
    rows = []
    for repeat in range(repeats):
        for cell in cells:
            config = cell.with_seed(repeat)
            trainer = Trainer(RunFolder("unused"), config)
            trainer.train_step()
            tokens, seconds = trainer.tokens, trainer.seconds
            for _ in range(TIMED_STEPS):
                trainer.train_step()
            speed = (trainer.tokens - tokens) / (trainer.seconds - seconds)
            where = {"at": cell.at, "passes_read": config.sleep.passes}
            spent = {"step": trainer.step, "tokens": trainer.tokens, "flops": trainer.flops}
            rows.append({**_who(cell, config), **where, "tokens_per_second": speed, **spent})
    return rows


def write_data(folder: Path, results: Sequence[Row], curves: Sequence[Row]) -> None:
    """`results.jsonl`, `results.csv` and `curves.jsonl`."""
    for name, rows in (("results", results), ("curves", curves)):
        write_atomic(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    text = io.StringIO()
    writer = csv.DictWriter(text, list(results[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(results)
    write_atomic(folder / "results.csv", text.getvalue().encode())


def table(recipe: Recipe, results: Sequence[Row], name: str) -> str:
    """Markdown: mean over seeds with its 95 % interval, a line per cell and reading, then the floors.

    `name` is that of the difficulty key.
    """
    keys = sorted({row["difficulty"] for row in results if "difficulty" in row})
    columns = [f"{name} = {key}" for key in keys] or ["tokens a second"]
    axis = [] if recipe.axis is None else [recipe.axis]
    header = ["model", *axis, "steps", "TFLOP", *columns]
    lines = [header, ["---"] * len(header)]
    for cell, at in dict.fromkeys((row["cell"], row["at"]) for row in results):
        mine = [r for r in results if (r["cell"], r["at"]) == (cell, at)]
        values = [[r["accuracy"] for r in mine if r["difficulty"] == key] for key in keys]
        figures = [_mean(v) for v in values] or [_mean([r["tokens_per_second"] for r in mine], digits=0)]
        where = [str(at)] if axis else []
        lines.append([cell, *where, str(mine[0]["step"]), f"{mine[0]['flops'] / 1e12:.3g}", *figures])
    for label, floors in _floors(results, keys):
        lines.append([label, *["" for _ in axis], "", "", *("" if isnan(f) else f"{f:.3f}" for f in floors)])
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    seeds = len({row["seed"] for row in results})
    said = "\n\n".join(text for text in (recipe.expects, recipe.caution) if text)
    mean = f"Mean over {seeds} seeds [95 % interval]." if seeds > 1 else "One seed, hence no interval."
    return f"# {recipe.title}\n\n{said}\n\n{mean}\n\n{body}\n"


def _floors(results: Sequence[Row], keys: Sequence[int]) -> list[tuple[str, list[float]]]:
    """Chance and best constant answer for each difficulty; for each cell where they differ between cells."""
    lines = []
    for name in FLOORS:
        per_cell: dict[str, dict[int, float]] = {}
        for row in results:
            if name in row:
                per_cell.setdefault(row["cell"], {})[row["difficulty"]] = row[name]
        found = [(cell, [own.get(key, float("nan")) for key in keys]) for cell, own in per_cell.items()]
        if len({tuple(values) for _, values in found}) == 1:
            lines.append((name, found[0][1]))
        else:
            lines += [(f"{name}, {cell}", values) for cell, values in found]
    return lines


def _mean(values: Sequence[float], digits: int = 3) -> str:
    if not values:
        return ""
    mean, low, high = mean_interval(values)
    if low != low:  # nan: one seed has no interval
        return f"{mean:.{digits}f}"
    top = 1.0 if digits else float("inf")  # of an accuracy
    return f"{mean:.{digits}f} [{max(low, 0):.{digits}f}, {min(high, top):.{digits}f}]"
