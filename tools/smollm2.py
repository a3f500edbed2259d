"""SmolLM2 learns to sleep on what it reads: the runs behind the shipped adapter `smollm2-sleeps`.

    python tools/smollm2.py --out runs/smollm2                               (two cores: about two hours)
    python tools/smollm2.py --out runs/smollm2 --full                        (a GPU: new texts in every step)
    python tools/smollm2.py --model path/to/Qwen3.5-2B --out runs/qwen --full

Four steps, of which none is made twice, so the same command goes on after a kill: a folder of the base model
(`lmsleep convert`); a run on texts of exactly four facts, in which *which belongs to whom* is learned; one on
longer texts that fill one window or two; and one on all kinds of text, in which answers learn to stop and
plain English to go on. `--ship FOLDER` writes what was learned as an adapter of the base model. What the
shipped one remembers: `python -m benchmarks recall`. Models with attention alone get memory layers behind
every other block of their upper half.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from lmsleep import shipped
from lmsleep.cli import main as lmsleep
from lmsleep.hf import load_pretrained, save_adapter
from lmsleep.hf.loading import check_can_sleep
from lmsleep.recipes.recall import fine_tuned
from lmsleep.training import Job, RunFolder

BOTH = (
    "--task recall --kinds facts --train memory --passes 1 --lr 0.02 --adam-lr 2e-3 "
    "--batch-size 16 --accumulate 1 --no-checkpoint --precision bfloat16 --eval-batches 2"
)
FIRST = (
    "--facts 4 4 --filler 0 1 --length 96 --window 128 --steps 470 --decay 0 --eval-every 50 --save-every 50"
)
SECOND = (
    "--facts 2 6 --filler 0 3 --length 126 --window 64 --steps 520 --decay 0.5 --seed 1 --eval-every 60 "
    "--save-every 30"
)
# On a CPU few batches are read again and again, for what is frozen is then computed once.
KEPT = {"pairs": "--batches 100 --threads 1", "facts": "--batches 260 --threads 1"}
# Where passes are cheap, every text is new; of both the steps are many more.
FULL = {"pairs": "--steps 4000 --batch-size 64", "facts": "--steps 20000 --batch-size 64"}
FULL_KINDS = {"steps": 20_000, "batch_size": 64, "batches": None, "keep": None}


def train(model: Path, out: Path, name: str, options: str, *, full: bool, more: Sequence[str]) -> Path:
    """Begin a run, go on with it, or leave it where it is complete; return its model."""
    run = out / name
    if not (run / "report.json").is_file():
        given = [*shlex.split(BOTH), *shlex.split(options)]
        given += (
            shlex.split(FULL[name]) if full else [*shlex.split(KEPT[name]), "--keep", str(out / "states")]
        )
        begin = [str(model), *given, *more, "--out", str(run)]
        _say(["finetune", *(["--resume", str(run)] if run.exists() else begin)])
    return RunFolder(run).exported


def places(base: Path) -> str:
    """Say where memory layers go, if the model needs some, and which blocks more passes would loop.

    It is the upper half: nothing below it needs a gradient.
    """
    depth = AutoConfig.from_pretrained(base).get_text_config().num_hidden_layers
    loop = f"--loop {depth // 2} {depth}"
    try:
        check_can_sleep(base)
    except ValueError:  # attention alone
        after = range(depth // 2, depth - 1, 2)
        return f"{loop} --insert {len(after)} --insert-after {' '.join(map(str, after))}"
    return loop


def train_kinds(adapter: Path, out: Path, *, full: bool) -> Path:
    """Train on all kinds of text as the recipe `recall` does for longest; return the model of the run."""
    (longest,) = (cell for cell in fine_tuned("demo", adapter) if cell.aside)
    config = longest.with_seed(0)
    options: dict[str, Any] = FULL_KINDS if full else {"keep": out / "states"}
    Job(out / "kinds", replace(config, train=replace(config.train, **options))).train()
    return RunFolder(out / "kinds").exported


def _say(argv: list[str]) -> None:
    """Run a command of lmsleep, and show it."""
    sys.stderr.write(f"lmsleep {shlex.join(argv)}\n")
    lmsleep(argv)


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
    where = places(base)
    first = train(base, options.out, "pairs", f"{where} {FIRST}", full=options.full, more=more)
    loop = where.partition(" --insert")[0]
    second = train(first, options.out, "facts", f"{loop} {SECOND}", full=options.full, more=more)
    third = train_kinds(second, options.out, full=options.full)
    if options.ship is not None:
        runs = [RunFolder.open(options.out / name) for name in (*KEPT, "kinds")]
        made, report = runs[-1].made_by(), runs[-1].report()
        assert report is not None, "the run is complete"
        score, floor = report["eval"], report["floors"]["chance"]
        command = f"python tools/smollm2.py{' --full' if options.full else ''} --ship FOLDER"
        about = {
            "recipe": f"`{command}`: three runs, of "
            + " and ".join(f"{r.config().train.steps} steps (seed {r.config().train.seed})" for r in runs)
            + f"; commit {made['commit']}",
            "trained on": "task recall: planted facts in prose, drawn by a program; no personal data",
            "limits": "texts of up to 126 tokens, in six relations; N = 1 alone; it does not stop after an "
            "answer (`--max-new-tokens`), answers what it was not told too, and costs 1.3 bits a token of "
            "plain English after an eviction (docs/pretrained.md)",
            "held out": f"{score['accuracy']:.3f} of {sum(score['answers'].values())} answers at the end of "
            f"training, {score['bits']:.3f} bits a token; N = 1; guessing among what the text said: "
            f"{floor:.3f}",
        }
        # The file in the package says neither; another base says both for itself.
        packaged = options.model == shipped.SMOLLM2
        saved = save_adapter(
            load_pretrained(third), options.ship, base=options.model, rank=options.rank, about=about,
            license="apache-2.0" if packaged else None,
            base_model="HuggingFaceTB/SmolLM2-135M-Instruct" if packaged else None,
        )  # fmt: skip
        sys.stdout.write(f"{options.ship}: {saved.bytes / 1e6:.1f} MB\n")


if __name__ == "__main__":
    main(sys.argv[1:])
