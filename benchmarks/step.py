"""Whole training steps: ours against transformers' modules, passes against one pass, memory."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.peer import Composed
from benchmarks.processor import Processor
from benchmarks.table import Cell, Table
from benchmarks.timing import Times, ms, ratio, take_turns
from lmsleep import HybridConfig, HybridLM, SleepConfig
from lmsleep.flops import flops_of
from lmsleep.recipes.settings import PAIR, depo, rule110
from lmsleep.tasks import Batch, Rule110, Task, batch_rng
from lmsleep.tasks.reading import read_batch
from lmsleep.training import RunConfig, TrainConfig
from lmsleep.training.held import peak_bytes
from lmsleep.training.muon import Muon
from lmsleep.training.optim import optimizers

PASSES = (1, 2, 4)


@dataclass(frozen=True)
class Setting:
    """A task and a model of the paper."""

    task: Task
    model: HybridConfig
    window: int
    batch: int

    def drawn(self) -> Batch:
        """Draw a training batch."""
        return self.task.batch(batch_rng(0, "train", 0), self.batch, "train")

    def made(self) -> HybridLM:
        """Make the model, with random weights."""
        torch.manual_seed(0)
        model = HybridLM(replace(self.model, vocab_size=self.task.vocab_size))
        for name, parameter in model.named_parameters():
            if name.endswith("b_proj.bias"):  # transformers has none
                nn.init.zeros_(parameter)
        return model


def of_the_paper(run: RunConfig, batch: int) -> Setting:
    """Return task, model and window of one of the paper's runs."""
    assert run.sleep.window is not None
    return Setting(run.task, run.architecture, run.sleep.window, batch)


# The paper's batches are 512 and 128. On a CPU activations of the first would take 26 GB at N = 4, a step of
# the second many minutes; FLOPs go with the batch, all but the optimizer's.
AUTOMATON = of_the_paper(rule110("paper", 4), batch=64)
DEPO = of_the_paper(depo("paper", 4), batch=8)
TINY = Setting(Rule110(width=4, states=2), HybridConfig(d_model=16, num_heads=2, blocks=PAIR), 4, 4)
# 128 of Depo would take 77 GB (docs/scale.md).
ON_A_GPU = replace(AUTOMATON, batch=512), replace(DEPO, batch=32)


