"""The Responses API: an id stands for a stream, going on costs what is new, and a sleep is a compaction."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from torch import Tensor

from lmsleep.memory.figures import diff_rows
from lmsleep.serve.chat import NO_BUFFER
from lmsleep.serve.context import Context, Who, context
from lmsleep.serve.errors import ApiError, invalid, not_found
from lmsleep.serve.service import Wanted, Written
from lmsleep.serve.store import Kept
from lmsleep.serve.wire import CompactBody, ResponseBody, message
from lmsleep.session import Row, Stream
from lmsleep.session.rows import Odds
from lmsleep.text.chat import Message

router = APIRouter(prefix="/v1", tags=["responses"])
RESPONSE, COMPACTION, CONVERSATION = "response", "compaction", "conversation"


@dataclass(eq=False)
class Input:
    """What a request goes on from and adds to it.

    Attributes:
        kept: the stream.
        tokens: what is new.
        known: tokens of a resent history that `kept` has read.
        items: the new items, as they are listed later.
        conversation: that it belongs to.
    """

    kept: Kept
    tokens: Tensor
    known: int
    items: list[dict[str, Any]]
    conversation: str | None = None


@dataclass(eq=False)
class Making:
    """A response on its way.

    Attributes:
        id: its name.
        body: what was asked.
        input: what it goes on from.
        created: seconds since 1970.
        written: its answer, once it is being written.
        compacted: what was slept on before it, as an item.
        status: of the API.
        task: that makes it in the background.
    """

    id: str
    body: ResponseBody
    input: Input
    created: int = field(default_factory=lambda: int(time.time()))
    written: Written | None = None
    compacted: dict[str, Any] | None = None
    status: str = "in_progress"
    error: dict[str, Any] | None = None
    message_id: str = field(default_factory=lambda: f"msg_{secrets.token_hex(12)}")
    task: "asyncio.Task[None] | None" = None


@router.post("/responses")
async def create(body: ResponseBody, request: Request, who: Who) -> Response:
    """Answer an input."""
    here = context(request)
    here.check(body)
    if body.background and body.stream:
        raise invalid("a response in the background is not streamed", "stream")
    made = Making(f"resp_{secrets.token_hex(12)}", body, await _input(here, who, body))
    if body.background:
        if body.store is False:
            raise invalid("a response in the background must be stored", "store")
        _put(here, who, made)
        made.task = asyncio.create_task(_in_background(here, who, made))
        here.running[made.id] = made.task
        made.task.add_done_callback(lambda _: here.running.pop(made.id, None))
        return JSONResponse(_resource(here, made))
    events = _events(here, who, made)
    if body.stream:
        first = await anext(events)
        return StreamingResponse(_sse(first, events), media_type="text/event-stream", headers=NO_BUFFER)
    async for _ in events:
        pass
    return JSONResponse(_resource(here, made))


@router.get("/responses/{id}")
async def get(id: str, request: Request, who: Who) -> dict[str, Any]:
    """Return a stored response."""
    found = context(request).service.store.get(who.name, RESPONSE, id)
    if found is None:
        raise not_found("response", id)
    response: dict[str, Any] = found.body["response"]
    return response


@router.delete("/responses/{id}")
async def delete(id: str, request: Request, who: Who) -> dict[str, Any]:
    """Delete a response, with its stream and all that nothing else needs."""
    if not await asyncio.to_thread(context(request).service.store.delete, who.name, RESPONSE, id):
        raise not_found("response", id)
    return {"id": id, "object": "response", "deleted": True}


@router.post("/responses/{id}/cancel")
async def cancel(id: str, request: Request, who: Who) -> dict[str, Any]:
    """End a response that is made in the background."""
    here = context(request)
    found = here.service.store.get(who.name, RESPONSE, id)
    if found is None:
        raise not_found("response", id)
    task = here.running.get(id)
    if task is None:
        if found.body["response"]["background"]:
            done: dict[str, Any] = found.body["response"]
            return done
        raise invalid("only a response that is made in the background can be cancelled", "id")
    task.cancel()
    await asyncio.wait([task])
    return await get(id, request, who)


@router.get("/responses/{id}/input_items")
async def input_items(
    id: str, request: Request, who: Who, limit: int = 20, order: str = "desc"
) -> dict[str, Any]:
    """List what a response was given."""
    found = context(request).service.store.get(who.name, RESPONSE, id)
    if found is None:
        raise not_found("response", id)
    return listed(found.body["input"], limit, order)


@router.get("/responses/{id}/changed")
async def changed(id: str, request: Request, who: Who) -> dict[str, Any]:
    """Say what a response changed in the fast weights that it went on from, head by head."""
    here = context(request)
    store = here.service.store
    thing = store.get(who.name, RESPONSE, id)
    after = None if thing is None or thing.stream is None else await here.service.find(who.name, thing.stream)
    if thing is None or after is None:
        raise not_found("response", id)
    before: Kept | None = store.nothing()
    if (previous := thing.body["response"]["previous_response_id"]) is not None:
        old = store.get(who.name, RESPONSE, previous)
        before = None if old is None or old.stream is None else await here.service.find(who.name, old.stream)
    if before is None:
        raise not_found("response", str(previous))
    memories = [(await here.service.whole(kept)).stream.state.memory for kept in (after, before)]
    return {"object": "response.changed", "id": id, "heads": await asyncio.to_thread(diff_rows, *memories)}


@router.post("/responses/compact")
async def compact(body: CompactBody, request: Request, who: Who) -> dict[str, Any]:
    """Sleep on all that was said; the item that is returned stands for it."""
    here = context(request)
    here.check(body)
    given = await _input(here, who, body, answer=False)
    item, written = await _compact(here, who, given.kept, given.tokens)
    usage = _usage(written, given.known)
    id = f"resp_{secrets.token_hex(12)}"
    return {
        "id": id,
        "object": "response.compaction",
        "created_at": int(time.time()),
        "output": [item],
        "usage": usage,
    }


def listed(items: Sequence[dict[str, Any]], limit: int, order: str) -> dict[str, Any]:
    """Return a page of items as the API lists them."""
    if not 1 <= limit <= 100:
        raise invalid(f"limit must lie in 1 ... 100, got {limit}", "limit")
    if order not in ("asc", "desc"):
        raise invalid(f"order must be asc or desc, got {order!r}", "order")
    page = [*items][:: -1 if order == "desc" else 1]
    first, last = (page[0]["id"], page[:limit][-1]["id"]) if page else (None, None)
    return {
        "object": "list",
        "data": page[:limit],
        "first_id": first,
        "last_id": last,
        "has_more": len(page) > limit,
    }


async def _input(here: Context, who: Who, body: ResponseBody | CompactBody, *, answer: bool = True) -> Input:
    """Find what a request goes on from, and turn the rest into tokens."""
    service, store = here.service, here.service.store
    raw = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else list(body.input or [])
    conversation, before, pending = None, None, list[dict[str, Any]]()
    if body.previous_response_id is not None:
        if getattr(body, "conversation", None) is not None:
            raise invalid("previous_response_id and conversation exclude each other", "previous_response_id")
        thing = store.get(who.name, RESPONSE, body.previous_response_id)
        if thing is None or thing.stream is None:
            said = "previous_response_not_found"
            raise not_found("response", body.previous_response_id, said, "previous_response_id")
        before = thing.stream
    elif getattr(body, "conversation", None) is not None:
        asked: Any = body.conversation  # type: ignore[union-attr]
        conversation = asked if isinstance(asked, str) else str(asked.get("id"))
        thing = store.get(who.name, CONVERSATION, conversation)
        if thing is None:
            raise not_found("conversation", conversation, param="conversation")
        before, pending = thing.stream, thing.body["pending"]
    items, messages = list[dict[str, Any]](), list[Message]()
    for i, item in enumerate([*pending, *raw]):
        where = f"input[{i - len(pending)}]"
        kind = item.get("type", "message")
        if kind == COMPACTION:
            found = store.get(who.name, COMPACTION, str(item.get("encrypted_content")))
            if found is None or found.stream is None:
                raise not_found(COMPACTION, str(item.get("encrypted_content"))[:64], param=where)
            # It stands for everything before it.
            before, messages, items = found.stream, [], [item]
            continue
        if kind != "message":
            raise invalid(
                f"items of type {kind!r} are not supported by a model of text", where, "unsupported_content"
            )
        one = message(str(item.get("role")), item.get("content"), where)
        messages.append(one)
        items.append(item if "id" in item else message_item(one))
    if body.instructions:
        messages.insert(0, Message("system", body.instructions))
    if not messages and (answer or before is None):
        raise invalid("input has no message", "input")
    if before is None:
        tokens = service.tokens(_rendered(service.chat.begin, messages), "input")
        kept, rest = await service.prefix(who.name, tokens)
        return Input(kept, rest, len(tokens) - len(rest), items, conversation)
    kept_before = await service.find(who.name, before)
    if kept_before is None:
        raise not_found("stream", before)
    window = kept_before.window
    last = int(window[-1]) if len(window) else None
    # After a sleep nothing tells which token was last; the template then begins a message as it would anyway.
    new = _rendered(lambda m: service.chat.go_on(m, last), messages) if messages else []
    return Input(kept_before, service.tokens(new, "input"), 0, items, conversation)


def _rendered(render: Any, messages: Sequence[Message]) -> list[int]:
    try:
        tokens: list[int] = render(messages)
    except ValueError as error:
        raise invalid(str(error), "input") from None
    return tokens


async def _compact(here: Context, who: Who, kept: Kept, tokens: Tensor) -> tuple[dict[str, Any], Written]:
    """Read tokens, sleep on the open window, and return the item that stands for it all."""
    sleep = here.service.engine.sleep
    if sleep.window is None:
        raise invalid("this model never sleeps, so it cannot compact", "context_management")
    written = Written(kept, tokens, 0)
    row = Row(stream=kept.stream, unread=torch.cat([kept.unread, tokens]), nap=sleep.passes)
    async for event in here.service.follow(row):
        written.row = event.row
    if written.row is None:  # nothing to read, and no window to sleep on
        written.row = row
    here.spent(who, read=len(tokens))
    after = await here.service.keep(who.name, written)
    name = f"cmp_{secrets.token_hex(16)}"
    await asyncio.to_thread(here.service.store.put, who.name, COMPACTION, name, {}, after.id)
    return {"type": COMPACTION, "id": name, "encrypted_content": name}, written


async def _events(here: Context, who: Who, made: Making) -> AsyncIterator[dict[str, Any] | str]:
    """Make a response, and tell of it as the API streams it; strings are comments."""
    body, service, given = made.body, here.service, made.input
    threshold = min(
        (c.compact_threshold for c in body.context_management or [] if c.compact_threshold), default=None
    )
    kept, tokens = given.kept, given.tokens
    began, last = time.perf_counter(), None
    number = 0
    if not len(tokens):
        raise invalid("input has no token", "input")
    yield {"type": "response.created", "response": _resource(here, made)}
    yield {"type": "response.in_progress", "response": _resource(here, made)}
    if (
        threshold is not None
        and kept.stream.tokens + len(kept.unread) + len(tokens) - kept.compacted >= threshold
    ):
        split = len(tokens) - min(service.chat.opening, len(tokens))
        made.compacted, compacted = await _compact(here, who, kept, tokens[:split])
        assert compacted.after is not None
        kept, tokens = compacted.after, tokens[split:]
        yield {"type": "response.output_item.added", "output_index": 0, "item": made.compacted}
        yield {"type": "response.output_item.done", "output_index": 0, "item": made.compacted}
        number = 1
    tells = bool((body.stream_options or {}).get("include_state"))
    wanted = Wanted(
        sampling=body.sampling(),
        longest=body.max_output_tokens or service.longest,
        stop=service.chat.stop,
        odds=body.top_logprobs,
    )
    made.written = written = Written(kept, tokens, given.known)
    item, part = {"output_index": number, "item_id": made.message_id}, {"content_index": 0}
    yield {
        "type": "response.output_item.added",
        "output_index": number,
        "item": _message(made, "in_progress", []),
    }
    empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    yield {"type": "response.content_part.added", **item, **part, "part": empty}
    async for event in here.write(who, written, wanted):
        if event.what == "wrote":
            now = time.perf_counter()
            (here.metrics.first_token if last is None else here.metrics.between).observe(
                now - (last or began)
            )
            last = now
            text = "".join(map(str, event.pieces))
            odds = [] if event.odds is None else _logprobs(here, [event.odds])
            if text:
                yield {"type": "response.output_text.delta", **item, **part, "delta": text, "logprobs": odds}
        if tells:
            yield json.dumps({"what": event.what, **stream_of(event.row.stream)})
        elif event.what not in ("wrote", "done"):
            yield event.what
    here.metrics.whole.observe(time.perf_counter() - began)
    here.told(written)
    made.status = "completed" if written.finish_reason == "stop" else "incomplete"
    if body.store is not False:
        await service.keep(who.name, written)
        await asyncio.to_thread(_put, here, who, made)
    done = _content(here, made)
    yield {
        "type": "response.output_text.done",
        **item,
        **part,
        "text": written.text,
        "logprobs": done["logprobs"],
    }
    yield {"type": "response.content_part.done", **item, **part, "part": done}
    yield {
        "type": "response.output_item.done",
        "output_index": number,
        "item": _message(made, made.status, [done]),
    }
    yield {"type": f"response.{made.status}", "response": _resource(here, made)}


def _put(here: Context, who: Who, made: Making) -> None:
    """Store a response, and where its conversation is now."""
    store, given = here.service.store, made.input
    after = None if made.written is None or made.written.after is None else made.written.after.id
    response = _resource(here, made)
    store.put(who.name, RESPONSE, made.id, {"response": response, "input": given.items}, after)
    if given.conversation is not None and after is not None:
        thing = store.get(who.name, CONVERSATION, given.conversation)
        if thing is not None:  # it may have been deleted meanwhile
            new = [*given.items[len(thing.body["pending"]) :], *response["output"]]
            said = {**thing.body, "items": [*thing.body["items"], *new], "pending": []}
            store.put(who.name, CONVERSATION, thing.id, said, after)


async def _in_background(here: Context, who: Who, made: Making) -> None:
    try:
        async for _ in _events(here, who, made):
            pass
    except asyncio.CancelledError:
        made.status = "cancelled"
    except ApiError as error:
        made.status, made.error = "failed", {"code": error.body["code"], "message": error.body["message"]}
    if made.status in ("cancelled", "failed"):
        await asyncio.to_thread(_put, here, who, made)


async def _sse(first: dict[str, Any] | str, rest: AsyncIterator[dict[str, Any] | str]) -> AsyncIterator[str]:
    """Number the events and write them."""
    number = 0

    def event(said: dict[str, Any] | str) -> str:
        nonlocal number
        if isinstance(said, str):  # a comment: nobody may take silence for a connection that has died
            return f": {said}\n\n"
        text = json.dumps({**said, "sequence_number": number})
        number += 1
        return f"event: {said['type']}\ndata: {text}\n\n"

    yield event(first)
    try:
        async for said in rest:
            yield event(said)
    except ApiError as error:
        yield event({"type": "error", **error.body})


def message_item(said: Message) -> dict[str, Any]:
    """Return an input message as the API lists it."""
    kind = "output_text" if said.role == "assistant" else "input_text"
    part: dict[str, Any] = {"type": kind, "text": said.content}
    if said.role == "assistant":
        part |= {"annotations": [], "logprobs": []}
    id = f"msg_{secrets.token_hex(12)}"
    return {"type": "message", "id": id, "status": "completed", "role": said.role, "content": [part]}


def _message(made: Making, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "type": "message",
        "id": made.message_id,
        "status": status,
        "role": "assistant",
        "content": content,
    }


def _content(here: Context, made: Making) -> dict[str, Any]:
    assert made.written is not None
    odds = _logprobs(here, made.written.odds)
    return {"type": "output_text", "text": made.written.text, "annotations": [], "logprobs": odds}


def _logprobs(here: Context, odds: Sequence[Odds]) -> list[dict[str, Any]]:
    def one(token: int, log_p: float) -> dict[str, Any]:
        text = here.service.tokenizer.decode([token])
        return {"token": text, "logprob": log_p, "bytes": list(text.encode())}

    return [{**one(o.token, o.log_p), "top_logprobs": [one(*other) for other in o.likeliest]} for o in odds]


def _usage(written: Written, known: int) -> dict[str, Any]:
    read, wrote = known + len(written.prompt), len(written.tokens)
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": known, "cache_write_tokens": 0},
        "output_tokens": wrote,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + wrote,
    }


def _resource(here: Context, made: Making) -> dict[str, Any]:
    """Return a response as the API describes it, whole or on its way."""
    body, written = made.body, made.written
    over = made.status in ("completed", "incomplete")
    output = [made.compacted] if made.compacted is not None else []
    if over:
        output.append(_message(made, made.status, [_content(here, made)]))
    reason = {"reason": "max_output_tokens"} if made.status == "incomplete" else None
    return {
        "id": made.id,
        "object": "response",
        "created_at": made.created,
        "completed_at": int(time.time()) if over else None,
        "status": made.status,
        "incomplete_details": reason,
        "model": body.model,
        "previous_response_id": body.previous_response_id,
        "conversation": None if made.input.conversation is None else {"id": made.input.conversation},
        "instructions": body.instructions,
        "output": output,
        "error": made.error,
        "tools": [],
        "tool_choice": "auto",
        "truncation": "disabled",
        "parallel_tool_calls": True,
        "text": {"format": {"type": "text"}},
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "top_logprobs": body.top_logprobs or 0,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "reasoning": None,
        "usage": _usage(written, made.input.known + previous_tokens(made)) if over and written else None,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "store": body.store is not False,
        "background": bool(body.background),
        "service_tier": "default",
        "metadata": body.metadata or {},
        "safety_identifier": None,
        "prompt_cache_key": None,
        "stream": stream_of(
            made.input.kept.stream if written is None or written.row is None else written.row.stream
        ),
    }


def stream_of(stream: Stream) -> dict[str, int]:
    """Say how far a stream is."""
    return {"tokens": stream.tokens, "sleeps": stream.sleeps, "window_tokens": len(stream.window)}


def previous_tokens(made: Making) -> int:
    """Count the tokens that an answer goes on from and that were read before."""
    kept = made.input.kept
    return 0 if made.input.known else kept.stream.tokens + len(kept.unread)
