"""fla's kernels in the passes of a sleep, and ours in PyTorch, against the definition in float64."""

from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from benchmarks.gpu.part import Disagrees, Try
from benchmarks.processor import has_kernels
from benchmarks.table import Cell, Table
from lmsleep import HybridConfig, HybridLM, SleepConfig, sleep_forward
from lmsleep.models import BlockKind
from lmsleep.ops import Backend

RULES: tuple[BlockKind, ...] = ("gated_delta_net", "kda")
PASSES = (1, 2, 4)
# Sequences, tokens, window: the automaton's, Depo's, whole chunks of the kernels, and a ragged one.
SHAPES = ((8, 101, 24), (2, 375, 75), (2, 256, 64), (1, 200, 130))
HEADS, HEAD = 2, 64  # those of the CUDA tests, which then find the kernels compiled
EXACT = 1e-4  # of the chunk-parallel form in float32, gradients through four passes included
# TF32, in which the kernels multiply float32, has more digits than bfloat16: so in both precisions they are
# held to what our form does to bfloat16, where all but the recurrence rounds alike.
TIMES = 2.0


def kernels(run: Try) -> Table:
    """Compare logits of the last window, the fast weights that it found, and all gradients.

    Raises:
        Disagrees: if an error is larger than it may be.
    """
    shapes = ((2, 10, 4),) if run.tiny else SHAPES
    size = HybridConfig(vocab_size=64, d_model=HEADS * (16 if run.tiny else HEAD), num_heads=HEADS)
    fla = run.processor.gpu and has_kernels()
    rows = list[dict[str, Cell]]()
    table = Table(rows=rows, note=_note(run, fla))
    for rule, shape in product(RULES, shapes):
        for n in PASSES:
            config = replace(size, blocks=("attention", rule), mlp_dim=size.d_model)
            rows.append(_row(run, config, shape, n, fla))
        print(f"    {rule}, {' x '.join(map(str, shape[:2]))} tokens, L = {shape[2]}", flush=True)
        run.keep(table)
    if wrong := [row for row in rows if row["agrees"] != "yes"]:
        raise Disagrees(f"{len(wrong)} of {len(rows)} cases differ by more than they may, first {wrong[0]}")
    return table


def _row(run: Try, config: HybridConfig, shape: tuple[int, int, int], n: int, fla: bool) -> dict[str, Cell]:
    reads = partial(_read, run, config, shape, n)
    expected = reads("reference", double=True)
    forms: tuple[Backend, ...] = ("chunked", "fla") if fla else ("chunked",)
    row: dict[str, Cell] = {
        "rule": config.blocks[1],
        "B x T": f"{shape[0]} x {shape[1]}",
        "L": shape[2],
        "N": n,
    }
    worst = dict[tuple[str, bool], float]()
    for low, form in product((False, True) if run.processor.gpu else (False,), ("chunked", "fla")):
        name = f"{'PyTorch' if form == 'chunked' else 'fla'}, {'bfloat16' if low else 'float32'}"
        row |= {name: None, f"{name}, gradients": None}
        if form in forms:
            logits, S, gradients = map(_error, reads(form, low=low), expected)
            row |= {name: max(logits, S), f"{name}, gradients": gradients}
            worst[form, low] = max(logits, S, gradients)
    held = max(EXACT, TIMES * worst.get(("chunked", True), 0.0))
    # Written so that NaN does not agree.
    agrees = worst["chunked", False] <= EXACT and all(
        w <= held for (form, _), w in worst.items() if form == "fla"
    )
    return {**row, "agrees": "yes" if agrees else "no"}


def _read(
    run: Try,
    config: HybridConfig,
    shape: tuple[int, int, int],
    n: int,
    backend: Backend,
    *,
    double: bool = False,
    low: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits of the last window, its fast weights, and all gradients, as vectors in float64."""
    B, T, L = shape
    device = run.processor.device
    torch.manual_seed(0)
    model = HybridLM(replace(config, backend=backend))
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():  # gates that begin at zero would hide errors
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=rng) * (0.5 * p.shape[-1] ** -0.5 if p.ndim > 1 else 0.2))
    model = model.to(device, torch.float64 if double else torch.float32)
    tokens = torch.randint(config.vocab_size, (B, T), generator=rng).to(device)
    last = torch.arange(T, device=device).expand(B, T) >= (T - 1) // L * L
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low):
        out = sleep_forward(model, tokens, last, SleepConfig(window=L, passes=n))
    assert out.loss is not None and out.logits is not None
    out.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    memories = [S.detach() for S in out.memory.S if S is not None]
    return _vector([out.logits.detach()[last]]), _vector(memories), _vector(gradients)


def _vector(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.double().flatten() for x in tensors])


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def _note(run: Try, fla: bool) -> str:
    there = "" if fla else " flash-linear-attention is not installed: its columns are empty."
    return (
        "Errors of a sleeping model of an attention and a fast-weight block against the token-by-token "
        "definition in float64, on one set of weights: of logits or fast weights, whichever is larger, and "
        "of the gradients of all parameters through every pass and window (norm of the difference over the "
        f"norm). {HEADS} heads of {HEAD}. It agrees if PyTorch in float32 is within {EXACT:g}, and fla in "
        f"both precisions within {TIMES:g} times what PyTorch does in bfloat16 (autocast): it multiplies "
        f"float32 in TF32.{there}"
    )
