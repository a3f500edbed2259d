"""POST /v1/chat/completions and /v1/completions: the whole history comes with every request.

What of it has been read before is found, so that only what is new is read.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import torch
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from torch import Tensor

from lmsleep.serve.context import Context, Who, context
from lmsleep.serve.errors import ApiError, invalid
from lmsleep.serve.service import Service, Wanted, Written
from lmsleep.serve.wire import ChatBody, CompletionBody, Many, message
from lmsleep.session.rows import Odds

router = APIRouter(prefix="/v1", tags=["completions"])


class _Form:
    """How one of the two endpoints writes what both do."""

    def __init__(self, name: str, object: str, id: str, chunk: str) -> None:
        self.name, self.object, self.id, self.chunk = name, object, id, chunk

    @property
    def chat(self) -> bool:
        return self.name == "chat"


CHAT = _Form("chat", "chat.completion", "chatcmpl", "chat.completion.chunk")
TEXT = _Form("text", "text_completion", "cmpl", "text_completion")


@router.post("/chat/completions")
async def chat(body: ChatBody, request: Request, who: Who) -> Response:
    """Answer a conversation."""
    here = context(request)
    here.check(body)
    service = here.service
    messages = [message(m.role, m.content, f"messages[{i}]") for i, m in enumerate(body.messages)]
    try:
        tokens = service.chat.begin(messages)
    except ValueError as error:
        raise invalid(str(error), "messages") from None
    odds = (body.top_logprobs or 0) if body.logprobs else None
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    wanted = _wanted(service, body, body.max_completion_tokens or body.max_tokens, odds)
    return await _answer(here, who, body, [service.tokens(tokens, "messages")], wanted, CHAT, request)


@router.post("/completions")
async def completions(body: CompletionBody, request: Request, who: Who) -> Response:
    """Go on with texts."""
    here = context(request)
    here.check(body)
    if body.echo:
        raise invalid("echo is not supported", "echo", "unsupported_parameter")
    prompts: list[Any] = [body.prompt]
    if isinstance(body.prompt, list) and not all(isinstance(p, int) for p in body.prompt):
        prompts = list(body.prompt)
    if not prompts or len(prompts) > 128:
        raise invalid("prompt must be 1 to 128 texts", "prompt")
    tokens = [here.service.tokens(prompt, "prompt") for prompt in prompts]
    wanted = _wanted(here.service, body, body.max_tokens or 16, body.logprobs)
    return await _answer(here, who, body, tokens, wanted, TEXT, request)


def _wanted(service: Service, body: Many, longest: int | None, odds: int | None) -> Wanted:
    ends = service.chat.stop if isinstance(body, ChatBody) else ()
    return Wanted(
        sampling=body.sampling(),
        longest=longest or service.longest,
        stop=(*body.stops(), *ends),
        seed=body.seed,
        odds=odds,
    )


async def _answer(
    here: Context,
    who: Who,
    body: Many,
    prompts: Sequence[Tensor],
    wanted: Wanted,
    form: _Form,
    request: Request,
) -> Response:
    """Write n answers to each prompt, and send them at once or as they are written."""
    began = time.perf_counter()
    asked = []
    for prompt in prompts:
        if not len(prompt):
            raise invalid("the prompt has no token", "prompt")
        kept, rest = await here.service.prefix(who.name, prompt)
        for _ in range(body.n or 1):
            asked.append(Written(kept, rest, len(prompt) - len(rest)))
    id, created = f"{form.id}-{secrets.token_hex(12)}", int(time.time())
    head = {"id": id, "created": created, "model": body.model, "system_fingerprint": here.fingerprint}
    if body.stream:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        events = _events(here, who, asked, wanted, form, {**head, "object": form.chunk}, usage, began)
        first = await anext(events)  # errors before the first byte have a status of their own
        return StreamingResponse(_chained(first, events), media_type="text/event-stream", headers=NO_BUFFER)
    tasks = [asyncio.create_task(_whole(here, who, w, wanted, i, began)) for i, w in enumerate(asked)]
    gone, written = asyncio.create_task(_gone(request)), asyncio.gather(*tasks)
    try:
        either: list[asyncio.Future[Any]] = [written, gone]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not written.done():
            return Response(status_code=499)
        await written  # raises what ended one of them
    finally:
        for task in (*tasks, gone):
            task.cancel()
    choices = [_choice(w, i, form, wanted, here.service) for i, w in enumerate(asked)]
    return JSONResponse({**head, "object": form.object, "choices": choices, "usage": usage_of(asked)})


async def _gone(request: Request) -> None:
    """Wait until the client has left."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.25)


async def _whole(
    here: Context, who: Who, written: Written, wanted: Wanted, number: int, began: float
) -> None:
    async for _ in _steps(here, who, written, _numbered(wanted, number), began):
        pass


