import json
import math

import numpy as np
import pytest
import torch
from conftest import lively, tiny

from lmsleep import Cache, Memory, SleepConfig, State, sleep_forward
from lmsleep.cli import main
from lmsleep.evaluation.around_sleep import Shifting, around_sleep
from lmsleep.tasks import Drift, Rule110, batch_rng, hide_answers
from lmsleep.tasks.base import HIDDEN

TASK = Drift(keys=3, values=4, segment=12, segments=2)


def draw(task=TASK, size=50, index=0, split="train"):
    return task.batch(batch_rng(0, split, index), size, split)


# The task


def test_shifts_come_at_any_time_and_change_the_values():
    # Of one key, a pair has a value drawn anew with probability 1/6, which differs in 3 of 4 cases.
    task = Drift(keys=1, values=4, segment=12, segments=5)
    values = draw(task, 800).tokens[:, 1::2]
    assert values.min() == 1 and values.max() == 4
    changed = (values[:, 1:] != values[:, :-1]).double()
    expected, error = 1 / 6 * 3 / 4, (1 / 8 / 800) ** 0.5
    assert torch.all((changed.mean(0) - expected).abs() < 4 * error)
    assert abs(changed.mean() - expected) < 4 * error / 29**0.5


def test_answers_are_the_values_of_keys_seen_since_the_shift():
    batch = draw(size=300)
    asked = batch.answers >= 0
    assert batch.loss_mask.sum() == 300 * 12 and not batch.loss_mask[:, ::2].any()
    assert torch.equal(batch.answers[asked], torch.arange(len(batch.difficulty)))
    first, stale = 0, 0
    for row in range(300):
        last: dict = {}
        times: dict = {}
        for (key, value), (_, number) in zip(
            batch.tokens[row].view(-1, 2).tolist(), batch.answers[row].view(-1, 2).tolist(), strict=True
        ):
            if number >= 0:
                assert last[key] == value and 1 <= batch.difficulty[number] <= min(times[key], 4)
            elif key in last:
                stale += 1
                first += last[key] == value
            if last.get(key, value) != value:
                assert number < 0
            last[key], times[key] = value, times.get(key, 0) + 1
    assert abs(first / stale - 1 / 4) < 4 * (3 / 16 / stale) ** 0.5  # the same by chance


@pytest.mark.parametrize("task", [TASK, Drift(), Drift(keys=1, values=2, segment=4, segments=1)], ids=str)
def test_the_solver_finds_every_answer(task):
    batch = draw(task, 200)
    found = 0
    for row in range(200):
        seen, answers = hide_answers(batch, row)
        assert seen.count(HIDDEN) == len(answers) and task.solve(seen) == answers
        found += len(answers)
    assert found == len(batch.difficulty) > 0


def test_a_segment_with_what_follows_goes_on_in_its_dialect():
    longer = TASK.segments_of(batch_rng(0, "train", 0), 20, more=6)
    assert longer.shape == (20, 2, 18)
    for segment in longer.reshape(40, 9, 2).tolist():
        assert len(dict(segment)) == len({tuple(pair) for pair in segment})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"values": 1}, "values"),
        ({"keys": 0}, "keys"),
        ({"segment": 7}, "even"),
        ({"segments": 0}, "segments"),
    ],
)
def test_what_cannot_drift_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Drift(**options)


# The measure


class Perfect:
    # Remembers the last value of each key in S `[B, 1, keys, values]`, of what it has read before this call.
    # h is the token and what S held for it.

    num_blocks = 1

    def __init__(self, task):
        self.task = task

    def initial_state(self, batch_size):
        S = torch.zeros(batch_size, 1, self.task.keys, self.task.values, dtype=torch.float64)
        return State(Memory((S,)), Cache(((),)))

    def embed(self, tokens):
        return torch.nn.functional.pad(tokens[..., None].double(), (0, self.task.values))

    def run(self, h, state, start, stop, *, valid=None, span=None):
        if start == stop:
            return h, state
        tokens, before = h[..., 0].long(), state.memory.layers[0]
        S = before.clone()
        for row, read in enumerate(tokens.tolist()):
            for key, value in zip(read[::2], read[1::2], strict=False):
                S[row, 0, key] = 0
                S[row, 0, key, value - self.task.keys] = 1
        known = before[torch.arange(len(h))[:, None], 0, tokens.clamp(max=self.task.keys - 1)]
        return torch.cat([h[..., :1], known], dim=-1), State(Memory((S,)), Cache(((),)))

    def head(self, h):
        known = h[..., 1:]
        logits = torch.where(known.any(-1, keepdim=True), 30 * (2 * known - 1), 0.0)
        return torch.nn.functional.pad(logits, (self.task.keys, 0), value=-60.0)