def tables(repeats: int, tiny: bool, processor: Processor) -> dict[str, Callable[[], Table]]:
    """Return two tables: steps of both models, and the memory of one."""
    automaton, depo = (TINY, TINY) if tiny else ON_A_GPU if processor.gpu else (AUTOMATON, DEPO)
    fewer = replace(automaton, batch=max(2, automaton.batch // 4))
    return {
        "automaton": lambda: steps(processor, automaton, repeats),
        "depo": lambda: steps(processor, depo, repeats),
        "memory": lambda: memory(processor, fewer, repeats),
    }


def steps(processor: Processor, setting: Setting, repeats: int) -> Table:
    """Time forward, backward and optimizer for every N."""
    batch, peak = setting.drawn().to(processor.device), processor.matmul_peak()
    drawing = ms(take_turns({0: setting.drawn}, 3)[0].cpu)
    calls: dict[tuple[str, int], Callable[[], None]] = {}
    gradients: dict[tuple[str, int], Times] = {}  # of each step, forward and backward alone
    sides: Any = (
        ("ours", setting.made(), ours, Muon),
        ("peer", Composed(setting.made()), peer, torch.optim.Muon),
    )
    for name, model, loss, muon in sides:
        model.to(processor.device)
        for n in PASSES:
            one = processor.within(partial(loss, model, batch, setting.window, n))
            gradients[name, n] = Times()
            calls[name, n] = _step(model, one, muon, gradients[name, n])
    counted = {n: flops_of(calls["ours", n]) for n in PASSES}
    spent = {case: processor.seconds(times) for case, times in take_turns(calls, repeats).items()}
    alone = {case: processor.seconds(times)[-repeats:] for case, times in gradients.items()}
    peak = max(peak, processor.matmul_peak())  # neighbours come and go in these minutes
    tokens = batch.tokens.numel()
    rows: list[dict[str, Cell]] = [
        {
            "N": n,
            f"{processor.clock} ms a step": ms(spent["ours", n]),
            "of transformers' modules": ms(spent["peer", n]),
            "times as fast": ratio(spent["peer", n], spent["ours", n]),
            "without the optimizer": ratio(alone["peer", n], alone["ours", n]),
            "to N = 1": ratio(spent["ours", n], spent["ours", 1]),
            "tokens/s": tokens / (ms(spent["ours", n]) / 1e3),
            "GFLOP": counted[n] / 1e9,
            "% of the matrix product's rate": 100 * counted[n] / peak / (ms(spent["ours", n]) / 1e3),
            "drawing the batch, % of a step": 100 * drawing / ms(spent["ours", n]),
        }
        for n in PASSES
    ]
    note = (
        "A training step (forward, backward, Muon and AdamW; the peer has torch.optim.Muon) on "
        f"{setting.batch} sequences of {batch.tokens.shape[1]} tokens of "
        f"{type(setting.task).__name__}, L = {setting.window}, "
        f"{len(setting.model.blocks)} blocks of width {setting.model.d_model}, {processor.text}: medians "
        f"of {repeats} repeats that took turns; ratios within a repeat: median [10th ... 90th percentile]. "
        "GFLOP: matrix products of the whole step; the matrix product's rate: "
        f"{peak / 1e9:.0f} GFLOP/s, measured here."
    )
    return Table(rows=rows, note=note)


def memory(processor: Processor, setting: Setting, repeats: int) -> Table:
    """Measure bytes of activations, with and without recomputing them, and what recomputing costs."""
    model, batch = setting.made().to(processor.device), setting.drawn().to(processor.device)
    cases = {
        (n, kept): processor.within(partial(ours, model, batch, setting.window, n, checkpoint=not kept))
        for n in PASSES
        for kept in (True, False)
    }
    calls = {case: _backward(model, loss) for case, loss in cases.items()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # not counted
    peaks = {case: peak_bytes(call) for case, call in calls.items()}
    spent = {case: processor.seconds(times) for case, times in take_turns(calls, repeats).items()}
    rows: list[dict[str, Cell]] = [
        {
            "N": n,
            "activations": "kept" if kept else "recomputed (checkpoint)",
            "peak, MB": peaks[n, kept] / 1e6,
            "to N = 1": peaks[n, kept] / peaks[1, kept],
            f"{processor.clock} time to kept": ratio(spent[n, kept], spent[n, True]),
        }
        for n, kept in cases
    ]
    note = (
        f"Most bytes of tensors alive at once in the forward and backward pass on {setting.batch} "
        f"sequences of {batch.tokens.shape[1]} tokens, weights and their gradients left out; "
        f"L = {setting.window}, {len(setting.model.blocks)} blocks of width {setting.model.d_model}, "
        f"{processor.text}, {repeats} repeats."
    )
    return Table(rows=rows, note=note)


def ours(model: HybridLM, batch: Batch, window: int, passes: int, *, checkpoint: bool = False) -> Tensor:
    """Return the loss of a batch in nats."""
    loss = read_batch(model, batch, SleepConfig(window=window, passes=passes), checkpoint=checkpoint).loss
    assert loss is not None
    return loss


def peer(model: Composed, batch: Batch, window: int, passes: int) -> Tensor:
    """Return the same by transformers' modules."""
    assert batch.loss_mask is not None
    return model.loss(batch.tokens, batch.loss_mask, window, passes)


def _step(model: nn.Module, loss: Callable[[], Tensor], muon: Any, gradients: Times) -> Callable[[], None]:
    own, adam = optimizers(cast(HybridLM, model), TrainConfig(lr=1e-4, adam_lr=1e-4))
    both = muon(own.param_groups[0]["params"], lr=1e-4, weight_decay=0.0), adam

    def step() -> None:
        gradients.add(lambda: loss().backward())
        for each in both:
            each.step()
            each.zero_grad()

    return step


def _backward(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    def call() -> None:
        loss().backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.zero_()

    return call
