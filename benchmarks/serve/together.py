"""Streams that write together, beside transformers' `generate` on a batch that is padded on the left."""

import copy
import gc
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.sessions.generate import VOCAB, about, random_model
from benchmarks.table import Cell, Table
from benchmarks.timing import ms, ratio, take_turns
from lmsleep import Session, SessionBatch, SleepConfig
from lmsleep.hf import adapt
from lmsleep.hf.cache_name import cache_name, named

APART = 8  # tokens by which the contexts of two rows differ, so that neither texts nor windows align


def streams(
    width: int, *, window: int, contexts: tuple[int, ...], counts: tuple[int, ...], tokens: int, repeats: int
) -> Table:
    """Time greedy tokens of several streams at once, each with a context of its own length."""
    model, rows = random_model(width), list[dict[str, Cell]]()
    for context in contexts:
        for count in counts:
            apart = min(APART, context // (2 * count))
            texts = _texts([context - apart * i for i in range(count)])
            ours = Ours(model, texts, window, tokens)
            theirs = Theirs(model, texts, tokens)
            if context + tokens < window:  # nothing is evicted yet, so both must say the same
                assert ours() == theirs()
            calls: dict[str, Any] = {"ours": ours, "theirs": theirs, "copy": theirs.past}
            cpu = {case: times.cpu for case, times in take_turns(calls, repeats).items()}
            peer = [a - b for a, b in zip(cpu["theirs"], cpu["copy"], strict=True)]
            rows.append(
                {
                    "context": context,
                    "streams": count,
                    "tokens/s": count * tokens * 1e3 / ms(cpu["ours"]),
                    "of generate": count * tokens * 1e3 / ms(peer),
                    "times as fast": ratio(peer, cpu["ours"]),
                }
            )
            del ours, theirs, calls
            gc.collect()  # two caches of the longest contexts do not fit beside each other everywhere
    note = (
        f"{tokens} greedy tokens on each stream, all streams together, after contexts of that many tokens "
        f"or up to {APART * (max(counts) - 1)} fewer, no two alike. {about(model)}. Ours: a `SessionBatch` "
        f"with L = {window}, which has slept on all windows but the open ones; transformers: `generate` on a "
        "batch padded on the left, with the keys and values of all contexts. Of the long ones only the end "
        "is really read, by both: no time depends on what was in the windows before, or in those keys. "
        "Tokens a second of CPU time, medians of "
        f"{repeats} repeats that took turns; ratios within a repeat: median [10th ... 90th percentile]. "
        "Before anything is evicted both give the same answers."
    )
    return Table(rows=rows, note=note)


def _texts(lengths: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB, (n,), generator=generator) for n in lengths]


class Ours:
    """Sessions that have read all of their texts but the last token."""

    def __init__(self, model: Any, texts: list[Tensor], window: int, tokens: int) -> None:
        backbone, sleep = adapt(model), SleepConfig(window=window, passes=1)
        self.sessions = [Session(backbone, sleep, history=0) for _ in texts]
        self.last, self.tokens = [text[-1:] for text in texts], tokens
        # Of a long text the last full window and the open one: a state has the same size after any windows.
        begins = [max(len(text) // window - 1, 0) * window for text in texts]
        SessionBatch(self.sessions).read([text[begin:-1] for text, begin in zip(texts, begins, strict=True)])

    def __call__(self) -> list[list[int]]:
        """Write; the sessions stay where they are."""
        batch = SessionBatch([session.fork() for session in self.sessions])
        answers = batch.generate(self.last, self.tokens)
        assert all(isinstance(answer, list) for answer in answers)
        return answers  # type: ignore[return-value]


class Theirs:
    """A model of transformers and its cache of all texts but their last tokens, padded on the left."""

    def __init__(self, model: Any, texts: list[Tensor], tokens: int) -> None:
        self.model, self.tokens, longest = model, tokens, max(map(len, texts))
        left = [(longest - len(text), 0) for text in texts]
        self.texts = torch.stack([F.pad(text, pad) for text, pad in zip(texts, left, strict=True)])
        ones = [F.pad(torch.ones_like(text), pad) for text, pad in zip(texts, left, strict=True)]
        self.mask = torch.stack(ones)
        read = min(longest - 1, 1024)  # the work of reading grows with the square of the length
        before = slice(longest - 1 - read, longest - 1)
        positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)
        with torch.no_grad():
            out = model(
                self.texts[:, before],
                attention_mask=self.mask[:, before],
                position_ids=positions[:, before],
                use_cache=True,
            )
        self.cache = getattr(out, cache_name())
        generator = torch.Generator().manual_seed(0)
        for layer in self.cache.layers:
            if (keys := getattr(layer, "keys", None)) is not None and longest - 1 > read:
                shape = (*keys.shape[:2], longest - 1 - read, keys.shape[-1])
                layer.keys = torch.cat([torch.randn(shape, generator=generator), keys], dim=2)
                layer.values = torch.cat([torch.randn(shape, generator=generator), layer.values], dim=2)

    def past(self) -> Any:
        """Return a copy of the cache, which `generate` changes."""
        return copy.deepcopy(self.cache)

    def __call__(self) -> list[list[int]]:
        """Write with a copy of the cache, the time of which is to be taken off."""
        out = partial(self.model.generate, self.texts, attention_mask=self.mask, do_sample=False)(
            **named(self.past()), max_new_tokens=self.tokens
        )
        answers: list[list[int]] = out[:, self.texts.shape[1] :].tolist()
        return answers
