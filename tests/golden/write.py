"""What is golden, computed: `test_golden.py` compares it with what commit f7a8996 wrote into this folder.

`PYTHONPATH=tests python -m golden.write` writes the folder anew. Do that only where a result is
meant to change, and say why.
"""

import contextlib
import io
import itertools
import json
import re
import shutil
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import lmsleep
from lmsleep import cli, sleep_forward
from lmsleep.cli.main import COMMANDS
from lmsleep.tasks import batch_rng
from lmsleep.training import RunConfig, RunFolder, Trainer

HERE = Path(__file__).parent
STEPS = 20
# Training of four passes amplifies the last digit of a float64 about tenfold a step, past any bound.
SURE = 6
GRAPH = "n8 n4 n7 n8 n2 n5 n5 n1 n1 n6 n4 n3 n3 n2 n6 n7"
DEPO = {
    "name": "depo", "nodes": 6, "hops": 3, "queries": 4, "names": 6, "name_lengths": [1, 1],
    "node_distribution": "fixed", "test_hops": "all", "ask": "fork",
}  # fmt: skip
RULE110 = {"name": "rule110", "width": 8, "states": 2, "t": 2, "asked": 4}
MODEL = {
    "vocab_size": 8, "d_model": 16, "num_heads": 2, "mlp_dim": 24,
    "blocks": ["attention", "gated_delta_net", "gated_linear"],
}  # fmt: skip
TRAIN = {"batch_size": 8, "threads": 1, "eval_every": 20, "eval_batches": 1, "save_every": 10}


def sleeps() -> dict[str, dict[str, Any]]:
    """Sleeps as runs of that commit wrote them: passes by eviction by checkpointing."""
    cases = itertools.product((1, 4), ("hard", "sliding"), (False, True))
    return {
        f"N{n}-{eviction}{'-checkpoint' * checkpoint}": {
            "window": 6, "passes": n, "eviction": eviction, "checkpoint": checkpoint,
        }
        for n, eviction, checkpoint in cases
    }  # fmt: skip


def run_config(task: dict[str, Any], sleep: dict[str, Any]) -> RunConfig:
    """The configuration of a golden run, as it stood in a config.json of that commit."""
    if task["name"] == "rule110":  # its context lies in the sequence: a window may not cut it
        sleep = {**sleep, "window": 8}
    return RunConfig.from_dict(
        {"task": task, "model": MODEL, "sleep": sleep, "train": {**TRAIN, "steps": STEPS}}
    )


def losses(trainer: Trainer) -> list[float]:
    """The losses of the next steps, in float64: processors differ in the last digits, and training amplifies.

    The next `STEPS` with one pass, the next `SURE` with four.
    """
    trainer.model.double()
    for optimizer in trainer.optimizers:
        for state in optimizer.state.values():
            state.update({name: x.double() for name, x in state.items() if torch.is_tensor(x)})
    steps = STEPS if trainer.config.sleep.passes == 1 else SURE
    return [trainer.train_step()["loss"] for _ in range(steps)]


def shipped(name: str) -> dict[str, Tensor]:
    """Logits and fast weights of a shipped model on fixed tokens: two windows asleep, then questions."""
    run = RunFolder.open(lmsleep.shipped.find(name))
    config, model = run.config(), run.model()
    batch = config.task.batch(batch_rng(7, "test", 0), 4, "test")
    with torch.no_grad():
        read = sleep_forward(model, batch.context, None, config.sleep, evict_last=True)
        asked = sleep_forward(
            model, batch.tokens, None, config.sleep, state=read.state.rows(batch.context_row)
        )
    weights = {f"S.{i}": S for i, S in enumerate(read.memory.layers) if S is not None}
    return {"context": read.logits, "questions": asked.logits, **weights}


