"""What is left of a text in an adapter that it was distilled into, and what else that changes."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from benchmarks.models import language_model
from benchmarks.table import Cell, Table, share
from lmsleep import Session, SleepConfig, adapt
from lmsleep.evaluation.facts import CHOICES, Quiz
from lmsleep.evaluation.slow_weights import nats
from lmsleep.hf import insert_memory_layers
from lmsleep.hf.backbone import HFBackbone
from lmsleep.session import Distillation
from lmsleep.tasks.recall.filler import filler
from lmsleep.text.tokenizers import Tokenizer

PROSE = Path(__file__).parents[2] / "CONTRIBUTING.md"


def facts(texts: int, tiny: bool) -> Table:
    """Plant facts in texts, distil each of them into an adapter of its own, and ask for the facts."""
    torch.manual_seed(0)
    known, tokenizer, name = language_model(tiny=tiny)
    insert_memory_layers(known, 2 if tiny else 6)
    model = adapt(known)
    L = 256 if tiny else 128
    sleep = SleepConfig(window=L, passes=4, loop="middle")
    ways: dict[str, Distillation | SleepConfig | None] = {
        "nothing": None,
        "S after a sleep (N = 4, memory layers not trained)": sleep,
        "the text in attention": SleepConfig(),
        "adapter, 30 steps on the text": Distillation(steps=30, batch=1, samples=0),
        "adapter, 30 steps on text and a sample": Distillation(steps=30, batch=2, samples=1, length=L),
    }
    if tiny:
        ways = {what: Distillation(steps=2, samples=1, length=4) if isinstance(way, Distillation) else way
                for what, way in ways.items()}  # fmt: skip
    others = prose(tokenizer, L)
    rows = [_Row(way) for way in ways]
    for seed in range(texts):
        piece, other = (_filler(tokenizer, L, Random(2 * seed + i)) for i in range(2))
        quiz = Quiz.draw(tokenizer, piece, L, torch.Generator().manual_seed(seed))
        for row, way in zip(rows, ways.values(), strict=True):
            row.read(model, tokenizer, quiz, way, seed, {"other": [other], "prose": others})
    return Table(
        rows=[row.cells() for row in rows],
        note=f"{name} in float32; {texts} texts of {L} tokens with four planted facts each. Facts: the right "
        f"number is the likeliest of {CHOICES} (chance {1 / CHOICES:.3f}; 95 % interval, Wilson, over all "
        "questions). Bits: of a right answer, and of a token of the text, of another text of the same kind, "
        f"and of the prose of {PROSE.name}. Each text has adapters of its own, of rank 16, at the default "
        "learning rate; every step reads the text once, and where there is one, a sample as long as it.",
    )


class _Row:
    """One way of knowing a text, over all texts."""

    def __init__(self, name: str) -> None:
        self.name, self.right = name, list[bool]()
        self.bits: dict[str, list[float]] = {}
        self.cost: dict[str, int | float] = {"tokens": 0, "seconds": 0.0, "bytes": 0}

    def read(
        self,
        model: HFBackbone,
        tokenizer: Tokenizer,
        quiz: Quiz,
        way: Distillation | SleepConfig | None,
        seed: int,
        others: dict[str, Sequence[Tensor]],
    ) -> None:
        """Read one text, ask for its facts, and predict it and others."""
        known, state, asked = model, None, way if isinstance(way, SleepConfig) else None
        in_view = asked is not None and asked.window is None
        if isinstance(way, Distillation):
            begin = time.process_time()
            made = Session(model, SleepConfig(), tokenizer).consolidate(quiz.context, replace(way, seed=seed))
            known = made.model
            self.cost = {
                "tokens": made.text_tokens + made.sampled_tokens,
                "seconds": self.cost["seconds"] + time.process_time() - begin,
                "bytes": made.nbytes,
            }
        elif asked is not None and not in_view:
            session = Session(model, asked, tokenizer)
            session.read(quiz.context)
            session.sleep()
            state = session.stream.state
        with torch.no_grad():
            answers = quiz.answered(known, asked)
        self.right += (answers[:, 0] > answers[:, 1:].amax(dim=1)).tolist()
        found = {
            "answer": -float(answers[:, 0].mean()),
            "text": nats(known, [quiz.context], state, in_view=in_view),
            **{name: nats(known, windows, state) for name, windows in others.items()},
        }
        for name, value in found.items():
            self.bits.setdefault(name, []).append(value / math.log(2))

    def cells(self) -> dict[str, Cell]:
        """Return the row of the table."""
        texts, trained = len(self.bits["text"]), bool(self.cost["tokens"])
        return {
            "what is known by": self.name,
            "facts": share(sum(self.right), len(self.right)),
            "bits an answer": _mean(self.bits["answer"]),
            "bits a token: text": _mean(self.bits["text"]),
            "other text": _mean(self.bits["other"]),
            "prose": _mean(self.bits["prose"]),
            "distilled on": int(self.cost["tokens"]) if trained else None,
            "CPU seconds": self.cost["seconds"] / texts if trained else None,
            "bytes": int(self.cost["bytes"]) if trained else None,
        }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def prose(tokenizer: Tokenizer, length: int) -> tuple[Tensor, ...]:
    """Return four windows of a text that no model here was trained on, `[length]` each."""
    return torch.tensor(tokenizer.encode(PROSE.read_text()))[: 4 * length].split(length)


def _filler(tokenizer: Tokenizer, length: int, random: Random) -> Tensor:
    """Return `[length]`: the beginning of a text that tells nothing."""
    text = " ".join(filler(random, length))
    return torch.tensor([*tokenizer.begin, *tokenizer.encode(text)][:length])
