"""How long a client waits: for the first token and between tokens, while others write, read and sleep."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from benchmarks.table import Cell, Table
from benchmarks.timing import ms, ratio
from lmsleep import HybridConfig, HybridLM, Session, SessionBatch, SleepConfig
from lmsleep.serve.engine import DebtOf, Engine, Happened, settled
from lmsleep.session import Answer, Row, Stream

PASSES = (1, 4)
WAIT = 600  # seconds; who waits longer waits for ever


@dataclass(frozen=True)
class Asked:
    """What clients ask for: a model, its window, and the tokens of a question and of an answer."""

    config: HybridConfig
    window: int
    question: int
    answer: int

    def sleep(self, passes: int) -> SleepConfig:
        """Return how the model sleeps."""
        return SleepConfig(window=self.window, passes=passes)

    def __str__(self) -> str:
        c = self.config
        return (
            f"{len(c.blocks)} blocks of width {c.d_model}, random weights, float32, L = {self.window}; "
            f"questions of {self.question} tokens, answers of {self.answer}"
        )


@dataclass
class Waited:
    """Seconds to first tokens, between tokens, and how many answers had a sleep in them."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    slept: int = 0


class Talks:
    """Sessions that are asked again and again, all at once; no two windows of them align."""

    def __init__(
        self, model: HybridLM, asked: Asked, count: int, passes: int, debt: int, debt_of: DebtOf = "answer"
    ) -> None:
        self.asked, self.sleep = asked, asked.sleep(passes)
        sessions = [Session(model, self.sleep, history=0) for _ in range(count)]
        fills = [asked.window * (2 * i + 1) // (2 * count) for i in range(count)]
        SessionBatch(sessions).read([_some(model, fill) for fill in fills])
        self.streams: list[Stream] = [session.stream for session in sessions]
        self.model, self.engine = model, Engine(model, self.sleep, debt=debt, debt_of=debt_of)
        self.engine.start()

    def ask(self, answer: int | None = None) -> Waited:
        """Ask all of them one question, and wait until all have answered."""
        waited, rows = Waited(), [self._row(stream, answer) for stream in self.streams]
        begin = time.perf_counter()
        for told in self._told(rows):
            wrote = [at for at, event in told if event.what == "wrote"]
            waited.first.append(wrote[0] - begin)
            waited.between += np.diff(wrote).tolist()
            waited.slept += any(event.what == "slept" for _, event in told)
            self.streams[len(waited.first) - 1] = told[-1][1].row.stream
        return waited

    def rest(self) -> None:
        """Sleep on all windows that are due; wait until that is done."""
        late = {i: settled(Row(stream=stream), self.sleep) for i, stream in enumerate(self.streams)}
        due = {i: row for i, row in late.items() if row is not None}
        for i, told in zip(due, self._told(list(due.values())), strict=True):
            self.streams[i] = told[-1][1].row.stream

    def keep_busy(self, row: Row) -> Callable[[], None]:
        """Let a row that nobody waits for go through again and again; return what ends that."""
        ended = threading.Event()

        def again(event: Happened) -> None:
            if event.what == "done" and not ended.is_set():
                self.engine.submit(row, again)

        self.engine.submit(row, again)
        return ended.set

    def close(self) -> None:
        """End the engine."""
        self.engine.close(WAIT)

    def _row(self, stream: Stream, answer: int | None) -> Row:
        budget = self.asked.answer if answer is None else answer
        unread = _some(self.model, self.asked.question)
        return Row(stream=stream, unread=unread, budget=budget, answer=Answer(None, ()))

    def _told(self, rows: Sequence[Row]) -> list[list[tuple[float, Happened]]]:
        told = queue.SimpleQueue[tuple[int, float, Happened]]()

        def listener(i: int) -> Callable[[Happened], None]:
            return lambda event: told.put((i, time.perf_counter(), event))

        for i, row in enumerate(rows):
            self.engine.submit(row, listener(i))
        found: list[list[tuple[float, Happened]]] = [[] for _ in rows]
        for _ in rows:
            while True:
                i, at, event = told.get(timeout=WAIT)
                found[i].append((at, event))
                if event.what == "done":
                    if event.row.error is not None:
                        raise event.row.error
                    break
        return found


def waits(asked: Asked, *, counts: Sequence[int], repeats: int) -> Table:
    """Time the tokens of answers for N = 1 and 4, where there is idle time to sleep in between."""
    rows, model = list[dict[str, Cell]](), _model(asked)
    for count in counts:
        talks = {n: Talks(model, asked, count, n, _debt(asked)) for n in PASSES}
        waited = {n: list[Waited]() for n in PASSES}
        for repeat in range(-1, repeats):  # the first is not counted
            for n in np.random.default_rng(repeat + 1).permutation(PASSES).tolist():
                answered = talks[n].ask()
                talks[n].rest()
                if repeat >= 0:
                    waited[n].append(answered)
        # Of one round each, for rounds took turns.
        step = {n: [float(np.median(w.between)) for w in waited[n]] for n in PASSES}
        for n in PASSES:
            between = [x for w in waited[n] for x in w.between]
            rows.append(
                {
                    "sessions": count,
                    "N": n,
                    "first token, ms": ms([x for w in waited[n] for x in w.first]),
                    "90th percentile": ms([x for w in waited[n] for x in w.first], 90),
                    "between tokens, ms": ms(between),
                    "to N = 1": ratio(step[n], step[1]),
                    "longest, in medians": max(between) / float(np.median(between)),
                    "sleeps": talks[n].engine.counts.sleeps,
                }
            )
            talks[n].close()
    note = (
        f"All sessions are asked at once, and again when all have answered and those that were due have "
        f"slept. {asked}; no two windows align; debt L / 4. Wall time, {repeats} rounds of each, N = 1 and 4 "
        "in turns. Between tokens: the median; its ratio to N = 1 is that of neighbouring rounds: median "
        "[10th ... 90th percentile]."
    )
    return Table(rows=rows, note=note)


def stalls(asked: Asked, *, count: int, repeats: int) -> Table:
    """Time the gaps between tokens of answers while others sleep, or read, all the time."""
    model, L = _model(asked), asked.window
    debt = L  # so much that those who write do not sleep themselves
    talks = Talks(model, asked, count, PASSES[-1], debt)
    begun = list(talks.streams)
    answer = L // 2
    fresh = Stream.begin(model.initial_state(1))
    others = {
        "write alone": None,
        "others sleep": Row(stream=fresh, unread=_some(model, L + 1)),
        "others read": Row(stream=fresh, unread=_some(model, L), budget=1),
    }
    between: dict[str, list[list[float]]] = {case: [] for case in others}
    for repeat in range(-1, repeats):
        for case, other in others.items():
            talks.streams = list(begun)
            ends = [talks.keep_busy(other) for _ in range(count) if other is not None]
            waited = talks.ask(answer)
            for end in ends:
                end()
            if repeat >= 0:
                between[case].append(waited.between)
            while talks.engine.waiting:
                time.sleep(0.01)
    talks.close()
    step = {case: [float(np.median(gaps)) for gaps in found] for case, found in between.items()}
    alone = float(np.median(step["write alone"]))
    rows: list[dict[str, Cell]] = [
        {
            "case": case,
            "between tokens, ms": ms([x for gaps in found for x in gaps]),
            "to write alone": ratio(step[case], step["write alone"]),
            "99th percentile, ms": ms([x for gaps in found for x in gaps], 99),
            "longest, ms": ms([max(gaps) for gaps in found], 100),
            "longest, in medians alone": max(max(gaps) for gaps in found) / alone,
        }
        for case, found in between.items()
    ]
    note = (
        f"{count} sessions write {answer} tokens each while nobody else is there, while {count} others "
        f"sleep (again and again on L tokens, N = {PASSES[-1]}), and while {count} others have a prompt of L "
        f"tokens read. {asked.config.d_model} wide, {len(asked.config.blocks)} blocks, L = {L}. Wall time, "
        f"{repeats} rounds of each that took turns, no first token among the gaps."
    )
    return Table(rows=rows, note=note)


def policies(asked: Asked, *, count: int, repeats: int) -> Table:
    """Time answers for several debts: sleep at once, after the answer, and after a rest."""
    model, L = _model(asked), asked.window
    kinds: dict[str, tuple[int, DebtOf, bool]] = {
        "at once": (0, "answer", True),
        "debt L / 4 of the answer": (L // 4, "answer", True),
        "debt L / 8 of the turn": (L // 8, "turn", True),
        "debt L / 4 of the turn": (L // 4, "turn", True),
        "debt L / 2 of the turn": (L // 2, "turn", True),
        "debt L / 4 of the turn, after a rest": (L // 4, "turn", False),
    }
    talks = {
        kind: Talks(model, asked, count, PASSES[-1], debt, debt_of)
        for kind, (debt, debt_of, _) in kinds.items()
    }
    waited = {kind: list[Waited]() for kind in kinds}
    rounds = repeats * L // (asked.question + asked.answer)  # every session comes through so many windows
    for turn in range(-1, rounds):
        for kind, (_, _, at_once) in kinds.items():
            answered = talks[kind].ask()
            if at_once:
                talks[kind].rest()
            if turn >= 0:
                waited[kind].append(answered)
    rows = list[dict[str, Cell]]()
    for kind, found in waited.items():
        first, between = ([x for w in found for x in getattr(w, name)] for name in ("first", "between"))
        rows.append(
            {
                "sleep": kind,
                "first token, ms": ms(first),
                "99th percentile": ms(first, 99),
                "between tokens, ms": ms(between),
                "99.9th percentile": ms(between, 99.9),
                "longest": ms(between, 100),
                "answers with a sleep": f"{sum(w.slept for w in found)} of {len(first)}",
                "sleeps": talks[kind].engine.counts.sleeps,
            }
        )
        talks[kind].close()
    note = (
        f"{count} sessions that are asked at once, again and again. {asked}, N = {PASSES[-1]}. At once: a "
        "full window is slept on where it ends, in an answer too. Of the answer: questions sleep first, an "
        "answer may run on; of the turn: a question may, too. Those in debt sleep between rounds; after a "
        f"rest: nobody rests that long. Wall time, {rounds} rounds that took turns."
    )
    return Table(rows=rows, note=note)


def _debt(asked: Asked) -> int:
    return asked.window // 4  # the default of `lmsleep serve`


def _model(asked: Asked) -> HybridLM:
    torch.manual_seed(0)
    return HybridLM(asked.config).eval()


def _some(model: HybridLM, count: int) -> torch.Tensor:
    return torch.arange(count) * 7 % model.vocab_size