def hub_outputs(folder: Path) -> dict[str, Tensor]:
    """Logits and fast weights of the Hugging Face folder, read with the sleep that it was saved with."""
    from lmsleep.opening import open_backbone

    model, sleep = open_backbone(folder, "cpu")
    tokens = torch.arange(1, 24)[None] % 60
    with torch.no_grad():
        out = sleep_forward(model, tokens, None, sleep, evict_last=True)
    return {"logits": out.logits, **{f"S.{i}": S for i, S in enumerate(out.memory.layers) if S is not None}}


def public_names() -> dict[str, list[str]]:
    """The `__all__` of every package of lmsleep that has one."""
    found = [m.name for m in walk_packages(lmsleep.__path__, "lmsleep.") if m.ispkg]
    packages = [lmsleep, *map(import_module, found)]
    return {p.__name__: sorted(p.__all__) for p in packages if hasattr(p, "__all__")}


def flags() -> dict[str, list[str]]:
    """The flags in the help of every command."""
    commands = {name: [name] for name in COMMANDS}
    commands["train"], commands["train text"] = ["train", "depo"], ["train", "text"]
    commands |= {
        f"memory {name}": ["memory", name] for name in ("show", "diff", "merge", "log", "consolidate")
    }
    commands |= {f"bench {name}": ["bench", name] for name in ("recurrence", "step")}
    return {name: _flags([*words, "--help"]) for name, words in commands.items()}


def _flags(words: list[str]) -> list[str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        cli.main(words)
    return sorted(set(re.findall(r"--[a-z][a-z0-9-]*", said.getvalue())))


def _files() -> None:
    """A memory file within a window, a run that stopped halfway, a fine-tuned folder."""
    from hf_models import family

    from lmsleep.cli.opening import SleepOptions, new_session
    from lmsleep.hf.finetune import FineTune
    from lmsleep.training import TrainConfig

    run = RunFolder.open(lmsleep.shipped.find("depo-N4"))
    session = new_session(Path("depo-N4"), SleepOptions())
    session.read(GRAPH)
    session.save(HERE / "depo-N4.mem", tags={"made": "golden"})
    session.memory.save(HERE / "depo-N4-S.mem", run.model())

    folder = RunFolder.create(HERE / "run", run_config(DEPO, sleeps()["N4-sliding"]))
    trainer = Trainer(folder, folder.config())
    for _ in range(STEPS // 2):
        trainer.train_step()
    trainer.save()

    base = HERE / "base"
    family("qwen3_5").save_pretrained(base)
    config = RunConfig(
        task=lmsleep.tasks.MQAR(pairs=2, keys=8, values=8, queries=1),
        model=FineTune(folder=base, train="memory"),
        sleep=lmsleep.SleepConfig(window=4, passes=2, loop="middle"),
        train=TrainConfig(steps=1, batch_size=2, eval_batches=1, threads=1),
    )
    tuned = RunFolder.create(HERE / "tuned", config)
    Trainer(tuned, config).fit()
    shutil.copytree(tuned.exported, HERE / "hub", dirs_exist_ok=True)
    shutil.rmtree(base)
    shutil.rmtree(HERE / "tuned")


def main() -> None:
    """Write the folder."""
    torch.set_num_threads(1)
    for name in ("run", "hub", "base", "tuned"):
        shutil.rmtree(HERE / name, ignore_errors=True)
    curves = {}
    for task in (DEPO, RULE110):
        for name, sleep in sleeps().items():
            trainer = Trainer(RunFolder(HERE / "none"), run_config(task, sleep))
            curves[f"{task['name']}-{name}"] = losses(trainer)
    _files()
    trainer = Trainer.resume(RunFolder(HERE / "run"))
    curves["run"] = losses(trainer)
    for name, found in (("losses", curves), ("names", public_names()), ("flags", flags())):
        (HERE / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    for name in ("depo-N1", "depo-N4"):
        save_file({k: t.contiguous() for k, t in shipped(name).items()}, HERE / f"{name}.safetensors")
    save_file({k: t.contiguous() for k, t in hub_outputs(HERE / "hub").items()}, HERE / "hub.safetensors")


if __name__ == "__main__":
    main()
