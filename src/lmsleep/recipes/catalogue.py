"""The recipes: the paper's figures on tasks trained from scratch, and the comparisons it left out.

`demo` is the demo's setting, tuned, minutes a figure and seed on two cores. `small` has harder tasks, larger
models and more steps, hours on two cores, at one learning rate for every N; nothing of it is tuned. `paper`
is the paper's own setting, for a GPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmsleep.hf.finetune import FineTune
from lmsleep.models import BlockKind, HybridConfig
from lmsleep.recipes import depth, recall, rivals, settings
from lmsleep.recipes.recipe import Cell, Recipe
from lmsleep.recipes.results import TIMED_STEPS
from lmsleep.recipes.settings import PAIR, Scale, depo, rule110
from lmsleep.sleep import Hard, Passes, SleepConfig
from lmsleep.tasks import MQAR, GSMInfinite
from lmsleep.training import BASELINES, RunConfig, TrainConfig, baseline, equal_compute, two_stages

PRETRAINED = {
    "4a": "jet-ai/Jet-Nemotron-2B",
    "4b": "ByteDance/Ouro-1.4B",
    "5": "ByteDance/Ouro-1.4B",
}  # on the Hugging Face Hub
# Fine-tuning: operations, tokens of a context, and windows of hard and of sliding eviction.
GSM_SIZES: dict[Scale, dict[str, Any]] = {
    # Ours: modulo 23 no answer is frequent, and numbers stand in the noise too. Without chaining .59 is had
    # (docs/tasks.md).
    "small": {
        "task": {"ops": (1, 4), "length": (400, 700), "modulus": 23, "noise_numbers": True},
        "hard": 400,
        "sliding": 128,
    },
    "paper": {"task": {"ops": (1, 8), "length": (2000, 3300)}, "hard": 2000, "sliding": 512},
}
# 1,000 steps of `paper` are by our arithmetic about the 1 - 2 H100-days that the paper gives for a run.
GSM_TRAIN: dict[Scale, TrainConfig] = {
    "small": TrainConfig(
        batch_size=32, accumulate=32, steps=500, lr=1e-3, adam_lr=2e-4, save_every=50, checkpoint=True
    ),
    "paper": TrainConfig(
        batch_size=256,
        accumulate=128,
        lr=1e-3,
        adam_lr=5e-5,
        save_every=50,
        eval_batches=2,
        checkpoint=True,
    ),
}
ON_THE_SPOT = (
    "**No pretrained weights.** Every run starts from a model of four small blocks that was trained on the "
    "spot, on the same task with nothing evicted. This shows that the recipe runs from end to end; it says "
    "nothing about the paper's models."
)
Make = Callable[[Scale, int], RunConfig]  # the run with N passes at a scale
LIVE_SHARE = 0.7  # of the demo's steps: three minutes on two quiet cores
SLEEPS = (1, 4, 10, 100, 1000)  # windows of filler, four of them in training


def retention(scale: Scale, passes: int) -> RunConfig:
    """Make a run on pairs that fill one window, then four windows of filler, then the questions."""
    pairs = {"demo": 8, "small": 16, "paper": 64}[scale]
    run = depo(scale, passes)
    train = replace(run.train, curriculum=0)  # which would put fewer pairs into a window
    if scale == "demo":  # storing is learned sooner than following
        train = replace(train, steps=400)
    return replace(
        run,
        train=train,
        # A pair is two tokens, so that the pairs fill one window of 2 * pairs and the filler four more.
        task=MQAR(pairs=pairs, keys=2 * pairs, values=2 * pairs, queries=8, filler=4 * 2 * pairs),
        sleep=replace(run.sleep, window=2 * pairs),
    )


def _after_sleeps(run: RunConfig) -> dict[int, RunConfig]:
    """Read a retention run after 1 ... 1000 windows of filler; the long ones on fewer contexts."""
    task, train, readings = run.task, run.train, {}
    assert isinstance(task, MQAR)
    # A thousand windows a context: evaluation alone would otherwise outlast training.
    few = replace(train, batch_size=min(train.batch_size, 32), eval_batches=1)
    for windows in SLEEPS:
        filler = windows * 2 * task.pairs
        other = replace(run, task=replace(task, filler=filler), train=few)
        # The very run where nothing changes: `collect` then takes its report and does not read again.
        readings[windows] = run if filler == task.filler else other
    return readings


def _load_by_depth(scale: Scale) -> list[Cell]:
    """Vary the load of facts in contexts of one length; what is asked for lies 1 ... K hops deep."""
    loads, hops = {"demo": ((8, 12), 4), "small": ((8, 16, 24), 4), "paper": ((16, 32, 64), 8)}[scale]
    cells = []
    for n in (1, 4):
        run = depo(scale, n)
        for load in loads:
            # Every load has the names of the largest and is padded to its length: only the load differs.
            task = replace(
                settings.DEPO, nodes=load, hops=hops, names=max(loads), pad_to=2 * max(loads), queries=8
            )
            # One window for every load, which divides no edge: an edge is two tokens and loads are even.
            sleep = replace(run.sleep, window=min(loads))
            cell = replace(run, task=task, sleep=sleep)
            cells.append(Cell(f"load {load}, N = {n}", cell, at=load, line=f"N = {n}"))
    return cells


def _on_the_spot(figure: str) -> Callable[[Scale], list[Cell]]:
    """Make figures 4a, 4b and 5 from models that know GSM-Infinite already, but never had to remember."""

    def cells(scale: Scale) -> list[Cell]:
        if scale != "demo":
            raise ValueError(
                f"figure {figure} at scale={scale} needs pretrained weights: download {PRETRAINED[figure]} "
                "from the Hugging Face Hub and name its folder with --weights (scale=demo trains a tiny "
                "model on the spot instead)"
            )
        make = {"4a": _looped_in_the_middle, "4b": _with_memory_blocks, "5": _in_two_stages}[figure]
        return [make(n) for n in (1, 2, 4)]

    return cells


def _fine_tuned(figure: str) -> Callable[[Scale, Path], list[Cell]]:
    """Make them from pretrained weights: the paper's setting, or adapters on shorter problems (`small`)."""

    def cells(scale: Scale, weights: Path) -> list[Cell]:
        if scale == "demo":
            raise ValueError("weights: scale=demo trains a model on the spot; use scale=small or paper")
        hybrid, sizes = figure == "4a", GSM_SIZES[scale]
        eviction = "sliding" if figure == "5" else "hard"
        # The folder between the stages is known only when the first is trained; recipes/run.py puts it in.
        made = []
        for n in (1, 2, 4, 6) if hybrid else (1, 2, 4):
            run = RunConfig(
                task=GSMInfinite(tokenizer=str(weights), **sizes["task"]),
                model=FineTune(
                    folder=weights.resolve(),
                    train="full" if scale == "paper" else "lora",
                    insert=0 if hybrid else 6,
                ),
                sleep=SleepConfig(
                    window=sizes[eviction],
                    passes=n,
                    eviction=eviction,
                    loop="middle" if hybrid else None,
                    normalize=not hybrid,  # as Ouro does between its steps
                ),
                train=GSM_TRAIN[scale],
            )
            # The memory layers are trained alone first for figure 5 only (section 6.4).
            if figure != "5":
                made.append(Cell(f"N = {n}", run))
                continue
            alone, whole = two_stages(run, Path("known when it is trained"))
            made.append(Cell(f"N = {n}", whole, start=Cell(f"memory layers alone, N = {n}", alone)))
        return made

    return cells


