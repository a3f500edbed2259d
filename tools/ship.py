"""Make runs the shipped ones: configuration, report and newest model as package data, and the data card.

lmsleep demo --full --out runs/committed
python tools/ship.py runs/committed/depo-N1-seed0 runs/committed/depo-N4-seed0
"""

import json
import shutil
import sys

from lmsleep import HybridLM, shipped
from lmsleep.training import RunFolder

CARD = """# The shipped models

Made by `python tools/ship.py`; this page too.

{rows}

| | |
|---|---|
| What | {parameters:,} parameters each: one attention block, one gated delta net block of {heads} heads. The runs of one seed of `lmsleep demo`, by equal training compute; no seed was chosen for its result |
| Trained on | task `depo`: a hidden cycle of {nodes} nodes as {nodes} shuffled edges, in windows of {window} tokens that are slept on and evicted; then `HOP_k node` asks where the node leads after k = 1 ... {hops} hops. All drawn by a program: no text, no personal data |
| Command | `{command}`, commit {commit}, torch {torch} |
| Accuracy | on cycles that training never drew ({answers:,} questions); chance is {chance:.3f}, and a model that knows single hops and chains none reaches {one_hop:.3f} beyond one |
| Vocabulary | `n1` ... `n{names}`, `HOP_1` ... `HOP_{hops}` (`lmsleep data depo` shows samples) |
| Limits | Toys: a graph of exactly {nodes} nodes, all named, each with one way out, read from `S = 0`; more hops, more or fewer edges, a second graph on top or words of another kind give nonsense. They show what sleep is for, and serve as an example and in tests |
| Licence | Apache-2.0, as the rest |

`smollm2-sleeps` is an adapter of another model, with a card of its own.

A folder here is a run (`config.json`, `report.json`, `checkpoints/`) without what only training needs: the optimizer's state
and the metrics.
"""  # noqa: E501


def ship(source: RunFolder) -> RunFolder:
    """Copy what reading, asking and evaluating need; the name says task and passes."""
    config = source.config()
    target = RunFolder(shipped.HERE / f"{config.task_name}-N{config.sleep.passes}")
    # An old checkpoint, of another step, would otherwise be shipped beside the new one.
    shutil.rmtree(target.path, ignore_errors=True)
    target.path.mkdir()
    for name in ("config.json", "report.json"):
        shutil.copy(source.path / name, target.path / name)
    checkpoint = source.latest()
    # Through the model and not copied: the optimizer's state lies in the same folder.
    HybridLM.from_pretrained(checkpoint).save_pretrained(target.path / "checkpoints" / checkpoint.name)
    return target


def card(runs: list[RunFolder]) -> str:
    """Write the data card of `runs`, which were made by one command."""
    reports = [json.loads((run.path / "report.json").read_text()) for run in runs]
    keys = list(reports[0]["eval"]["per_difficulty"])
    rows = [
        "| name | N | steps | training FLOP | seed | " + " | ".join(f"k={k}" for k in keys) + " | all |",
        "|---" * (6 + len(keys)) + "|",
    ]
    for run, report in zip(runs, reports, strict=True):
        config, score = run.config(), report["eval"]
        accuracies = [*(score["per_difficulty"][k] for k in keys), score["accuracy"]]
        cells = [run.path.name, config.sleep.passes, report["step"], f"{report['flops']:.3g}",
                 config.train.seed, *(f"{accuracy:.3f}" for accuracy in accuracies)]  # fmt: skip
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    config = json.loads((runs[0].path / "config.json").read_text())
    floors = runs[0].config().task.floors()
    task, parameters = config["task"], sum(p.numel() for p in runs[0].model().parameters())
    return CARD.format(
        rows="\n".join(rows),
        parameters=parameters,
        heads=config["model"]["num_heads"],
        window=config["sleep"]["window"],
        answers=sum(reports[0]["eval"]["answers"].values()),
        chance=floors["chance"],
        one_hop=floors["one hop k=2"],
        **{key: task[key] for key in ("nodes", "hops", "names")},
        **{key: config["made_by"][key] for key in ("command", "commit", "torch")},
    )


def main() -> None:
    """Replace the shipped runs by those that are named."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    runs = [ship(RunFolder.open(path)) for path in sys.argv[1:]]
    (shipped.HERE / "README.md").write_text(card(runs))


if __name__ == "__main__":
    main()
