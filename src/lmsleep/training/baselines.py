"""What a sleeping run is compared with: each baseline differs from it in the one thing it names."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

from lmsleep.models import BlockKind, HybridConfig
from lmsleep.sleep import GradientSteps, Hard, Passes, SleepConfig, Sliding
from lmsleep.training.compute import flops_per_step, training_flops
from lmsleep.training.config import RunConfig


def baseline(name: str, run: RunConfig) -> RunConfig:
    """Make the baseline `name` (a key of `BASELINES`) of a run that sleeps N passes.

    Task, batch, seed and learning rates stay; tune the rates where a comparison hangs on them.

    Raises:
        ValueError: for an unknown name, or a run that the baseline cannot be made from.
    """
    if name not in BASELINES:
        raise ValueError(f"baseline={name!r} is unknown; choose one of {', '.join(BASELINES)}")
    return BASELINES[name](run)


def transformer_cached(run: RunConfig) -> RunConfig:
    """A transformer that keeps its whole key-value cache."""
    return _transformer(run, replace(_one_pass(run.sleep), window=None))


def transformer_evicted(run: RunConfig) -> RunConfig:
    """A transformer under the same hard eviction: it has no fast weights, so nothing crosses."""
    return _transformer(run, replace(_one_pass(run.sleep), eviction=Hard()))


def transformer_sliding(run: RunConfig) -> RunConfig:
    """A transformer in which a token sees the last L tokens."""
    return _transformer(run, replace(_one_pass(run.sleep), eviction=Sliding()))


def test_time_training(run: RunConfig) -> RunConfig:
    """An evicted transformer that takes one gradient step on every window before it forgets it.

    What it trains are the feed-forward layers of the blocks that held fast weights; where such a block has
    none it gets one, of the usual size.
    """
    held = [i for i, kind in enumerate(run.architecture.blocks) if kind != "attention"]
    if not held:
        raise ValueError(
            "blocks: test-time training trains the blocks that held fast weights, there are none"
        )
    options = run.architecture.overrides
    trained: dict[int, dict[str, Any]] = {}
    for i in held:
        trained[i] = {**options.get(i, {}), "trained_mlp": True}
        # The gradient step needs a feed-forward layer to change, and this block was built without one.
        if not run.architecture.for_block(i).hidden_dim:
            trained[i]["mlp_dim"] = None  # the usual size
    evicted = transformer_evicted(run)
    return replace(
        evicted,
        model=replace(evicted.architecture, overrides={**options, **trained}),
        # N counts the wake pass too: two passes are one gradient step.
        sleep=replace(evicted.sleep, consolidator=GradientSteps(2)),
        train=replace(evicted.train, checkpoint=False),  # a gradient step is not a pass
    )


def one_pass(run: RunConfig) -> RunConfig:
    """The same hybrid with N = 1, for as many tokens."""
    return _read_only(run, _one_pass(run.sleep))


def one_pass_longer(run: RunConfig) -> RunConfig:
    """N = 1 for as many training FLOPs, spent on more steps."""
    return equal_compute(one_pass(run), run)


def one_pass_deeper(run: RunConfig) -> RunConfig:
    """N = 1 for as many training FLOPs, spent on depth: more of the pattern of blocks, whole each time."""
    blocks = run.architecture.blocks
    # (attention, memory) of six such pairs: part of a pattern would be another kind of model.
    lengths = (n for n in range(1, len(blocks) + 1) if blocks[:n] * (len(blocks) // n) == blocks)
    pattern = blocks[: next(lengths)]
    return _grown(run, lambda size: replace(run.architecture, blocks=blocks + pattern * (size - 1)))


def one_pass_wider(run: RunConfig) -> RunConfig:
    """N = 1 for as many training FLOPs, spent on width: more heads of the same size."""
    model = run.architecture
    # Heads are added a whole group at a time, or the query heads would no longer divide among the key heads.
    group = model.num_heads // (model.num_kv_heads or model.num_heads)  # query heads of a key head

    def wider(size: int) -> HybridConfig:
        heads = model.num_heads + (size - 1) * group
        return replace(
            model,
            d_model=model.d_model * heads // model.num_heads,
            num_heads=heads,
            num_kv_heads=heads // group,
            # Said outright, not left to a default made of d_model: a head must keep its size, and so its S.
            head_dim=model.key_dim,
            mlp_dim=None if model.mlp_dim is None else model.mlp_dim * heads // model.num_heads,
        )

    return _grown(run, wider)


def looped_awake(run: RunConfig) -> RunConfig:
    """The N passes made while awake, on every token that is read or predicted (a looped hybrid)."""
    # With one pass asleep there is nothing left to reset, and Passes would carry an option without effect.
    looped = replace(_in_passes(run.sleep), passes=1, reset=None, wake_passes=run.sleep.passes)
    return _read_only(run, replace(run.sleep, consolidator=looped))


def reset_S(run: RunConfig) -> RunConfig:
    """N passes that hand on h alone: each begins with S as before the window."""
    return replace(run, sleep=replace(run.sleep, consolidator=replace(_in_passes(run.sleep), reset="S")))


def reset_h(run: RunConfig) -> RunConfig:
    """N passes that hand on S alone: each begins with what entered the loop."""
    # Both act on the h that a pass hands on, which is what this baseline takes away.
    alone = replace(_in_passes(run.sleep), reset="h", normalize=False, reinject=False)
    return replace(run, sleep=replace(run.sleep, consolidator=alone))


# Keys are names on the command line; the docstrings of the functions are its help.
BASELINES: dict[str, Callable[[RunConfig], RunConfig]] = {
    make.__name__.replace("_", "-"): make
    for make in (
        transformer_cached,
        transformer_evicted,
        transformer_sliding,
        test_time_training,
        one_pass,
        one_pass_longer,
        one_pass_deeper,
        one_pass_wider,
        looped_awake,
        reset_S,
        reset_h,
    )
}


def equal_compute(run: RunConfig, other: RunConfig) -> RunConfig:
    """Give `run` as many steps as cost the training FLOPs of `other` (rounded down, at least 1)."""
    return for_flops(run, training_flops(other))


def for_flops(run: RunConfig, flops: int) -> RunConfig:
    """Give `run` as many steps as so many training FLOPs pay (rounded down, at least 1)."""
    # Rounded down, so that a baseline spends no more than the run that it is compared with, but for what
    # samples of other lengths cost beside those that the estimate has seen.
    steps = math.floor(flops / flops_per_step(run))
    return replace(run, train=replace(run.train, steps=max(steps, 1)))


def _in_passes(sleep: SleepConfig) -> Passes:
    """Return the consolidator of a sleep that must be one in passes."""
    if not isinstance(sleep.consolidator, Passes):
        raise ValueError(f"consolidator={sleep.consolidator}: this baseline is of a sleep in passes")
    return sleep.consolidator


def _one_pass(sleep: SleepConfig) -> SleepConfig:
    """Return the sleep with N = 1 and the loop that it had, without all other options of passes."""
    by = sleep.consolidator
    return replace(sleep, consolidator=Passes(loop=by.loop) if isinstance(by, Passes) else Passes())


def _read_only(run: RunConfig, sleep: SleepConfig) -> RunConfig:
    """Return the run with a sleep of one pass, through which gradients always flow."""
    # A limit larger than N is refused, so that of a run with more passes cannot stay.
    return replace(run, sleep=sleep, train=replace(run.train, backprop_passes=None))


def _transformer(run: RunConfig, sleep: SleepConfig) -> RunConfig:
    """Return the run with an attention block in the place of every block, and no memory tokens."""
    blocks: list[BlockKind] = ["attention" for _ in run.architecture.blocks]
    model = replace(run.architecture, blocks=tuple(blocks), memory_tokens=0)
    # At once, for the model with the sleep that the run had, or the other way round, might not fit.
    return replace(run, model=model, sleep=sleep, train=replace(run.train, backprop_passes=None))


def _grown(run: RunConfig, model: Callable[[int], HybridConfig]) -> RunConfig:
    """Return N = 1 with the largest of `model(2), model(3), ...` whose step costs no more than one of `run`.

    What is left of the FLOPs goes into steps. Raises ValueError where none costs so little.
    """
    if run.architecture.overrides:
        raise ValueError("overrides: a larger model leaves open which of its blocks they are for")
    limit, largest = flops_per_step(run), one_pass(run)
    # Size 1 is the run itself, which fits: N = 1 costs less than N passes. Each size costs more than the one
    # before, so the first that is too dear ends the search.
    for size in count(2):
        larger = replace(largest, model=model(size))
        if flops_per_step(larger) > limit:
            break
        largest = larger
    if largest.model == run.model:
        raise ValueError(
            f"passes={run.sleep.passes} cost less than any larger model in one pass: compare with "
            "one-pass-longer, or more passes"
        )
    return equal_compute(largest, run)
