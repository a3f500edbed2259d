"""What is left of a trained memory when S is cleared, and an adapter has what it was distilled into."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.models import NAME, SLEEPS, sleeping_model
from benchmarks.slow_weights.facts import PROSE, prose
from benchmarks.table import Cell, Table, share
from lmsleep import Session, SleepConfig, shipped
from lmsleep.evaluation import Score
from lmsleep.evaluation.slow_weights import nats
from lmsleep.session import Distillation
from lmsleep.sleep import Backbone
from lmsleep.state import State
from lmsleep.tasks import Batch, Recall, batch_rng
from lmsleep.tasks.reading import read_batch

FACTS = 4
NOTHING, MEMORY, IN_VIEW = "nothing", "S", "the text in attention"
SPOKEN, TEXT, BOTH = "adapter of S", "adapter of the text", "adapter of the text and S"


def memory(texts: int, tiny: bool) -> Table:
    """Sleep on texts of four facts, distil the memory or the text into an adapter, clear S, and ask."""
    model, sleep, tokenizer = sleeping_model(tiny=tiny)
    length = 200 if tiny else 64
    task = Recall(
        kinds=("facts",),
        facts=(FACTS, FACTS),
        filler=(0, 1),
        length=length,
        tokenizer="bytes" if tiny else str(shipped.find(NAME)),
    )
    steps, written = (2, 4) if tiny else (40, 16)
    how = Distillation(steps=steps, samples=8, length=written)
    windows = prose(tokenizer, length)
    rows = {name: _Row(name) for name in (NOTHING, MEMORY, IN_VIEW, SPOKEN, TEXT, BOTH)}
    for seed in range(texts):
        batch = task.batch(batch_rng(0, "test", seed), 1, "test")
        text = batch.row(0)[0]
        fresh, slept, awake = (
            Session(model, how_to, tokenizer) for how_to in (sleep, sleep, replace(sleep, window=None))
        )
        awake.read(text)
        slept.read(text)
        slept.sleep()
        cleared = fresh.stream.state
        for name, session in ((NOTHING, fresh), (MEMORY, slept), (IN_VIEW, awake)):
            rows[name].ask(model, session.stream.state, batch, windows)
        more = replace(how, seed=seed)
        for name, session, told, distillation in (
            (SPOKEN, slept, None, replace(more, samples=2 * how.samples)),
            (TEXT, fresh, text, more),
            (BOTH, slept, text, more),
        ):
            begin = time.process_time()
            made = session.consolidate(told, distillation)
            rows[name].seconds += time.process_time() - begin
            rows[name].tokens += made.text_tokens + made.sampled_tokens
            rows[name].bytes = made.nbytes
            rows[name].ask(made.model, cleared, batch, windows)
    return Table(
        rows=[row.cells(texts) for row in rows.values()],
        note=f"{'A tiny model' if tiny else SLEEPS} in float32; {texts} texts of {FACTS} facts and at most "
        f"{length} tokens (task recall, its test), read with N = {sleep.passes} and evicted into S. "
        "Adapters are asked with S cleared and nothing in view; that of S is made of what the model with S "
        "writes after a line end. Answers: all their tokens are the likeliest (95 % interval, Wilson, as if "
        "the questions of a text were independent; guessing among the answers of its kind in a text "
        f"{task.floors()['chance']:.3f}). Bits: of a right answer, and of a token of the prose of "
        f"{PROSE.name}. Each text has adapters of its own, of rank {how.rank}, {steps} steps of {how.batch} "
        "rows.",
    )


class _Row:
    """One way of knowing a text, over all texts."""

    def __init__(self, name: str) -> None:
        self.name, self.scores, self.prose = name, list[Score](), list[float]()
        self.tokens, self.bytes, self.seconds = 0, 0, 0.0

    def ask(self, model: Backbone, state: State, batch: Batch, windows: Sequence[Tensor]) -> None:
        """Ask all questions of one text, and predict prose."""
        self.scores.append(answered(model, state, batch))
        self.prose.append(nats(model, windows, state) / math.log(2))

    def cells(self, texts: int) -> dict[str, Cell]:
        """Return the row of the table."""
        score, trained = Score.joined(self.scores), self.tokens > 0
        right, asked = (sum(counts.values()) for counts in (score.correct, score.total))
        return {
            "what is known by": self.name,
            "answers": share(right, asked),
            "bits an answer": sum(score.answer_nll.values()) / asked / math.log(2),
            "bits a token of prose": sum(self.prose) / texts,
            "distilled on": round(self.tokens / texts) if trained else None,
            "CPU seconds": self.seconds / texts if trained else None,
            "bytes": self.bytes if trained else None,
        }


@torch.no_grad()
def answered(model: Backbone, state: State, batch: Batch) -> Score:
    """Score the rows of a batch, each on its own fork of what was read before.

    Args:
        model: any `Backbone`.
        state: what was read before, one row.
        batch: questions with their answers; its context is not read.
    """
    rows = replace(batch, context=None, context_row=None, context_lengths=None)
    forks = state.rows([0] * len(rows.tokens))
    logits = read_batch(model, rows, SleepConfig(), state=forks, return_logits=True).logits
    assert logits is not None
    score = Score()
    score.add(rows, logits)
    return score
