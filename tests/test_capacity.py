import json
from dataclasses import astuple

import numpy as np
import pytest
from benchmarks import __main__ as benchmarks
from benchmarks import capacity
from conftest import tiny

from lmsleep import SleepConfig
from lmsleep.cli import main
from lmsleep.evaluation.capacity import Speed, Traffic, Turn, plan, waits
from lmsleep.evaluation.cost import cost


@pytest.mark.parametrize(("read", "written", "window"), [(300, 100, 512), (40, 400, 64), (2000, 30, 256)])
def test_the_moments_of_a_turn_are_those_of_turns_that_are_drawn(read, written, window):
    traffic, speed = Traffic(users=1, tokens_read=read, tokens_written=written), Speed(token=0.01, sleep=3)
    rng, n = np.random.default_rng(0), 400_000
    r, w, begun = rng.exponential(read, n), rng.exponential(written, n), rng.uniform(0, window, n)
    before = np.floor((begun + r) / window)
    after = speed.sleep * (np.floor((begun + r + w) / window) - before)
    answer = (r + w) * speed.token + before * speed.sleep
    found = (
        answer.mean(),
        (answer**2).mean(),
        after.mean(),
        (after**2).mean(),
        after[after > 0].mean(),
    )
    assert astuple(Turn.of(traffic, speed, window)) == pytest.approx(found, rel=0.02)


def test_a_window_that_never_ends_asks_for_no_sleep():
    turn = Turn.of(Traffic(users=1), Speed(token=0.01, sleep=3), None)
    assert turn.answer == pytest.approx(400 * 0.01) and turn.later == turn.sleep == 0
    assert waits(turn, 0.1)["slept_seconds"] == 0


def test_a_machine_that_is_simulated_waits_as_the_formulas_say():
    for row in capacity.simulated(1, 60_000).rows:
        assert row["simulated"] == pytest.approx(row["load, formula"], rel=0.03)
        for asked, answered, error in (
            ("a turn, s, formula", "turn, simulated", 0.05),
            ("slept after, s, formula", "slept, simulated", 0.25),
        ):
            assert float(row[answered].split()[0]) == pytest.approx(row[asked], rel=error), row


def test_more_users_need_more_machines_and_none_is_overloaded():
    costs = cost(tiny(), SleepConfig(window=16, passes=4))
    speed = Speed.of(costs, 1e8)
    plans = [plan(costs, Traffic(users=10**n), speed) for n in range(2, 7)]
    machines = [found["machines"] for found in plans]
    assert machines == sorted(machines) and machines[-1] > 100
    for found in plans:
        assert found["load"] <= 0.7 and 0 < found["turn_seconds"] < float("inf")
        assert found["awake_seconds"] + found["sleep_seconds"] + found["idle_seconds"] == pytest.approx(
            86_400
        )
        assert found["disk_bytes_a_user"] == costs["fast_weight_bytes"] + 8 * 16
    assert plans[-1]["disk_bytes"] == 10**6 * plans[-1]["disk_bytes_a_user"]
    assert waits(Turn.of(Traffic(users=1), speed, 16), 1e9)["turn_seconds"] == float("inf")


def test_info_plans_for_users(capsys):
    main(["info", "depo-N4", "--users", "1000", "--flops", "1e9", "--turns", "5", "--json"])
    found = json.loads(capsys.readouterr().out)["plan"]
    assert (found["users"], found["turns"], found["machines"]) == (1000, 5, 1)
    main(["info", "depo-N4", "--users", "1000", "--flops", "1e9"])
    assert "for 1,000 users, 20 turns a day each: 300 tokens read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--turns", "3"], "--turns plans for --users"),
        (["--users", "0"], "users must be above 0"),
        (["--users", "5", "--flops", "0"], "flops must be above 0"),
        (["--users", "5", "--busy", "1"], "busy must lie between 0 and 1"),
        (["--users", "5", "--peak", "0.5"], "peak must lie in 1 ... 24"),
        (["--users", "5", "--tokens-read", "inf"], "tokens_read must be above 0"),
    ],
)
def test_plans_that_cannot_be_made_are_refused(given, said, capsys):
    with pytest.raises(SystemExit) as left:
        main(["info", "depo-N4", *given])
    assert left.value.code == 2 and said in capsys.readouterr().err


def test_the_benchmark_runs(capsys):
    benchmarks.main(["capacity", "--tiny", "--repeats", "2"])
    assert "1,000,000" in capsys.readouterr().out
