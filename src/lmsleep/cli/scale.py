"""`lmsleep info MODEL --gpus K`: a training step on K GPUs, from what was said on the command line."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from lmsleep.backbones import Model
from lmsleep.recipes.table import as_text
from lmsleep.sleep import SleepConfig
from lmsleep.training import RunConfig, TrainConfig
from lmsleep.training.batches import draw
from lmsleep.training.scale import Cluster, Layout, Plan, rows_of_text
from lmsleep.training.start import trained_weights

# What `info` has options for, beside the number of GPUs and how many of them share one copy.
TRAINING = ("batch", "length", "accumulate", "backprop_passes", "checkpoint")
CLUSTER = ("flops", "gpu_memory", "node", "bandwidth", "between", "latency")
GPUS, PASSES = (1, 8, 64), (1, 2, 4)  # of the table, beside those asked for
ROWS, TOKENS = 64, 4096  # of a step, where no run says


def training_plan(
    gpus: int, shard: int, said: Mapping[str, Any], run: RunConfig | None, model: Model, sleep: SleepConfig
) -> dict[str, Any]:
    """Plan a step of a run, or of a model on rows of text.

    Args:
        gpus: K.
        shard: S.
        said: by the names of `TRAINING` and `CLUSTER`.
        run: whose batches and training these are; None: rows of text, with the defaults of training.
        model: its model.
        sleep: how it sleeps.

    Raises:
        ValueError: for what cannot be, or fits on no number of GPUs of a memory that was named.
    """
    layout = Layout(gpus, shard)
    train = run.train if run is not None else TrainConfig(batch_size=ROWS)
    given = {name: said[name] for name in ("accumulate", "backprop_passes", "checkpoint") if name in said}
    train = replace(train, batch_size=said.get("batch", train.batch_size), **given)
    if (limit := train.backprop_passes or 1) > sleep.passes:
        raise ValueError(f"backprop_passes must lie in 1 ... passes={sleep.passes}, got {limit}")
    if run is None or "length" in said:
        batch = rows_of_text(train.batch_size, said.get("length", TOKENS))
    else:
        batch = draw(replace(run, train=replace(train, curriculum=0)), 0)
    assumed = {name: said[name] for name in CLUSTER if name in said}
    if "gpu_memory" in assumed:
        assumed["memory"] = 1e9 * assumed.pop("gpu_memory")
    cluster, bfloat16 = Cluster(**assumed), train.precision != "float32"
    plan = Plan(trained_weights(model, train), train, sleep, batch, cluster, bfloat16=bfloat16)
    step = plan.step(layout, sleep.passes)
    least = plan.least(shard, sleep.passes)
    if least is None and "gpu_memory" in said:
        fewest = plan.rows // shard * shard  # rows a GPU
        needs = plan.step(Layout(fewest, shard), sleep.passes)["memory_bytes"]
        raise ValueError(
            f"--gpu-memory {said['gpu_memory']:g}: a step takes {needs / 1e9:,.3g} GB, even on "
            f"{fewest} GPUs; choose a larger --shard, --checkpoint True or a shorter --window"
        )
    counts = [k for k in sorted({*GPUS, gpus}) if k <= plan.rows and not k % min(shard, k)]
    layouts = [Layout(k, min(shard, k)) for k in counts]
    return {
        "rows": plan.rows,
        "tokens": int(batch.tokens.shape[1] + (0 if batch.context is None else batch.context.shape[1])),
        "window": sleep.window,
        "bfloat16": bfloat16,
        "checkpoint": train.checkpoint,
        "assumed": asdict(cluster),
        "optimizer_bytes": plan.weights.optimizer_bytes,
        "step": step,
        "least_gpus": least,
        "steps": [plan.step(each, n) for each in layouts for n in sorted({*PASSES, sleep.passes})],
    }


def as_page(found: Mapping[str, Any]) -> str:
    """Return a plan as text."""
    step, assumed = found["step"], found["assumed"]
    held = ", ".join(f"{name} {size / 1e9:,.2f}" for name, size in step["memory"].items() if size)
    fits = "no number of GPUs" if found["least_gpus"] is None else f"{found['least_gpus']:,} GPUs on"
    return PAGE.format_map(
        {
            **found,
            **assumed,
            "attained": assumed["flops"],
            **step,
            "all_rows": found["rows"],
            "how": "a copy each" if step["shard"] == 1 else f"a copy on {step['shard']} together",
            "kind": "bfloat16" if found["bfloat16"] else "float32",
            "recomputed": ", activations recomputed" if found["checkpoint"] else "",
            "gb": step["memory_bytes"] / 1e9,
            "of_gb": assumed["memory"] / 1e9,
            "held": held,
            "from_": f"from {fits}" if found["least_gpus"] else f"on {fits}",
            "table": as_text(lines(found)),
        }
    )


def lines(found: Mapping[str, Any]) -> list[list[str]]:
    """Return the steps of a plan as the lines of a table."""
    rows = [
        ["GPUs", "N", "rows a GPU", "GB a GPU", "fits", "TFLOP a GPU", "collectives", "GB sent by a GPU",
         "seconds", "communication", "efficiency"]
    ]  # fmt: skip
    for step in found["steps"]:
        gpus = f"{step['gpus']}" if step["shard"] == 1 else f"{step['gpus']}, sharded {step['shard']}"
        rows.append(
            [
                gpus,
                f"{step['passes']}",
                f"{step['rows']}",
                f"{step['memory_bytes'] / 1e9:,.1f}",
                "yes" if step["fits"] else "no",
                f"{(step['flops'] + step['muon_flops']) / 1e12:,.4g}",
                f"{step['collectives']}",
                f"{step['sent_bytes'] / 1e9:,.3g}",
                f"{step['seconds']:,.3g}",
                f"{step['communication_seconds'] / step['seconds']:.1%}",
                f"{step['efficiency']:.1%}",
            ]
        )
    return rows


PAGE = """
training on {gpus:,} GPUs, {how}: {all_rows:,} rows of {tokens:,} tokens, L = {window},
N = {passes}, {kind}{recomputed}
memory a GPU             {gb:,.1f} GB of {of_gb:g}, in GB: {held}
a step fits              {from_}
a GPU's FLOPs            {flops:,} forward and backward, {muon_flops:,} of Muon
collectives a step       {collectives:,}, {sent_bytes:,} bytes sent by a GPU, whatever N
a step                   {seconds:.3g} s: computing {compute_seconds:.3g}, sending {communication_seconds:.3g}

{table}

assumed: a GPU attains {attained:.3g} FLOP/s and sends {bandwidth:.3g} bytes/s
within its node of {node}, {between:.3g} to others; a collective takes {latency:g} s at least
"""
