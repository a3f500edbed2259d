"""Blocks against passes: equal FLOPs, choices out of the committed search."""

import json
from pathlib import Path

import pytest

from lmsleep.models import HybridLM
from lmsleep.recipes import depth
from lmsleep.recipes.depth import DEPTHS, PROBLEMS, Depth, Found, budget, run
from lmsleep.recipes.searched import RATES
from lmsleep.training import training_flops

SEARCH = Path(__file__).parents[1] / "results/depth-search"
PROBLEM = PROBLEMS["depth"]


@pytest.mark.parametrize(
    "each", [Depth(1, 16, 1), Depth(2, 16, 4), Depth(8, 16, 1), Depth(1, 32, 4)], ids=str
)
def test_no_depth_is_trained_for_more_flops_than_two_blocks_in_four_passes(each):
    flops = budget(PROBLEM)
    config = run(PROBLEM, each, Found(), flops)
    spent = training_flops(config)
    assert flops - spent / config.train.steps < spent <= flops
    assert config.sleep.passes == each.passes and len(config.model.blocks) == 2 * each.pairs


def test_there_are_rows_of_equal_bytes_and_of_equal_parameters():
    def size(each):
        model = HybridLM(run(PROBLEM, each, Found(), flops=1).model)
        return model.initial_state(1).memory.nbytes, sum(p.numel() for p in model.parameters())

    two, eight, wide, four = map(size, (Depth(1, 16, 4), Depth(4, 8, 1), Depth(1, 32, 4), Depth(2, 16, 1)))
    assert two[0] == eight[0]
    assert wide[1] == pytest.approx(four[1], rel=0.05) and wide[1] == pytest.approx(eight[1], rel=0.05)
    assert len(DEPTHS) == len(set(DEPTHS)) and max(2 * d.pairs * d.passes for d in DEPTHS) == 16


@pytest.mark.parametrize("problem", depth.FOUND)
def test_choices_are_the_best_of_the_same_search(problem):
    rows = [json.loads(line) for line in (SEARCH / f"{problem}.jsonl").read_text().splitlines()]
    assert set(depth.FOUND[problem]) == set(DEPTHS)
    for each, chosen in depth.FOUND[problem].items():
        mine = [row for row in rows if Depth(**row["depth"]) == each]
        rates = {row["options"]["lr"] for row in mine}
        assert rates >= {*RATES} and len(mine) == len(rates) + 2
        assert Found(**min(mine, key=lambda row: row["loss"])["options"]) == chosen
