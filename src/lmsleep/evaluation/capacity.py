"""How many machines so many users need, what they wait, and what is kept of them: formulas.

A machine answers turns side by side (processor sharing, which is what a loop of steps over all rows does),
and sleeps when nobody waits for an answer. What is read before an answer sleeps on the way; what is written
is slept on after it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, exp
from typing import Any

DAY = 86_400.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What all users do together.

    Attributes:
        users: how many.
        turns: of one user, a day.
        tokens_read: of one turn, on average; the lengths are spread as waiting times are (exponentially).
        tokens_written: likewise.
        peak: turns in the busiest hour over those in an hour of the mean day.
        busy: share of the time that a machine may work in the busiest hour; the rest keeps waits short.

    Raises:
        ValueError: naming the field that is out of range.
    """

    users: int
    turns: float = 20.0
    tokens_read: float = 300.0
    tokens_written: float = 100.0
    peak: float = 3.0
    busy: float = 0.7

    def __post_init__(self) -> None:
        for name in ("users", "turns", "tokens_read", "tokens_written"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 1 <= self.peak <= 24:
            raise ValueError(f"peak must lie in 1 ... 24, got {self.peak}")
        if not 0 < self.busy < 1:
            raise ValueError(f"busy must lie between 0 and 1, got {self.busy}")


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What one machine does, beside as many rows as it usually has, in seconds.

    Attributes:
        token: a token that is read or written.
        sleep: N passes over a whole window.
    """

    token: float
    sleep: float

    @classmethod
    def of(cls, costs: Mapping[str, Any], flops: float) -> "Speed":
        """Return the speed of a machine that attains so many FLOP a second on what `cost` counted.

        Raises:
            ValueError: if `flops` is not above 0.
        """
        if not 0 < flops < float("inf"):
            raise ValueError(f"flops must be above 0, got {flops}")
        token = costs["flops_wake_token"] / flops
        # A window that was read token by token is read once more before the passes that make a sleep of it.
        return cls(token=token, sleep=costs["flops_sleep"] / flops + (costs["window"] or 0) * token)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """The work of one turn, in seconds: means, and means of squares.

    Attributes:
        answer: until the answer is there, with the sleeps on the way.
        answer_squared: its mean square.
        later: of sleeping afterwards, over all turns.
        later_squared: its mean square.
        sleep: of sleeping afterwards, over those turns that do.
    """

    answer: float
    answer_squared: float
    later: float
    later_squared: float
    sleep: float

    @classmethod
    def of(cls, traffic: Traffic, speed: Speed, window: int | None) -> "Turn":
        """Return the moments of the work of a turn."""
        r, w = traffic.tokens_read, traffic.tokens_written
        t, s, L = speed.token, speed.sleep, float("inf") if window is None else window
        _, _, read_squared = _filled(r, L)
        some, later, later_squared = _filled(w, L)
        reading = r * t + r / L * s
        # E[n k] = E[n^2] / L for n tokens that fill k windows; E[n^2] = 2 E[n]^2 for an exponential n.
        reading_squared = 2 * (r * t) ** 2 + 4 * r**2 / L * t * s + read_squared * s**2
        return cls(
            answer=reading + w * t,
            answer_squared=reading_squared + 2 * (w * t) ** 2 + 2 * reading * w * t,
            later=later * s,
            later_squared=later_squared * s**2,
            sleep=later * s / some if some else 0.0,
        )


def _filled(tokens: float, window: float) -> tuple[float, float, float]:
    """Return how likely a window is filled, and mean and mean square of how many are.

    The number of tokens is exponential with mean `tokens`, and begins anywhere in a window. Once one is full,
    the next is with probability q, and so on: what is left of an exponential is as long as ever.
    """
    q = exp(-window / tokens)
    some = tokens / window * (1 - q)
    return some, tokens / window, some * (1 + q) / (1 - q) ** 2


def waits(turn: Turn, turns: float) -> dict[str, float]:
    """Return how long a machine with so many turns a second takes for a turn, and for the sleep after it.

    The first is the mean of an M/G/1 queue that shares its time among all turns. The second, of those turns
    that a sleep follows, is that of work which goes on only where there is no turn (preemptive priority), as
    if sleeps came at random; they come when a turn ends, so it is up to a tenth too low. Both are infinite at
    a load of 1.
    """
    answering = turns * turn.answer
    load = answering + turns * turn.later
    if load >= 1:
        return {"load": load, "turn_seconds": float("inf"), "slept_seconds": float("inf")}
    work = turns * (turn.answer_squared + turn.later_squared) / (2 * (1 - load))
    later = (work + turn.sleep) / (1 - answering) if turn.sleep else 0.0
    return {"load": load, "turn_seconds": turn.answer / (1 - answering), "slept_seconds": later}


def plan(costs: Mapping[str, Any], traffic: Traffic, speed: Speed) -> dict[str, Any]:
    """Plan machines, waits and bytes.

    Args:
        costs: what `cost` counted.
        traffic: what users do.
        speed: of one machine.

    Returns:
        `machines`; in the busiest hour of one of them `load`, `turn_seconds` (from a turn to the end of its
        answer, on average), `slept_seconds` (from there to the end of its sleep) and `live_turns`; of one
        machine and day `awake_seconds`, `sleep_seconds` and `idle_seconds`; `disk_bytes_a_user` and
        `disk_bytes`, and `live_bytes_a_turn`: the state of a turn under way.
    """
    L = costs["window"]
    turn = Turn.of(traffic, speed, L)
    a_second = traffic.users * traffic.turns / DAY
    machines = ceil(traffic.peak * a_second * (turn.answer + turn.later) / traffic.busy)
    waiting = waits(turn, traffic.peak * a_second / machines)
    awake = (traffic.tokens_read + traffic.tokens_written) * speed.token
    asleep = turn.answer + turn.later - awake
    per_day = a_second * DAY / machines
    S, kv = costs["fast_weight_bytes"], costs["kv_bytes_per_token"]
    # On disk: where the window began, and its tokens. Alive: that, where it stands, and its keys and values.
    on_disk = S + 8 * (L or 0)
    return {
        "machines": machines,
        **waiting,
        "live_turns": traffic.peak * a_second / machines * waiting["turn_seconds"],
        "awake_seconds": per_day * awake,
        "sleep_seconds": per_day * asleep,
        "idle_seconds": DAY - per_day * (awake + asleep),
        "disk_bytes_a_user": on_disk,
        "disk_bytes": on_disk * traffic.users,
        "live_bytes_a_turn": 2 * S + kv * (L or 0),
    }
