"""One turn of a very long conversation, beside reading all of it again."""

from functools import partial

import torch

from benchmarks.table import Cell, Table
from benchmarks.timing import Times, ms
from lmsleep import HybridConfig, HybridLM, Session, SleepConfig

QUESTION = 32


def turn(config: HybridConfig, *, window: int, length: int, repeats: int) -> Table:
    """Time the first token of an answer after `length` tokens that are remembered, or are read again."""
    torch.manual_seed(0)
    model = HybridLM(config).eval()
    text = torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    question = torch.arange(QUESTION) % config.vocab_size
    sessions = {n: Session(model, SleepConfig(window=window, passes=n), history=0) for n in (1, 4)}
    times = {case: Times() for n in sessions for case in (("remembered", n), ("read again", n))}
    for n, session in sessions.items():
        new = Session(model, session.sleep_config, history=0)
        times["read again", n].add(partial(_first, new, torch.cat([text, question])))
        session.read(text)
        _first(session.fork(), question)
        for _ in range(repeats):
            times["remembered", n].add(partial(_first, session.fork(), question))
    rows: list[dict[str, Cell]] = [
        {
            "N": n,
            "the conversation is": case,
            "first token, ms": ms(found.wall),
            "CPU ms": ms(found.cpu),
            "times as long": ms(found.cpu) / ms(times["remembered", n].cpu),
            "kept, bytes": sessions[n].stats.memory_bytes + sessions[n].stats.working_bytes,
        }
        for (case, n), found in times.items()
    ]
    note = (
        f"The first token of an answer to {QUESTION} tokens after a conversation of {length:,} tokens: from "
        "the stream that has read it, or from one that reads it again, as a server does that keeps no state. "
        f"{len(config.blocks)} blocks of width {config.d_model}, random weights, float32, one thread, L = "
        f"{window}; for N = 1 reading again is one pass over each token, the least there is. Read again "
        f"once, {repeats} turns."
    )
    return Table(rows=rows, note=note)


def _first(session: Session, tokens: torch.Tensor) -> None:
    session.generate(tokens, 1)