def _numbered(wanted: Wanted, number: int) -> Wanted:
    """Return how the answer of that number is drawn: each by a seed of its own."""
    from dataclasses import replace

    return wanted if wanted.seed is None else replace(wanted, seed=wanted.seed + number)


async def _steps(
    here: Context, who: Who, written: Written, wanted: Wanted, began: float
) -> AsyncIterator[tuple[str, Odds | None, str]]:
    """Yield what is written, piece by piece, with its odds; keep it in the end."""
    last = None
    async for event in here.write(who, written, wanted):
        now = time.perf_counter()
        if event.what == "wrote":
            (here.metrics.first_token if last is None else here.metrics.between).observe(
                now - (last or began)
            )
            last = now
            yield "".join(map(str, event.pieces)), event.odds, "wrote"
        elif event.what in ("sleeping", "slept", "read"):
            yield "", None, event.what
    here.metrics.whole.observe(time.perf_counter() - began)
    here.told(written)
    await here.service.keep(who.name, written)


async def _events(
    here: Context, who: Who, asked: Sequence[Written], wanted: Wanted, form: _Form, head: dict[str, Any],
    usage: bool, began: float,
) -> AsyncIterator[str]:  # fmt: skip
    """Yield the events of a stream; several answers take turns as they are written."""
    queue = asyncio.Queue[tuple[int, str, Odds | None, str] | Exception | int]()

    async def one(number: int) -> None:
        try:
            async for text, odds, what in _steps(here, who, asked[number], _numbered(wanted, number), began):
                queue.put_nowait((number, text, odds, what))
        except ApiError as error:
            queue.put_nowait(error)
        queue.put_nowait(number)

    tasks = [asyncio.create_task(one(i)) for i in range(len(asked))]
    extra: dict[str, Any] = {"usage": None} if usage else {}

    def event(number: int, delta: dict[str, Any], reason: str | None = None, odds: Odds | None = None) -> str:
        choice: dict[str, Any] = {"index": number, "finish_reason": reason, "logprobs": None}
        if odds is not None:
            choice["logprobs"] = _logprobs([odds], form, here.service)
        choice |= {"delta": delta} if form.chat else {"text": delta.get("content", "")}
        return _sse({**head, "choices": [choice], **extra})

    try:
        begun, left = set[int](), len(asked)
        while left:
            found = await queue.get()
            if isinstance(found, ApiError):
                if not begun:
                    raise found
                yield _sse({"error": found.body})
                return
            if isinstance(found, int):
                left -= 1
                yield event(found, {}, asked[found].finish_reason)
                continue
            assert not isinstance(found, Exception)
            number, text, odds, what = found
            if what != "wrote":
                if begun:  # nobody may take silence for a connection that has died
                    yield f": {what}\n\n"
                continue
            if number not in begun:
                begun.add(number)
                if form.chat:
                    yield event(number, {"role": "assistant", "content": ""})
            if text or odds is not None:
                yield event(number, {"content": text}, odds=odds)
        if usage:
            yield _sse({**head, "choices": [], "usage": usage_of(asked)})
        yield "data: [DONE]\n\n"
    finally:
        for task in tasks:
            task.cancel()


async def _chained(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for event in rest:
        yield event


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


NO_BUFFER = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def _choice(written: Written, number: int, form: _Form, wanted: Wanted, service: Service) -> dict[str, Any]:
    odds = None if wanted.odds is None else _logprobs(written.odds, form, service)
    choice = {"index": number, "finish_reason": written.finish_reason, "logprobs": odds}
    if form.chat:
        return {**choice, "message": {"role": "assistant", "content": written.text, "refusal": None}}
    return {**choice, "text": written.text}


def _logprobs(odds: Sequence[Odds], form: _Form, service: Service) -> dict[str, Any]:
    def spelled(token: int) -> str:
        return service.tokenizer.decode([token])

    if form.chat:

        def one(token: int, log_p: float) -> dict[str, Any]:
            return {"token": spelled(token), "logprob": log_p, "bytes": list(spelled(token).encode())}

        content = [
            {**one(o.token, o.log_p), "top_logprobs": [one(*other) for other in o.likeliest]} for o in odds
        ]
        return {"content": content, "refusal": None}
    texts = [spelled(o.token) for o in odds]
    offsets = torch.tensor([0, *map(len, texts)]).cumsum(0).tolist()[:-1]
    return {
        "tokens": texts,
        "token_logprobs": [o.log_p for o in odds],
        "top_logprobs": [{spelled(t): p for t, p in o.likeliest} for o in odds],
        "text_offset": offsets,
    }


def usage_of(asked: Sequence[Written]) -> dict[str, Any]:
    """Count tokens: a prompt once, however many answers it has."""
    prompts = {id(w.prompt): w for w in asked}.values()
    prompt, known = sum(w.prompt_tokens for w in prompts), sum(w.known for w in prompts)
    written = sum(len(w.tokens) for w in asked)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": known, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }
