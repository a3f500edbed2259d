"""POST /v1/chat/completions and /v1/completions: the whole history comes with every request.

What of it has been read before is found, so that only what is new is read.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from torch import Tensor

from lmsleep.serve.context import Context, Who, context
from lmsleep.serve.errors import ApiError, invalid, told
from lmsleep.serve.leaving import Events, unless_gone
from lmsleep.serve.odds import Told, listed_odds, read_with_odds, text_odds
from lmsleep.serve.service import Service, Wanted, Written
from lmsleep.serve.wire import ChatBody, CompletionBody, Many
from lmsleep.session.rows import Odds

router = APIRouter(prefix="/v1", tags=["completions"])
MOST_ANSWERS = 128  # to one request


@dataclass(frozen=True, kw_only=True)
class Form:
    """How one of the two endpoints writes what both do.

    Attributes:
        object: of a whole answer.
        chunk: of a part of a streamed one.
        id: begins the names of answers.
        chat: whether answers are messages.
    """

    object: str
    chunk: str
    id: str
    chat: bool


CHAT = Form(object="chat.completion", chunk="chat.completion.chunk", id="chatcmpl", chat=True)
TEXT = Form(object="text_completion", chunk="text_completion", id="cmpl", chat=False)


@dataclass(frozen=True, eq=False, kw_only=True)
class Choice:
    """One of the answers that a request asks for.

    Attributes:
        number: of it.
        prompt: number of its prompt.
        read: tokens of the prompt that had to be read.
        written: the answer.
        wanted: how it is written.
        echo: what is repeated before it.
        before: the tokens of that with their odds, where these are wanted; it was read for them alone, and
            is not kept.
    """

    number: int
    prompt: int
    read: int
    written: Written
    wanted: Wanted
    echo: str
    before: list[Told]


@router.post("/chat/completions")
async def chat(body: ChatBody, request: Request, who: Who) -> Response:
    """Answer a conversation."""
    here = context(request)
    here.check(body)
    service = here.service
    messages = [m.said(f"messages[{i}]") for i, m in enumerate(body.messages)]
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    try:
        tokens = service.chat.begin(messages)
    except ValueError as error:
        raise invalid(str(error), "messages") from None
    wanted = Wanted(
        sampling=body.sampling(),
        longest=body.max_completion_tokens or body.max_tokens or service.longest,
        stop=(*body.stops(), *service.chat.stop),
        seed=body.seed,
        odds=(body.top_logprobs or 0) if body.logprobs else None,
    )
    return await _answer(here, who, body, [service.tokens(tokens, "messages")], [""], wanted, CHAT, request)


@router.post("/completions")
async def completions(body: CompletionBody, request: Request, who: Who) -> Response:
    """Go on with texts."""
    here = context(request)
    here.check(body)
    prompts: list[Any] = [body.prompt]
    if isinstance(body.prompt, list) and not all(isinstance(p, int) for p in body.prompt):
        prompts = list(body.prompt)
    tokens = [here.service.tokens(prompt, "prompt") for prompt in prompts]
    decode = here.service.tokenizer.decode
    texts = [p if isinstance(p, str) else decode(p) for p in prompts] if body.echo else [""] * len(prompts)
    wanted = Wanted(
        sampling=body.sampling(),
        longest=min(16, here.service.longest) if body.max_tokens is None else body.max_tokens,
        stop=body.stops(),
        seed=body.seed,
        odds=body.logprobs,
    )
    return await _answer(here, who, body, tokens, texts, wanted, TEXT, request)


async def _answer(
    here: Context,
    who: Who,
    body: Many,
    prompts: Sequence[Tensor],
    echoes: Sequence[str],
    wanted: Wanted,
    form: Form,
    request: Request,
) -> Response:
    """Write n answers to each prompt, and send them at once or as they are written."""
    began, n = time.perf_counter(), body.n or 1
    if n * len(prompts) > MOST_ANSWERS:
        raise invalid(
            f"n times the number of prompts must be {MOST_ANSWERS} at most, got {n * len(prompts)}", "n"
        )
    choices = list[Choice]()
    for number, (prompt, echo) in enumerate(zip(prompts, echoes, strict=True)):
        if not len(prompt):
            raise invalid("the prompt has no token", "prompt")
        if echo and wanted.odds is not None:
            stream, before = await read_with_odds(here.service, prompt, wanted.odds)
            kept, rest, read = replace(here.service.store.nothing(), stream=stream), prompt[-1:], len(prompt)
            here.spent(who, read=read - 1)
        else:
            kept, rest = await here.service.prefix(who.name, prompt)
            before, read = [], len(rest)
        for _ in range(n):
            written = Written(kept, rest, len(prompt) - len(rest))
            choices.append(
                Choice(
                    number=len(choices),
                    prompt=number,
                    read=read,
                    written=written,
                    wanted=_numbered(wanted, len(choices)),
                    echo=echo,
                    before=before,
                )
            )
    id, created = f"{form.id}-{secrets.token_hex(12)}", int(time.time())
    head = {"id": id, "created": created, "model": body.model, "system_fingerprint": here.fingerprint}
    if body.stream:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        events = _events(here, who, choices, form, {**head, "object": form.chunk}, usage, began)
        first = await anext(events)  # errors before the first byte have a status of their own
        return Events(_chained(first, events))
    await unless_gone(request, _whole(here, who, choices, began))
    said = [_choice(choice, form, here.service) for choice in choices]
    return JSONResponse({**head, "object": form.object, "choices": said, "usage": usage_of(choices)})


async def _whole(here: Context, who: Who, choices: Sequence[Choice], began: float) -> None:
    """Write all answers, or none if one of them fails."""

    async def one(choice: Choice) -> None:
        async for _ in _steps(here, who, choice, began):
            pass

    tasks = [asyncio.create_task(one(choice)) for choice in choices]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _numbered(wanted: Wanted, number: int) -> Wanted:
    """Return how the answer of that number is drawn: each by a seed of its own."""
    return wanted if wanted.seed is None else replace(wanted, seed=wanted.seed + number)


async def _steps(
    here: Context, who: Who, choice: Choice, began: float
) -> AsyncIterator[tuple[str, Odds | None, str]]:
    """Yield what is written, piece by piece, with its odds; keep it in the end."""
    written = choice.written
    async for event in here.timed(here.write(who, written, choice.wanted), began):
        if event.what == "wrote":
            yield "".join(map(str, event.pieces)), event.odds, "wrote"
        elif event.what in ("sleeping", "slept", "read"):
            yield "", None, event.what
    here.told(written)
    if not choice.before:
        await here.service.remember(who.name, written)


async def _events(
    here: Context, who: Who, choices: Sequence[Choice], form: Form, head: dict[str, Any], usage: bool,
    began: float,
) -> AsyncGenerator[str]:  # fmt: skip
    """Yield the events of a stream; several answers take turns as they are written."""
    queue = asyncio.Queue[tuple[int, str, Odds | None, str] | ApiError | int]()

    async def one(choice: Choice) -> None:
        try:
            async for text, odds, what in _steps(here, who, choice, began):
                queue.put_nowait((choice.number, text, odds, what))
        except Exception as error:  # whatever it is: who reads the stream must not wait for ever
            queue.put_nowait(told(error))
        queue.put_nowait(choice.number)

    tasks = [asyncio.create_task(one(choice)) for choice in choices]
    service = here.service
    extra: dict[str, Any] = {"usage": None} if usage else {}
    offsets = [len(choice.echo) for choice in choices]

    def event(
        number: int, delta: dict[str, Any], reason: str | None = None, odds: dict[str, Any] | None = None
    ) -> str:
        choice: dict[str, Any] = {"index": number, "finish_reason": reason, "logprobs": odds}
        choice |= {"delta": delta} if form.chat else {"text": delta.get("content", "")}
        return _sse({**head, "choices": [choice], **extra})

    try:
        begun, left, silent = set[int](), len(choices), True
        while left:
            found = await queue.get()
            if isinstance(found, ApiError):
                if silent:
                    raise found
                yield _sse({"error": found.body})
                return
            silent = False
            number, text, odds, what = (found, "", None, "done") if isinstance(found, int) else found
            choice = choices[number]
            if what not in ("wrote", "done"):  # nobody may take silence for a connection that has died
                yield f": {what}\n\n"
                continue
            if number not in begun:
                begun.add(number)
                if form.chat:
                    yield event(number, {"role": "assistant", "content": ""})
                elif choice.echo:
                    told_before = _logprobs(choice.before, form, service, 0) if choice.before else None
                    yield event(number, {"content": choice.echo}, odds=told_before)
            if what == "done":
                left -= 1
                yield event(number, {}, choice.written.finish_reason)
            elif odds is not None:
                told_odds = _logprobs([(odds.token, odds)], form, service, offsets[number])
                offsets[number] += len(service.tokenizer.decode([odds.token]))
                yield event(number, {"content": text}, odds=told_odds)
            elif text:
                yield event(number, {"content": text})
        if usage:
            yield _sse({**head, "choices": [], "usage": usage_of(choices)})
        yield "data: [DONE]\n\n"
    finally:
        for task in tasks:
            task.cancel()


async def _chained(first: str, rest: AsyncGenerator[str]) -> AsyncGenerator[str]:
    async with aclosing(rest):
        yield first
        async for event in rest:
            yield event


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _choice(choice: Choice, form: Form, service: Service) -> dict[str, Any]:
    written, odds = choice.written, None
    if choice.wanted.odds is not None:
        told_odds = [*choice.before, *((of.token, of) for of in written.odds)]
        odds = _logprobs(told_odds, form, service, 0)
    said = {"index": choice.number, "finish_reason": written.finish_reason, "logprobs": odds}
    if form.chat:
        answer: dict[str, Any] = {
            "role": "assistant",
            "content": written.text,
            "refusal": None,
            "annotations": [],
        }
        return {**said, "message": answer}
    return {**said, "text": choice.echo + written.text}


def _logprobs(odds: Sequence[Told], form: Form, service: Service, offset: int) -> dict[str, Any]:
    if form.chat:
        known = [of for _, of in odds if of is not None]
        return {"content": listed_odds(service.tokenizer, known), "refusal": None}
    return text_odds(service.tokenizer, odds, offset)


def usage_of(choices: Sequence[Choice]) -> dict[str, Any]:
    """Count tokens: a prompt once, however many answers it has."""
    first = {choice.prompt: choice for choice in reversed(choices)}.values()
    prompt = sum(choice.written.prompt_tokens for choice in first)
    read = sum(choice.read for choice in first)
    written = sum(len(choice.written.tokens) for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": prompt - read, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }
