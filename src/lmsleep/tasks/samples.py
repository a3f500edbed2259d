"""Samples of a task, for people and for other programs."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from lmsleep.tasks.base import Batch, Task

EVICTED = "‖"  # what is left of it is no longer in attention


def show(task: Task, batch: Batch, row: int, window: int | None) -> str:
    """Spell row `row`: `‖` where a window of L tokens is evicted, answers in brackets.

    Where every token is to be predicted, as in text, nothing is marked as an answer.
    """
    parts = []
    context, tokens, answers = batch.row(row)
    for start in range(0, len(context), window or len(context) or 1):
        parts += [task.spell(context[start : start + (window or len(context))]), EVICTED]
    everything = batch.context is None and min(answers[1:], default=-1) >= 0
    places = [(i // (window or len(tokens)), -1 if everything else answers[i]) for i in range(len(tokens))]
    previous = 0
    for (number, answer), group in groupby(range(len(tokens)), key=lambda i: places[i]):
        if number != previous:
            parts.append(EVICTED)
        previous = number
        spelled = task.spell([tokens[i] for i in group])
        parts.append(f"[{spelled}]" if answer >= 0 else spelled)
    return " ".join(parts)


def records(task: Task, batch: Batch) -> Iterator[dict[str, Any]]:
    """Yield each row as JSON-ready data.

    `context` and `tokens` are token numbers, `loss` the places in `tokens` to be predicted, `answers` a list
    of `start` (place in `tokens`), `tokens` and `difficulty`; `text` and `context_text` spell it out.
    """
    for row in range(len(batch.tokens)):
        context, tokens, places = batch.row(row)
        answers = []
        for number, group in groupby(range(len(tokens)), key=lambda i: places[i]):
            if number >= 0:
                where = list(group)
                answers.append(
                    {
                        "start": where[0],
                        "tokens": [tokens[i] for i in where],
                        "difficulty": int(batch.difficulty[number]),
                    }
                )
        yield {
            "context": context,
            "tokens": tokens,
            "loss": batch.loss_mask[row].nonzero()[:, 0].tolist(),
            "answers": answers,
            "context_text": task.spell(context),
            "text": task.spell(tokens),
        }