def _gsm(blocks: tuple[BlockKind, ...], sleep: SleepConfig, **train: Any) -> RunConfig:
    """Make a tiny run on GSM-Infinite; fast-weight blocks have no feed-forward layer, as in the paper."""
    # The blocks that were inserted into Ouro have none either, and starts must fit what they go on to.
    bare = {i: {"mlp_dim": 0} for i, kind in enumerate(blocks) if kind != "attention"}
    return RunConfig(
        task=settings.SHORT_GSM,
        model=HybridConfig(d_model=64, num_heads=4, blocks=blocks, overrides=bare),
        sleep=sleep,
        train=TrainConfig(batch_size=16, lr=5e-3, adam_lr=5e-3, threads=1, **{"steps": 300, **train}),
    )


def _looped_in_the_middle(passes: int) -> Cell:
    """Teach a hybrid that never evicted to sleep, its two middle blocks looped."""
    # One label for every N: the start is trained once and shared.
    start = Cell("start: hybrid, nothing evicted", _gsm(2 * PAIR, SleepConfig()))
    sleep = SleepConfig(window=64, passes=passes, loop=(1, 3))
    return Cell(f"N = {passes}", _gsm(2 * PAIR, sleep), start=start)


PLAIN: tuple[BlockKind, ...] = ("attention",) * 4
WITH_MEMORY: tuple[BlockKind, ...] = (*PLAIN[:2], "gated_delta_net", *PLAIN[2:], "gated_delta_net")


