"""Time awake, and the pause of a sleep, against N and L: all cases take turns, so that they share drift."""

from functools import partial
from itertools import islice

import numpy as np
import torch

from benchmarks.table import Cell, Table
from benchmarks.timing import Times, ms, ratio
from lmsleep import HybridConfig, HybridLM, Session, SleepConfig

PASSES = (1, 2, 4, 8)


def waking(config: HybridConfig, window: int, repeats: int) -> Table:
    """Time the first token of an answer and each further one, for models that differ in N alone."""
    prompt = torch.arange(window // 4) % config.vocab_size
    tokens = window // 4
    sessions = {n: _slept(config, SleepConfig(window=window, passes=n)) for n in PASSES}
    first, further = ({n: Times() for n in PASSES} for _ in range(2))
    for repeat in range(-1, repeats):  # the first is not counted
        for n in np.random.default_rng(repeat + 1).permutation(PASSES).tolist():
            session = sessions[n].fork()
            answer = session.generate(prompt, tokens + 1, stream=True)
            counted = (first[n], further[n]) if repeat >= 0 else (Times(), Times())
            counted[0].add(partial(next, answer))
            counted[1].add(partial(list, islice(answer, tokens)), tokens)
            assert session.stats.sleeps == sessions[n].stats.sleeps  # awake all the time
    rows: list[dict[str, Cell]] = [
        {
            "N": n,
            "first token, ms": ms(first[n].wall),
            "CPU ms of it": ms(first[n].cpu),
            "first token to N = 1": ratio(first[n].cpu, first[1].cpu),
            "a further token, ms": ms(further[n].wall),
            "CPU ms of that": ms(further[n].cpu),
            "further token to N = 1": ratio(further[n].cpu, further[1].cpu),
        }
        for n in PASSES
    ]
    note = (
        f"Awake: a prompt of {len(prompt)} tokens to a memory, then {tokens} tokens one by one, all in one "
        f"window (L = {window}) that is not slept on. {_model(config)}, the same for every N. Medians of "
        f"{repeats} repeats that took turns; ratios are of CPU time, to N = 1 in the same repeat: "
        "median [10th ... 90th percentile]."
    )
    return Table(rows=rows, note=note)


def pauses(config: HybridConfig, windows: tuple[int, ...], repeats: int) -> Table:
    """Time how long a sleep on a full window keeps a stream waiting."""
    cases = {(n, L): Times() for L in windows for n in PASSES}
    full = {}
    for n, L in cases:
        full[n, L] = _slept(config, SleepConfig(window=L, passes=n))
        full[n, L].read(torch.arange(L) % config.vocab_size)
        full[n, L].fork().sleep()
    for _ in range(repeats):
        for case, times in cases.items():
            times.add(full[case].fork().sleep)
    rows: list[dict[str, Cell]] = [
        {
            "L": L,
            "N": n,
            "median, ms": ms(times.wall),
            "99th percentile, ms": ms(times.wall, 99),
            "median of CPU time": ms(times.cpu),
            "99th of CPU time": ms(times.cpu, 99),
            "CPU time to N = 1": ratio(times.cpu, cases[1, L].cpu),
        }
        for (n, L), times in cases.items()
    ]
    note = (
        f"A sleep on a full window of L tokens: all N passes and the eviction. {_model(config)}. {repeats} "
        "repeats that took turns; ratios are of CPU time, to N = 1 in the same repeat: "
        "median [10th ... 90th percentile]."
    )
    return Table(rows=rows, note=note)


def _slept(config: HybridConfig, sleep: SleepConfig) -> Session:
    """Make a session on random weights that has read a window and slept on it."""
    torch.manual_seed(0)
    session = Session(HybridLM(config), sleep)
    session.read(torch.arange(sleep.window or 1) % config.vocab_size)
    session.sleep()
    return session


def _model(config: HybridConfig) -> str:
    return f"{len(config.blocks)} blocks of width {config.d_model}, random weights, float32, one thread"
