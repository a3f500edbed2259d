"""All update rules in their chunk-parallel PyTorch form, and transformers' KDA, on the same shapes."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention

from benchmarks.processor import Processor
from benchmarks.table import Cell, Table
from benchmarks.timing import ms, ratio, take_turns
from lmsleep import ops

HEADS = 4
SHAPES = (
    (64, 8, 32),
    (64, 24, 32),
    (4, 512, 64),
    (1, 2000, 64),
)  # sequences, tokens, K = V; the demo's first
# Behind the decorator, which would look for a kernel on the Hub.
peer = getattr(chunk_kimi_delta_attention, "__wrapped__", chunk_kimi_delta_attention)


def tables(repeats: int, tiny: bool, processor: Processor) -> dict[str, Callable[[], Table]]:
    """One table."""
    return {"rules": lambda: rules(processor, SHAPES[:1] if tiny else SHAPES, repeats)}


def rules(processor: Processor, shapes: tuple[tuple[int, int, int], ...], repeats: int) -> Table:
    """Forward, and forward with backward, of each rule on each of `shapes` `(B, T, K)`."""
    rows = [row for shape in shapes for row in _rows(processor, *shape, repeats)]
    note = (
        f"All update rules, float32, {HEADS} heads, {'one GPU. Its' if processor.gpu else 'one thread. CPU'} "
        f"time, medians of {repeats} repeats that took turns; ratios of two calls in the same repeat: median "
        "[10th ... 90th percentile]."
    )
    return Table(rows=rows, note=note)


def inputs(rule: str, B: int, T: int, K: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """Random q, k, v, g, beta and S of a rule."""
    rng = torch.Generator().manual_seed(0)
    sizes = ops.find_rule(rule).sizes(K, K)

    def rand(*shape: int) -> Tensor:
        return torch.rand(B, T, HEADS, *shape, generator=rng)

    q, k, v = (torch.randn(B, T, HEADS, K, generator=rng) for _ in "qkv")
    S = torch.randn(B, HEADS, *sizes.state, generator=rng)
    x = [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, -0.1 * rand(*sizes.g), rand(*sizes.beta), S]
    return [y.to(device).requires_grad_() for y in x]


def _rows(processor: Processor, B: int, T: int, K: int, repeats: int) -> list[dict[str, Cell]]:
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for name in (*ops.RULES, "kda by transformers"):
        rule = name.removesuffix(" by transformers")
        x = inputs(rule, B, T, K, processor.device)
        form = _theirs if rule != name else partial(_ours, rule)
        weights = [torch.randn_like(y) for y in form(x)]
        calls[name, "forward"] = partial(_forward, form, x)
        calls[name, "both"] = partial(_both, form, x, weights)
    spent = {case: processor.seconds(times) for case, times in take_turns(calls, repeats).items()}
    base = next(iter(ops.RULES))
    return [
        {
            "B x T": f"{B} x {T}",
            "K = V": K,
            "rule": name,
            "forward, ms": ms(spent[name, "forward"]),
            "with backward, ms": ms(spent[name, "both"]),
            f"to {base}": ratio(spent[name, "both"], spent[base, "both"]),
        }
        for name, way in calls
        if way == "both"
    ]


Form = Callable[[list[Tensor]], tuple[Tensor, Tensor]]


def _ours(rule: str, x: list[Tensor]) -> tuple[Tensor, Tensor]:
    return ops.update(rule, *x[:5], initial_state=x[5], backend="chunked")


def _theirs(x: list[Tensor]) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = peer(*x[:5], initial_state=x[5], output_final_state=True)
    return result


def _forward(form: Form, x: list[Tensor]) -> None:
    with torch.no_grad():
        form(x)


def _both(form: Form, x: list[Tensor], weights: list[Tensor]) -> None:
    torch.autograd.grad(form(x), x, weights)