def _with_memory_blocks(passes: int) -> Cell:
    """Insert blocks with fast weights into a transformer and train the whole model, under hard eviction."""
    # One label for every N: the start is trained once and shared.
    start = Cell("start: transformer, nothing evicted", _gsm(PLAIN, SleepConfig()))
    sleep = SleepConfig(window=64, passes=passes)
    run = _gsm(WITH_MEMORY, sleep, steps=600, start=Path(start.label), inserted=(2, 5))
    return Cell(f"N = {passes}", run, start=start)


def _in_two_stages(passes: int) -> Cell:
    """Train the inserted blocks alone, hard eviction if N > 1; then the whole model, twice as long."""
    start = Cell("start: transformer, nothing evicted", _gsm(PLAIN, SleepConfig()))
    sleep = SleepConfig(window=64, passes=passes, eviction="sliding")
    alone = _gsm(
        WITH_MEMORY,
        replace(sleep, eviction=Hard()) if passes > 1 else sleep,
        start=Path(start.label),  # stands for the folder, which is known when it is trained
        inserted=(2, 5),
        only_inserted=True,
    )
    warm = Cell(f"inserted blocks alone, N = {passes}", alone, start=start)
    return Cell(f"N = {passes}", _gsm(WITH_MEMORY, sleep, steps=600), start=warm)


