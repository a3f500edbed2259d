"""Whether the formulas of capacity hold: one machine in its busiest hour, turn by turn, beside them."""

import heapq
from collections.abc import Callable
from math import ceil
from typing import Any

import numpy as np

from benchmarks.table import Table
from lmsleep.evaluation.capacity import Speed, Traffic, Turn, waits

WINDOW = 512
# As a hybrid of 2B parameters on a GPU that reads and writes 2,500 tokens a second in all.
SPEED = Speed(token=0.0004, sleep=0.6)


def tables(repeats: int, tiny: bool) -> dict[str, Callable[[], Table]]:
    """Return one table."""
    turns = 2_000 if tiny else 200_000
    return {"waits": lambda: simulated(repeats, turns)}


def simulated(repeats: int, turns: int) -> Table:
    """Simulate `turns` turns, `repeats` times with seeds 0, 1, ..., for a thousand to a million users."""
    rows: Any = []
    for users in (1_000, 10_000, 100_000, 1_000_000):
        for busy in (0.5, 0.7, 0.9):
            traffic = Traffic(users=users, busy=busy)
            turn = Turn.of(traffic, SPEED, WINDOW)
            each = turn.answer + turn.later
            demand = traffic.peak * users * traffic.turns / 86_400
            machines = ceil(demand * each / busy)
            said = waits(turn, demand / machines)
            rng = [np.random.default_rng(seed) for seed in range(repeats)]
            found = np.array([simulate(traffic, demand / machines, turns, r) for r in rng])
            (load, took, slept), error = found.mean(0), found.std(0, ddof=1 if repeats > 1 else 0)
            rows.append(
                {
                    "users": users,
                    "machines": machines,
                    "load, formula": said["load"],
                    "simulated": float(load),
                    "a turn, s, formula": said["turn_seconds"],
                    "turn, simulated": f"{took:.3g} ± {error[1] / repeats**0.5:.1g}",
                    "slept after, s, formula": said["slept_seconds"],
                    "slept, simulated": f"{slept:.3g} ± {error[2] / repeats**0.5:.1g}",
                }
            )
    note = (
        f"One of the machines in the busiest hour, {turns:,} turns, {repeats} seeds (mean ± standard error). "
        f"L = {WINDOW}, {SPEED.token * 1e3:g} ms a token, {SPEED.sleep:g} s a sleep; 20 turns a day of 300 + "
        "100 tokens, peak 3."
    )
    return Table(rows=rows, note=note)


def simulate(
    traffic: Traffic, rate: float, turns: int, rng: np.random.Generator
) -> tuple[float, float, float]:
    """Return the load, the mean time of a turn, and the mean time from an answer to the end of its sleep.

    Turns share the machine equally; sleeps go on, in the order in which they were asked for, when there is
    no turn. Every user's window goes on where the last turn has left it.
    """
    arrivals = np.cumsum(rng.exponential(1 / rate, turns))
    read, written = (
        rng.exponential(traffic.tokens_read, turns),
        rng.exponential(traffic.tokens_written, turns),
    )
    begun = rng.uniform(0, WINDOW, turns)  # in a window: the users of a machine are many
    before = np.floor((begun + read) / WINDOW)
    later = SPEED.sleep * (np.floor((begun + read + written) / WINDOW) - before)
    answer = (read + written) * SPEED.token + SPEED.sleep * before
    now = served = busy = 0.0  # `served`: seconds that each turn under way has had since the beginning
    under_way: list[tuple[float, int]] = []  # what `served` will be when it is done
    asleep: list[tuple[int, float]] = []  # in order: turn, seconds left
    ended, rested = np.zeros(turns), np.full(turns, np.nan)
    first, following = 0, 0
    while following < turns or under_way or first < len(asleep):
        arrives = arrivals[following] if following < turns else np.inf
        if under_way:
            done = now + (under_way[0][0] - served) * len(under_way)
            until = min(arrives, done)
            served += (until - now) / len(under_way)
            busy += until - now
            now = until
            if done <= arrives:
                _, i = heapq.heappop(under_way)
                ended[i] = now
                if later[i] > 0:
                    asleep.append((i, later[i]))
        elif first < len(asleep):
            i, left = asleep[first]
            until = min(arrives, now + left)
            busy += until - now
            asleep[first] = (i, left - (until - now))
            if now + left <= arrives:
                rested[i], first = until - ended[i], first + 1
            now = until
        else:
            now = arrives
        if following < turns and now == arrives:
            heapq.heappush(under_way, (served + answer[following], following))
            following += 1
    return busy / now, float((ended - arrivals).mean()), float(np.nanmean(rested))
