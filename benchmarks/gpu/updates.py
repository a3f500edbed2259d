"""Figure 2a at the paper's size, run by run: accuracy on Rule 110 with one pass, as the updates grow."""

from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.gpu.part import Try
from benchmarks.table import Cell as Entry
from benchmarks.table import Table
from lmsleep.evaluation import wilson
from lmsleep.recipes.catalogue import RECIPES
from lmsleep.recipes.recipe import Cell
from lmsleep.training import Job, RunFolder, TrainConfig

END = "at the end"


def updates(run: Try) -> Table:
    """Train the runs of the figure in turn; those that an earlier try has finished are taken from it.

    Raises:
        Interrupted: when there is no time left; the run under way is saved.
    """
    cells = RECIPES["2a"].cells("demo" if run.tiny else "paper")
    cells = [cell.with_train(partial(_train, run)) for cell in (cells[:2] if run.tiny else cells)]
    note = _note(cells[0])
    # Of these settings, by the note that names them: checkpoints stay behind on a machine that was lent.
    known: list[dict[str, Entry]] = run.before.get("rows", []) if run.before.get("note") == note else []
    done = {row["t"]: row for row in known if row[END]}

    def table() -> Table:
        return Table(rows=[done.get(_t(cell)) or _row(run, cell) for cell in cells], note=note)

    for cell in cells:
        if _t(cell) in done:
            continue
        print(f"    t = {_t(cell)}", flush=True)
        try:
            _job(run, cell).train()
        finally:
            run.keep(table())
    return table()


def _t(cell: Cell) -> int:
    task: Any = cell.config.task
    return task.t


def _train(run: Try, train: TrainConfig) -> TrainConfig:
    if run.tiny:
        return replace(train, steps=4, batch_size=4, eval_every=2, save_every=2, eval_batches=1, device="cpu")
    return replace(train, save_every=train.eval_every)


def _job(run: Try, cell: Cell) -> Job:
    return Job(run.folder / cell.folder_for(0), cell.config)


def _row(run: Try, cell: Cell) -> dict[str, Entry]:
    """Return what a run has come to so far."""
    train, path = cell.config.train, _job(run, cell).path
    places = [*range(train.eval_every, train.steps, train.eval_every), train.steps]
    folder = RunFolder(path) if (path / "config.json").exists() else None
    metrics = list(folder.metrics()) if folder else []
    found = {record["step"]: record["eval"]["accuracy"] for record in metrics if "eval" in record}
    report = folder.report() if folder else None
    spent = metrics[-1] if metrics else {"step": 0, "tokens": 0, "seconds": 0.0}
    end = None
    if report is not None:
        accuracy, answers = report["eval"]["accuracy"], sum(report["eval"]["answers"].values())
        low, high = wilson(round(accuracy * answers), answers)
        end = f"{accuracy:.3f} [{low:.3f}, {high:.3f}]"
    return {
        "t": _t(cell),
        "steps": spent["step"],
        "tokens/s": spent["tokens"] / spent["seconds"] if spent["seconds"] else None,
        **{f"after {step}": found.get(step) for step in places},
        END: end,
        "chance": cell.config.task.floors()["chance"],
        "commit": folder.made_by()["commit"] if folder else None,
    }


def _note(cell: Cell) -> str:
    config, train, model = cell.config, cell.config.train, cell.config.architecture
    return (
        f"Rule 110, one pass, `t` updates asked for: exact accuracy on held-out states after so many of "
        f"{train.steps:,} steps of {train.batch_size} sequences, and at the end [95 % interval of its "
        f"answers]. {len(model.blocks)} blocks of width {model.d_model}, {model.num_heads} heads, "
        f"L = {config.sleep.window}, learning rates {train.lr:g} (Muon) and {train.adam_lr:g} (AdamW), one "
        f"seed ({train.seed})."
    )
