"""SmolLM2 learns to sleep on what it reads; the first two runs are those of what ships as `smollm2-sleeps`.

    python tools/smollm2.py --out runs/smollm2                               (two cores: about two hours)
    python tools/smollm2.py --out runs/smollm2 --full                        (a GPU: new texts in every step)
    python tools/smollm2.py --model path/to/Qwen3.5-2B --out runs/qwen --full

Four steps, of which none is made twice, so the same command goes on after a kill: a folder of the base model
(`lmsleep convert`); a run on texts of exactly four facts, in which *which belongs to whom* is learned; one on
longer texts that fill one window or two; and one on all kinds of text, in which answers learn to stop and
plain English to go on. `--ship FOLDER` writes what was learned as an adapter of the base model. What the
shipped one remembers: `python -m benchmarks recall`. Models with attention alone get memory layers behind
every other block of their upper half. Other options go to `lmsleep finetune`: `--precision bfloat16` on a CPU
that has instructions for it (AMX), `--accumulate 4` where a GPU is small.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from lmsleep import shipped
from lmsleep.cli import main as lmsleep
from lmsleep.hf import load_pretrained, save_adapter
from lmsleep.hf.loading import attention_alone
from lmsleep.tasks import Recall
from lmsleep.training import RunFolder

ALL = (
    "--task recall --train memory --passes 1 --batch-size 16 --accumulate 1 --no-checkpoint --decay 0.5 "
    "--save-every 50"
)
# Exactly four facts: guessing among them is right on a quarter, and what is above is *whose*.
PAIRS = (
    "--kinds facts --facts 4 4 --filler 0 1 --length 96 --window 128 --steps 470 --decay 0 --lr 0.02 "
    "--adam-lr 2e-3 --eval-every 50 --eval-batches 2"
)
FACTS = (
    "--kinds facts --facts 2 6 --filler 0 3 --length 126 --window 64 --steps 520 --seed 1 --lr 0.02 "
    "--adam-lr 2e-3 --eval-every 60 --eval-batches 2"
)
# The longest run of the recipe `recall`.
KINDS = (
    "--kinds facts hops documents problems prose --shares 3 1 1 1 2 --facts 2 6 --filler 0 3 --length 192 "
    "--window 96 --steps 294 --lr 0.01 --adam-lr 1e-3 --eval-every 10000 --eval-batches 4"
)
# On a CPU few batches of facts are read again and again, for what is frozen is then computed once. Of all
# kinds that does not do: 64 batches were known by heart after 294 steps, and English was the worse for it.
KEPT = {
    "pairs": "--batches 100 --threads 1",
    "facts": "--batches 260 --threads 1",
    "kinds": "--threads 1",
}
# Where passes are cheap, every text is new; of both the steps are many more.
FULL = {
    name: f"--steps {steps} --batch-size 64 --save-every 500"
    for name, steps in {"pairs": 4_000, "facts": 20_000, "kinds": 20_000}.items()
}


def train(model: Path, out: Path, name: str, options: str, more: Sequence[str]) -> Path:
    """Begin a run, go on with it, or leave it where it is complete; return its model."""
    run = out / name
    if not (run / "report.json").is_file():
        begin = [str(model), *shlex.split(f"{ALL} {options}"), *more, "--out", str(run)]
        _say(["finetune", *(["--resume", str(run)] if run.exists() else begin)])
    return RunFolder(run).exported


def inserted(base: Path) -> str:
    """Say where memory layers go: behind every other block of the upper half, below which nothing changes."""
    depth = _depth(base)
    after = range(depth // 2, depth - 1, 2)
    return f"--insert {len(after)} --insert-after {' '.join(map(str, after))}"


def _depth(base: Path) -> int:
    config = json.loads((base / "config.json").read_text())
    return int(config.get("text_config", config)["num_hidden_layers"])


def _say(argv: list[str]) -> None:
    """Run a command of lmsleep, and show it."""
    sys.stderr.write(f"lmsleep {shlex.join(argv)}\n")
    lmsleep(argv)


def _held_out(run: RunFolder) -> str:
    """Say what a finished run answers of texts that it never had."""
    report = run.report()
    assert report is not None, "the run is complete"
    score = report["eval"]
    tokens, losses = score["answer_tokens"], score["loss_per_difficulty"]
    bits = fmean([losses[key] for key in tokens], tokens.values()) / math.log(2)
    return (
        f"{score['accuracy']:.3f} of {sum(score['answers'].values())} answers to all kinds of question at "
        f"the end of training, {bits:.3f} bits a token of theirs; N = 1"
    )


def main(argv: Sequence[str]) -> None:
    """Train what is not trained yet, and write the adapter."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="the base model")
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"), help="folder of the runs")
    parser.add_argument("--full", action="store_true", help="many more steps, each on new texts")
    parser.add_argument("--ship", type=Path, help="folder to write as an adapter of the base model")
    parser.add_argument("--rank", type=int, help="of what is shipped; default: whole matrices")
    options, more = parser.parse_known_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    base = options.out / "base"
    if not base.exists():
        _say(["convert", options.model, str(base)])
    alone = attention_alone(base)
    made, depth = base, _depth(base)
    for name, own in {"pairs": PAIRS, "facts": FACTS, "kinds": KINDS}.items():
        # More passes, where somebody asks for them, loop the upper half.
        given = f"{own} --loop {depth // 2} {depth} {(FULL if options.full else KEPT)[name]}"
        if alone and made == base:
            given += f" {inserted(base)}"
        if alone and "--batches" in given:  # nothing can be kept of a hybrid, whose own layers are trained
            given += f" --keep {shlex.quote(str(options.out / 'states'))}"
        made = train(made, options.out, name, given, more)
    if options.ship is not None:
        runs = [RunFolder.open(options.out / name) for name in KEPT]
        command = ["python", "tools/smollm2.py", "--model", options.model, *["--full"] * options.full, *more]
        task = runs[-1].config().task
        assert isinstance(task, Recall)
        about = {
            "recipe": f"`{shlex.join(command)} --ship FOLDER`: three runs, of "
            + ", ".join(f"{r.config().train.steps} steps (seed {r.config().train.seed})" for r in runs)
            + f"; commit {runs[-1].made_by()['commit']}",
            "trained on": "task recall: planted facts and chains of two in prose, passages of the Python "
            "reference, problems of GSM-Infinite; no personal data",
            "limits": f"texts of up to {task.length} tokens; N = 1 alone; it answers what "
            "it was not told too (what it remembers and what it costs: docs/pretrained.md)",
            "held out": _held_out(runs[-1]),
        }
        # The file in the package says neither; another base says both for itself.
        packaged = options.model == shipped.SMOLLM2
        saved = save_adapter(
            load_pretrained(made), options.ship, base=options.model, rank=options.rank, about=about,
            license="apache-2.0" if packaged else None,
            base_model="HuggingFaceTB/SmolLM2-135M-Instruct" if packaged else None,
        )  # fmt: skip
        sys.stdout.write(f"{options.ship}: {saved.bytes / 1e6:.1f} MB\n")


if __name__ == "__main__":
    main(sys.argv[1:])
