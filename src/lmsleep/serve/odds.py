"""Odds as clients read them, and those of a prompt's own tokens."""

import asyncio
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lmsleep.serve.errors import ApiError
from lmsleep.serve.service import Service
from lmsleep.session import Row, Stream
from lmsleep.session.rows import Odds
from lmsleep.text.tokenizers import Bytes, Tokenizer

LEAST = -9999.0  # stands for what JSON cannot write: a token that cannot come
Told = tuple[int, Odds | None]  # a token, and its odds where something stands before it
PIECE = 64  # tokens of a prompt whose logits are held at a time


def listed_odds(tokenizer: Tokenizer, odds: Sequence[Odds]) -> list[dict[str, Any]]:
    """Return the odds of tokens as chats and responses list them.

    `bytes` is None for a token that is no text of its own, and has no bytes that the tokenizer would tell.
    """

    def one(token: int, log_p: float) -> dict[str, Any]:
        text = tokenizer.decode([token])
        known = None if "\ufffd" in text else list(text.encode())
        exact = [token] if isinstance(tokenizer, Bytes) else known
        return {"token": text, "logprob": max(log_p, LEAST), "bytes": exact}

    return [{**one(o.token, o.log_p), "top_logprobs": [one(*other) for other in o.likeliest]} for o in odds]


def text_odds(tokenizer: Tokenizer, told: Sequence[Told], offset: int) -> dict[str, Any]:
    """Return the odds of tokens as /v1/completions lists them; `offset` characters stand before them."""
    texts, odds = [tokenizer.decode([token]) for token, _ in told], [of for _, of in told]

    def likeliest(of: Odds) -> dict[str, float]:
        # From the end: of tokens that are spelled alike the likeliest is told.
        ranked = [(of.token, of.log_p), *of.likeliest[::-1]]
        return {tokenizer.decode([token]): max(log_p, LEAST) for token, log_p in ranked}

    return {
        "tokens": texts,
        "token_logprobs": [None if of is None else max(of.log_p, LEAST) for of in odds],
        "top_logprobs": [None if of is None else likeliest(of) for of in odds],
        "text_offset": list(accumulate(map(len, texts), initial=offset))[:-1],
    }


async def read_with_odds(service: Service, prompt: Tensor, count: int) -> tuple[Stream, list[Told]]:
    """Read a prompt `[n]` from its beginning, all but its last token, which is still to be gone on from.

    Returns:
        Where the stream is then, and all n tokens with their odds and `count` likeliest each; the first has
        no odds.

    Raises:
        ApiError: as `Service.follow`, or for logits with NaN.
    """
    stream, L = service.store.nothing().stream, service.engine.sleep.window
    told: list[Told] = [(int(prompt[0]), None)]
    while (begin := len(told) - 1) < len(prompt) - 1:
        # Up to the end of a window, so that no sleep has to compute logits for all of its window at once.
        room = PIECE if L is None else L - len(stream.window) or L
        piece = prompt[begin:-1][: min(room, PIECE)]
        async for event in service.follow(Row(stream=stream, unread=piece, keep_logits=True)):
            stream = event.row.stream
            if event.logits is not None and len(event.logits):
                targets = prompt[len(told) :][: len(event.logits)]
                told += await asyncio.to_thread(_told, event.logits, targets, count)
    return stream, told


def _told(logits: Tensor, targets: Tensor, count: int) -> list[Told]:
    """Return tokens `[t]` with their odds by logits `[t, V]`."""
    if not bool(torch.isfinite(logits.amax(-1)).all()):
        raise ApiError(500, "logits are NaN, so the prompt has no likelihood", code="broken_row")
    tokens = targets.tolist()
    return [(token, Odds.of(token, seen, count)) for token, seen in zip(tokens, logits, strict=True)]