def _speed(scale: Scale) -> list[Cell]:
    """Time training steps on one long context in windows of three sizes, activations recomputed."""
    blocks = 2 * PAIR
    T, windows, batch, width = {
        "demo": (384, (32, 64, 128), 2, 64),
        "small": (3072, (256, 512, 1024), 4, 256),
        "paper": (12_000, (1000, 2000, 4000), 4, 2048),
    }[scale]
    if scale == "paper":  # about 1.4 billion parameters
        blocks = ("attention", "attention", "attention", "gated_delta_net") * 7
    cells = []
    for n in (1, 2, 4):
        for window in windows:
            run = RunConfig(
                # 16 pairs are 32 tokens; the filler makes it T.
                task=MQAR(pairs=16, queries=1, filler=T - 32),
                model=HybridConfig(d_model=width, num_heads=max(4, width // 128), blocks=blocks),
                sleep=SleepConfig(window=window, passes=n),
                # As in the paper, which recomputes activations chunk by chunk.
                train=TrainConfig(batch_size=batch, steps=1 + TIMED_STEPS, checkpoint=True),
            )
            cells.append(Cell(f"L = {window}, N = {n}", run, at=window, line=f"N = {n}"))
    return cells


def _by_passes(make: Make, passes: Sequence[int]) -> Callable[[Scale], list[Cell]]:
    return lambda scale: [Cell(f"N = {n}", make(scale, n)) for n in passes]


def _by_steps(scale: Scale) -> list[Cell]:
    """Vary how many updates of Rule 110 are asked for, N = 1 throughout."""
    times = {"demo": (1, 2, 3, 4), "small": (2, 4, 6, 8), "paper": (4, 8, 10, 12, 14, 16)}[scale]
    # The paper's curves end at 40 million tokens: 773 steps of 512 sequences of 101.
    short = {"steps": 773, "eval_every": 50} if scale == "paper" else {}
    return [Cell(f"t = {t}", rule110(scale, 1, t, **short)) for t in times]


def _at_both_budgets(make: Make, bounds: Sequence[str] = ()) -> Callable[[Scale], list[Cell]]:
    """Compare N = 1, 2 and 4 at the tokens of N = 4 and at its training FLOPs; transformers at its tokens."""

    def cells(scale: Scale) -> list[Cell]:
        asleep, made = make(scale, 4), list[Cell]()
        name = asleep.task_name
        for n in (1, 2):
            label, run = f"hybrid, N = {n}", make(scale, n)
            # Fewer passes at the tokens of N = 4 ...
            tokens = Cell(label, run, budget="tokens", folder=f"{name}-N{n}-tokens")
            # ... and at its FLOPs. Until the rates of the shorter run fall both make the same steps, so it is
            # trained on the way of the longer one.
            longer = equal_compute(run, asleep)
            made += [tokens, Cell(label, longer, budget="compute", folder=f"{name}-N{n}", shorter=tokens)]
        # What both budgets are measured by.
        made.append(Cell("hybrid, N = 4", asleep, budget="both", folder=f"{name}-N4"))
        for bound in bounds:  # not contestants, so one seed tells enough
            run, cache = baseline(bound, make(scale, 1)), bound.removeprefix("transformer-")
            label = f"transformer, cache {'kept' if cache == 'cached' else cache}"
            made.append(Cell(label, run, budget="tokens", folder=f"{name}-{bound}", once=True))
        return made

    return cells


def _four_with_other_passes(run: RunConfig) -> dict[int, RunConfig]:
    """Read a run with N = 4 with 1 ... 6 passes, the others as they are."""
    passes = (1, 2, 3, 4, 6) if run.sleep.passes == 4 else (run.sleep.passes,)
    return {n: replace(run, sleep=run.sleep.with_passes(n)) for n in passes}


def _live(scale: Scale) -> list[Cell]:
    """Train N = 1 and N = 4 in minutes on two cores: `LIVE_SHARE` of the steps, the same training FLOPs."""

    def shorter(passes: int) -> RunConfig:
        train = depo(scale, passes).train
        # The curriculum shrinks with the steps, or most of a short run would see easy questions alone.
        steps, curriculum = (round(LIVE_SHARE * n) for n in (train.steps, train.curriculum))
        return depo(scale, passes, steps=steps, curriculum=curriculum, save_every=50)

    asleep = shorter(4)
    return [Cell(f"N = {n}", equal_compute(shorter(n), asleep), folder=f"depo-live-N{n}") for n in (1, 4)]


def _compute_matched(make: Make) -> Callable[[Scale], list[Cell]]:
    def cells(scale: Scale) -> list[Cell]:
        asleep = make(scale, 4)
        rivals = [name for name in BASELINES if name != "one-pass"]  # at equal compute: one-pass-longer
        return [
            Cell("N = 4", asleep),
            *(Cell(name, equal_compute(baseline(name, asleep), asleep)) for name in rivals),
        ]

    return cells


def _drawn_passes(run: RunConfig) -> Cell:
    """Draw the passes of each training step, for a model that can be read with any N."""
    return Cell("N drawn from 1 ... 4", replace(run, train=replace(run.train, random_passes=True)))


def _random_passes(scale: Scale) -> list[Cell]:
    return [*_by_passes(depo, (1, 2, 4))(scale), _drawn_passes(depo(scale, 4))]


def _cheaper_passes(scale: Scale) -> list[Cell]:
    """Compare N = 4 throughout with what costs less."""
    one, four = _by_passes(depo, (1, 4))(scale)
    run, blocks = four.config, len(four.config.architecture.blocks)
    # Blocks before the loop run once a window.
    upper = replace(run.sleep, consolidator=Passes(4, loop=(1, blocks)))
    # Three fifths of the steps at half the passes.
    early = replace(run.train, early_steps=run.train.steps * 3 // 5, early_passes=2)
    return [
        one,
        Cell("N = 2, then 4", replace(run, train=early)),
        _drawn_passes(run),
        Cell("N = 4, gradients through 2", replace(run, train=replace(run.train, backprop_passes=2))),
        Cell("N = 4, first block once", replace(run, sleep=upper)),
        four,
    ]


def _with_other_passes(run: RunConfig) -> dict[int, RunConfig]:
    """Read a run with 1 ... 8 passes, whatever it was trained with."""
    return {n: replace(run, sleep=run.sleep.with_passes(n)) for n in (1, 2, 3, 4, 6, 8)}


def _update_rules(scale: Scale) -> list[Cell]:
    """Compare the update rules of the fast weights, each with N = 1 and N = 4."""
    cells = []
    rules: tuple[BlockKind, ...] = ("gated_delta_net", "gated_linear", "kda", "raven")
    for rule in rules:
        for n in (1, 4):
            run = depo(scale, n)
            model = run.architecture
            if rule == "raven":  # which writes no more than it forgets
                model = replace(model, forget=(0.1, 1.0))
            # Only fast-weight blocks have an update rule.
            blocks = tuple(kind if kind == "attention" else rule for kind in model.blocks)
            cells.append(Cell(f"{rule}, N = {n}", replace(run, model=replace(model, blocks=blocks))))
    return cells


def _state_sizes(scale: Scale) -> list[Cell]:
    """Vary the size of S, with N = 1 and N = 4."""
    cells = []
    for size in (4, 8, 16, 32):
        for n in (1, 4):
            run = depo(scale, n)
            # The head's size alone: S is K x V with K = V = head_dim, and d_model stays.
            model = replace(run.architecture, head_dim=size)
            cells.append(Cell(f"{size} x {size} a head, N = {n}", replace(run, model=model)))
    return cells


def _rivals(task: str) -> Recipe:
    bench = rivals.BENCHES[task]
    return Recipe(
        f"Rivals on {bench.title}",
        "Not in the paper: what else could keep a window, at equal bytes and for equal training FLOPs?",
        rivals.cells(task),
        ("bytes", "context_flops"),
        shown=bench.shown,
        costs=True,
        caution="Bytes are a quarter (1/4), all (1) or four times (4) those of `S` in a block. Each method "
        "has the rate, and the one choice of its own, that the same search found. Keys are those of the "
        "whole cache, which was trained with nothing compacted.",
    )


def _depth(name: str) -> Recipe:
    problem = depth.PROBLEMS[name]
    return Recipe(
        f"Blocks against passes: {problem.nodes // 2} hops among {problem.nodes} nodes",
        "Not in the paper, which varies N at one model: is accuracy a function of blocks times passes?",
        depth.cells(name),
        ("axis", "flops", "tokens", "token_flops", "token_seconds", "parameters", "bytes"),
        axis="blocks by passes",
        costs=True,
        caution="Each depth has the training FLOPs of two blocks in four passes, and the rate, the "
        "convolution and the curriculum that the same search found for it.",
    )


BOTH_BUDGETS = (
    "Not in the paper, which compares at equal tokens: N at equal tokens and at equal training FLOPs."
)
LIVE = Recipe(
    "Pointer chase: where is a node after k hops, once the graph is out of sight?",
    "One model, trained with one and with four passes a sleep, for the same training FLOPs.",
    _live,
    ("flops", "difficulty"),
    caution="Seven tenths of the training behind the committed result, and seeds differ. N is compared at "
    "one model: that says nothing of deeper ones (docs/rivals.md).",
)
RECIPES: dict[str, Recipe] = {
    "depo": Recipe(
        "Pointer chase: where is a node after k hops, once the graph is out of sight?",
        BOTH_BUDGETS,
        _at_both_budgets(depo, ("transformer-evicted", "transformer-cached")),
        ("tokens", "flops", "difficulty", "read"),
        read=_four_with_other_passes,
    ),
    "rule110": Recipe(
        "Rule 110: what are the cells after t steps, once the state is out of sight?",
        BOTH_BUDGETS,
        _at_both_budgets(rule110),
        ("tokens", "flops", "final"),
    ),
    "2a": Recipe(
        "Rule 110, one pass, more and more updates",
        "Paper: with N = 1 accuracy falls sharply as t grows.",
        _by_steps,
        ("tokens", "final"),
    ),
    "2b": Recipe(
        "Rule 110 with N passes",
        "Paper (t = 32): N = 1 about .10, N = 2 about .20, N = 3 and 4 above .30 exact.",
        _by_passes(rule110, (1, 2, 3, 4)),
        ("tokens", "flops", "final"),
    ),
    "3": Recipe(
        "Depo: k hops along a hidden cycle",
        "Paper: N = 1 stalls at k >= 4, N = 2 at k >= 8; only N = 4 starts on k = 16.",
        _by_passes(depo, (1, 2, 4)),
        ("loss", "tokens", "difficulty"),
    ),
    "4a": Recipe(
        "GSM-Infinite: a pretrained hybrid learns to sleep, its middle blocks looped",
        "Paper (Jet-Nemotron 2B, L = 2000): from N = 1 to 6, op 6 .742 to .812, op 8 .351 to .388.",
        _on_the_spot("4a"),
        ("tokens", "difficulty"),
        caution=ON_THE_SPOT,
        fine_tuned=_fine_tuned("4a"),
    ),
    "4b": Recipe(
        "GSM-Infinite: a pretrained looped transformer gets memory blocks",
        "Paper (Ouro 1.4B, L = 2000): from N = 1 to 4, op 6 .419 to .615, op 8 .210 to .272.",
        _on_the_spot("4b"),
        ("tokens", "difficulty"),
        caution=ON_THE_SPOT,
        fine_tuned=_fine_tuned("4b"),
    ),
    "5": Recipe(
        "GSM-Infinite: the same under sliding windows",
        "Paper (Ouro 1.4B, L = 512): from N = 1 to 4, op 2 .596 to .905, op 6 .251 to .320.",
        _on_the_spot("5"),
        ("tokens", "difficulty"),
        caution=ON_THE_SPOT,
        fine_tuned=_fine_tuned("5"),
    ),
    "6": Recipe(
        "Training throughput against window and passes",
        "Paper (1.4B parameters, H200, T = 12,000): windows cost almost nothing once L fills the GPU; "
        "throughput goes with 1/N.",
        _speed,
        ("axis",),
        axis="window L (tokens)",
        value="tokens_per_second",
        caution="Whole training steps of a randomly initialised model, one process, activations recomputed; "
        "figures of different machines are not comparable.",
    ),
    "compute-matched": Recipe(
        "Rule 110: N = 4 beside what else the compute could buy",
        "Not in the paper: every baseline gets the training FLOPs of N = 4.",
        _compute_matched(rule110),
        ("flops", "final"),
    ),
    "compute-matched-depo": Recipe(
        "Depo: N = 4 beside what else the compute could buy",
        "Not in the paper: every baseline gets the training FLOPs of N = 4.",
        _compute_matched(depo),
        ("flops", "final"),
    ),
    "sleeps": Recipe(
        "MQAR: accuracy against the number of sleeps since the fact was read",
        "Not in the paper: how long does the memory last? Trained with 4 windows of filler between fact and "
        "question, read with up to 1000.",
        _by_passes(retention, (1, 2, 4)),
        ("axis",),
        axis="sleeps since the fact",
        read=_after_sleeps,
    ),
    "grid": Recipe(
        "Depo: recall load against hop depth",
        "Not in the paper: is it storing many facts or chaining a few that needs passes?",
        _load_by_depth,
        ("grid",),
        axis="facts stored",
    ),
    "passes": Recipe(
        "Depo: passes when trained against passes when read",
        "Not in the paper: can a model be read with another N than it was trained with?",
        _random_passes,
        ("axis", "difficulty"),
        axis="N when read",
        read=_with_other_passes,
    ),
    "cheaper": Recipe(
        "Depo: N = 4 for less",
        "Not in the paper: must all of training pay for N passes through all blocks?",
        _cheaper_passes,
        ("flops", "difficulty"),
    ),
    "rule": Recipe(
        "Depo: the update rule of the fast weights",
        "Not in the paper: does the rule matter, and for which N?",
        _update_rules,
        ("tokens", "difficulty"),
    ),
    "state": Recipe(
        "Depo: the size of the fast weights",
        "Not in the paper: can passes stand in for state, or state for passes?",
        _state_sizes,
        ("difficulty", "final"),
    ),
    "recall": Recipe(
        "Recall: a real language model, and which kinds of question more passes help",
        "Not in the paper: SmolLM2-135M-Instruct, frozen but for its memory layers, reads English, forgets "
        "it and is asked. All have the same training FLOPs here; N = 1, 2, 4 go on from an adapter that was "
        "taught facts in one pass by 990 steps before, LoRA begins with the plain model.",
        recall.cells,
        ("difficulty",),
        together=recall.TOGETHER,
        fine_tuned=recall.fine_tuned,
    ),
    **{name: _depth(name) for name in depth.FOUND},
    **{f"rivals-{task}": _rivals(task) for task in rivals.FOUND},
}
GROUPS = {"rivals": tuple(f"rivals-{task}" for task in rivals.FOUND)}  # recipes that belong together