def test_the_measure_of_a_perfect_memory_by_hand():
    # It reads of a probe only what S holds: log2(values) bits for keys that its segment did not show so far,
    # nothing for the others, and 60 nats where the last dialect still stands.
    task = Drift(keys=6, values=4, segment=12, segments=1)
    made = around_sleep(Perfect(task), task, SleepConfig(window=4, passes=2), batches=40, batch_size=8)
    before, awake, after = made.bits.T
    unseen = [2 * (5 / 6) ** n for n in (0, 2, 4, 6)]  # 2 pairs a window
    assert before[0] == pytest.approx(2.0) and np.allclose(before, unseen[:3], atol=0.15)
    assert np.allclose(after, unseen[1:], atol=0.15)
    assert np.allclose(awake, after)
    assert made.tokens.tolist() == [40 * 8 * 2] * 3


def test_the_first_segment_counts_only_where_it_is_the_only_one():
    task = Drift(keys=6, values=4, segment=8, segments=3)
    stale = around_sleep(Perfect(task), task, SleepConfig(window=4), batches=2, batch_size=8)
    assert stale.tokens.tolist() == [2 * 8 * 2 * 2] * 2
    assert stale.bits[0, 0] > 10  # what the last dialect left is worse than nothing


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_what_lies_ahead_is_read_from_the_state_of_the_stream(eviction):
    model = lively(tiny("attention", "gated_delta_net", vocab_size=7))
    sleep = SleepConfig(window=4, passes=3, eviction=eviction)
    task = Drift(keys=3, values=4, segment=8, segments=2)
    made = around_sleep(model, task, sleep, batches=1, batch_size=5, seed=3)
    segments = torch.from_numpy(task.segments_of(batch_rng(3, "test", 0), 5, more=4))
    first, second = segments.unbind(1)
    read = torch.cat([first[:, :8], second[:, :8]], dim=1)
    for s in (0, 1):
        ahead = second[:, 4 * s + 4 : 4 * s + 8]
        states = [
            sleep_forward(model, read[:, : 8 + 4 * s], None, sleep, evict_last=True).state,
            sleep_forward(model, read[:, : 12 + 4 * s], None, sleep).state,
            sleep_forward(model, read[:, : 12 + 4 * s], None, sleep, evict_last=True).state,
        ]
        for column, state in enumerate(states):
            h, _ = model.run(model.embed(ahead), state, 0, 2, span=sleep.eviction.span(4))
            logs = model.head(h).log_softmax(-1)
            picked = logs[:, [0, 2]].gather(-1, ahead[:, [1, 3], None])
            assert made.bits[s, column] == pytest.approx(-picked.mean().item() / math.log(2), rel=1e-5)


@pytest.mark.parametrize("window", [None, 5])
def test_a_segment_must_be_whole_windows(window):
    with pytest.raises(ValueError, match="multiple of the window"):
        around_sleep(Perfect(TASK), TASK, SleepConfig(window=window))


def test_only_tasks_that_shift_are_measured():
    assert isinstance(TASK, Shifting) and not isinstance(Rule110(), Shifting)


def test_eval_shows_the_measure_as_table_and_json(tmp_path, capsys):
    out = tmp_path / "run"
    tiny_run = (
        "--steps 2 --eval-every 2 --eval-batches 1 --batch-size 4 --d-model 16 --num-heads 2 --threads 1"
    )
    main(["train", "drift", "--segment", "16", "--out", str(out), *tiny_run.split()])
    capsys.readouterr()
    main(["eval", str(out), "--batches", "1", "--passes", "1", "2", "--json"])
    passes = json.loads(capsys.readouterr().out)["passes"]
    rows = passes["2"]["around_sleep"]
    assert [row["sleeps"] for row in rows] == [0, 1]
    assert rows[0].keys() == {"sleeps", "before", "awake", "after", "tokens"}
    assert (
        rows[0]["before"]
        == passes["2"]["around_sleep"][0]["before"]
        != passes["1"]["around_sleep"][0]["before"]
    )
    main(["eval", str(out), "--batches", "1"])
    text = capsys.readouterr().out
    line = next(x for x in text.splitlines() if x.split()[:1] == ["1"])
    assert [float(x) for x in line.split()[1:]] == pytest.approx(
        [rows[1][k] for k in ("before", "awake", "after")], abs=6e-4
    )
