"""Blocks against passes: what does depth asleep buy that depth awake does not?

Pairs of (attention, Gated DeltaNet) blocks, read in N passes, at equal training FLOPs; every depth has the
rate, the start of its convolution and the curriculum that the same small search found for it
(`tools/depth.py` writes the trials to results/depth-search).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from lmsleep.models import HybridConfig
from lmsleep.recipes.recipe import Cell
from lmsleep.recipes.searched import LONGER, RATES, check_scale, paid, trained_longer
from lmsleep.recipes.settings import DEPO, PAIR, Scale
from lmsleep.sleep import SleepConfig
from lmsleep.training import RunConfig, TrainConfig, training_flops


@dataclass(frozen=True)
class Depth:
    """What is compared: `pairs` of blocks with four heads of `head_dim`, and N `passes`."""

    pairs: int
    head_dim: int
    passes: int

    @property
    def label(self) -> str:
        """Say it in a table."""
        return f"{2 * self.pairs} blocks, heads of {self.head_dim}, N = {self.passes}"


@dataclass(frozen=True)
class Found:
    """What is searched: Muon's rate, the older taps at the start, the curriculum's share of the steps."""

    lr: float = RATES[0]
    conv_init: float = 0.0
    curriculum: float = 0.35


@dataclass(frozen=True)
class Problem:
    """A pointer chase through half a cycle of `nodes`, at the FLOPs of `steps` steps of two blocks, N = 4."""

    nodes: int
    steps: int


# Half of the edges in a window, so that no window holds a chain. Three hops are more than two blocks make
# awake, four are two doublings, six more than four blocks were seen to make.
PROBLEMS = {"depth": Problem(6, 500), "depth-8": Problem(8, 1000), "depth-12": Problem(12, 3000)}
# The most passes for each number of pairs: up to 16 blocks in a row.
MOST = {1: 8, 2: 4, 4: 2, 8: 1}
# Heads of 16 throughout; then the bytes and nearly the parameters of two blocks for eight, and more of both.
DEPTHS = (
    *(Depth(pairs, 16, n) for pairs, most in MOST.items() for n in (1, 2, 4, 8) if n <= most),
    Depth(1, 32, 4),
    Depth(4, 8, 1),
)
# By problem and depth, the best of the committed trials; a problem without them has no recipe.
FOUND: dict[str, dict[Depth, Found]] = {}


def run(problem: Problem, depth: Depth, found: Found, flops: int) -> RunConfig:
    """Return a run of a depth for so many training FLOPs."""
    return paid(_run(problem, depth, found), flops, found.curriculum)


def budget(problem: Problem) -> int:
    """Return the training FLOPs that every depth has: those of two blocks in four passes."""
    return training_flops(_run(problem, Depth(1, 16, 4), Found()))


def _run(problem: Problem, depth: Depth, found: Found) -> RunConfig:
    nodes = problem.nodes
    # Six nodes of six names make 120 cycles, few enough to be learned by heart; of eight names 3,360.
    names = max(nodes, 8)
    return RunConfig(
        task=replace(DEPO, nodes=nodes, names=names, queries=nodes, hops=nodes // 2),
        model=HybridConfig(
            d_model=64,
            num_heads=4,
            head_dim=depth.head_dim,
            blocks=depth.pairs * PAIR,
            mlp_dim=0,
            forget=(0.001, 0.001),
            conv_init=found.conv_init,
        ),
        sleep=SleepConfig(window=nodes, passes=depth.passes),
        train=TrainConfig(
            batch_size=64, steps=problem.steps, lr=found.lr, adam_lr=0.02, save_every=250, threads=1
        ),
    )


def cells(name: str) -> Callable[[Scale], list[Cell]]:
    """Return every depth on a problem, and those of one pass for longer."""

    def made(scale: Scale) -> list[Cell]:
        check_scale(scale, name, "tools/depth.py")
        problem, chosen = PROBLEMS[name], FOUND[name]
        flops, found = budget(problem), list[Cell]()
        for depth in DEPTHS:
            choice, at = chosen[depth], 2 * depth.pairs * depth.passes
            line = f"{2 * depth.pairs} blocks, heads of {depth.head_dim}"
            found.append(Cell(depth.label, run(problem, depth, choice, flops), at=at, line=line))
            if depth.passes == 1 and depth.pairs > 1:
                longer = run(problem, depth, choice, LONGER * flops)
                found.append(trained_longer(depth.label, longer, at))
        return found

    return made
