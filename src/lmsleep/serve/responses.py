"""The Responses API: an id stands for a stream, going on costs what is new, and a sleep is a compaction."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse, Response
from torch import Tensor

from lmsleep.memory.figures import diff_rows
from lmsleep.serve.context import Context, Who, context
from lmsleep.serve.errors import ApiError, invalid, not_found, told
from lmsleep.serve.leaving import Events, end, unless_gone
from lmsleep.serve.odds import listed_odds
from lmsleep.serve.service import Wanted, Written
from lmsleep.serve.store import Kept, Thing
from lmsleep.serve.wire import ODDS, CompactBody, ConversationName, Include, ResponseBody, message
from lmsleep.session import Row, Stream
from lmsleep.session.rows import Odds
from lmsleep.text.chat import Message

router = APIRouter(prefix="/v1", tags=["responses"])
RESPONSE, COMPACTION, CONVERSATION = "response", "compaction", "conversation"
CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}  # of a response that failed; else "server_error"
INCLUDE = Query(alias="include[]")  # as the API's own clients write a list


@dataclass
class Page:
    """Which part of a list is wanted, as the API asks for it."""

    limit: Annotated[int, Query(ge=1, le=100)] = 20
    order: Annotated[Literal["asc", "desc"], Query()] = "desc"
    after: str | None = None
    include: Annotated[list[Include] | None, INCLUDE] = None


@dataclass(eq=False)
class Input:
    """What a request goes on from and adds to it.

    Attributes:
        kept: the stream.
        tokens: what is new.
        items: what was given, as it is listed later.
        new: those that were not in the conversation before.
        conversation: that it belongs to.
        compacted: how many tokens the stream had when somebody last asked for a sleep on it.
        instructions: that the stream has read, these included.
    """

    kept: Kept
    tokens: Tensor
    items: list[dict[str, Any]]
    new: list[dict[str, Any]]
    conversation: str | None
    compacted: int
    instructions: str | None

    @property
    def known(self) -> int:
        """Count the tokens that were read before."""
        return self.kept.stream.tokens + len(self.kept.unread)


@dataclass(eq=False)
class Making:
    """A response on its way.

    Attributes:
        id: its name.
        body: what was asked.
        input: what it goes on from.
        created: seconds since 1970.
        completed: likewise, once it is.
        written: its answer, once it is being written.
        compacted: what was slept on before it, as an item.
        status: of the API.
        error: what ended it.
        message_id: of its answer.
    """

    id: str
    body: ResponseBody
    input: Input
    created: int = field(default_factory=lambda: int(time.time()))
    completed: int | None = None
    written: Written | None = None
    compacted: dict[str, Any] | None = None
    status: str = "in_progress"
    error: dict[str, Any] | None = None
    message_id: str = field(default_factory=lambda: f"msg_{secrets.token_hex(12)}")


@router.post("/responses")
async def create(body: ResponseBody, request: Request, who: Who) -> Response:
    """Answer an input."""
    here = context(request)
    here.check(body)
    if body.background and body.stream:
        raise invalid("a response in the background is not streamed", "stream")
    if body.background and body.store is False:
        raise invalid("a response in the background must be stored", "store")
    id = f"resp_{secrets.token_hex(12)}"
    events = _events(here, who, id, body)
    first = await anext(events)  # errors before it have a status of their own
    if body.stream:
        return Events(_sse(first, events))
    if body.background:
        here.running[id] = task = asyncio.create_task(_in_background(events))
        task.add_done_callback(lambda _: here.running.pop(id, None))
        return JSONResponse(_response(first))
    return JSONResponse(_response(await unless_gone(request, _last(first, events))))


async def _last(
    first: dict[str, Any] | str, events: AsyncGenerator[dict[str, Any] | str]
) -> dict[str, Any] | str:
    """Return the last event."""
    last = first
    async with aclosing(events):
        async for event in events:
            last = event
    return last


def _response(event: dict[str, Any] | str) -> dict[str, Any]:
    """Return the response that the first and the last event of its making tell."""
    assert isinstance(event, dict)
    response: dict[str, Any] = event["response"]
    return response


@router.get("/responses/{id}")
async def get(
    id: str,
    request: Request,
    who: Who,
    stream: bool = False,
    include: Annotated[list[Include] | None, INCLUDE] = None,
) -> dict[str, Any]:
    """Return a stored response."""
    if stream:
        raise invalid("a stored response is not streamed again", "stream", "unsupported_parameter")
    here = context(request)
    return _stored(here, here.find(who, RESPONSE, id))


@router.delete("/responses/{id}")
async def delete(id: str, request: Request, who: Who) -> dict[str, Any]:
    """Delete a response, with its stream and all that nothing else needs."""
    here = context(request)
    here.find(who, RESPONSE, id)
    await _end(here, id)
    await asyncio.to_thread(here.service.store.delete, who.name, RESPONSE, id)
    return {"id": id, "object": "response", "deleted": True}


@router.post("/responses/{id}/cancel")
async def cancel(id: str, request: Request, who: Who) -> dict[str, Any]:
    """End a response that is made in the background."""
    here = context(request)
    if not here.find(who, RESPONSE, id).body["response"]["background"]:
        raise invalid("only a response that is made in the background can be cancelled", "id")
    await _end(here, id)
    return _stored(here, here.find(who, RESPONSE, id))


@router.get("/responses/{id}/input_items")
async def input_items(
    id: str, request: Request, who: Who, page: Annotated[Page, Depends()]
) -> dict[str, Any]:
    """List what a response was given."""
    return listed(context(request).find(who, RESPONSE, id).body["input"], page)


def _stored(here: Context, thing: Thing) -> dict[str, Any]:
    """Return a response as it was stored last."""
    response: dict[str, Any] = thing.body["response"]
    if response["status"] == "in_progress" and thing.id not in here.running:
        error = {"code": "server_error", "message": "the server ended while it made this response"}
        return {**response, "status": "failed", "error": error}
    return response


async def _end(here: Context, id: str) -> None:
    """End what is made in the background."""
    if (task := here.running.get(id)) is not None:
        await end([task])


@router.get("/responses/{id}/changed")
async def changed(id: str, request: Request, who: Who) -> dict[str, Any]:
    """Say what a response changed in the fast weights that it went on from, head by head."""
    here = context(request)
    store = here.service.store
    thing = here.find(who, RESPONSE, id)
    after = None if thing.stream is None else await here.service.find(who.name, thing.stream)
    if after is None:
        raise invalid("this response is not complete", "id")
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
    given = await _input(here, who, body)
    item, written = _item(), Written(given.kept, given.tokens, given.known)
    async for _ in _compact(here, who, item, written, given):
        pass
    return {
        "id": f"resp_{secrets.token_hex(12)}",
        "object": "response.compaction",
        "created_at": int(time.time()),
        "output": [item],
        "usage": _usage(given, written),
    }


def listed(items: Sequence[dict[str, Any]], wanted: Page) -> dict[str, Any]:
    """Return a page of items as the API lists them.

    Raises:
        ApiError: if there is no item `after` which the page should begin.
    """
    page = [*items][:: -1 if wanted.order == "desc" else 1]
    if wanted.after is not None:
        begin = next((i for i, item in enumerate(page) if item["id"] == wanted.after), None)
        if begin is None:
            raise not_found("item", wanted.after, param="after")
        page = page[begin + 1 :]
    data = page[: wanted.limit]
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    has_more = len(page) > wanted.limit
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more}


async def _input(here: Context, who: Who, body: ResponseBody | CompactBody) -> Input:
    """Find what a request goes on from, and turn the rest into tokens."""
    service, store = here.service, here.service.store
    raw = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input or []
    before, conversation = None, _conversation(body)
    if body.previous_response_id is not None:
        if conversation is not None:
            raise invalid("previous_response_id and conversation exclude each other", "previous_response_id")
        before = store.get(who.name, RESPONSE, body.previous_response_id)
        if before is None or before.stream is None:
            said = "previous_response_not_found"
            raise not_found("response", body.previous_response_id, said, "previous_response_id")
    elif conversation is not None:
        before = store.get(who.name, CONVERSATION, conversation)
        if before is None:
            raise not_found("conversation", conversation, param="conversation")
    pending: list[dict[str, Any]] = [] if before is None else before.body.get("pending", [])
    items, messages = list[dict[str, Any]](), list[Message]()
    for i, item in enumerate([*pending, *raw]):
        where = f"input[{i - len(pending)}]"
        if item.get("type") == COMPACTION:
            name = item.get("encrypted_content")
            found = store.get(who.name, COMPACTION, name) if isinstance(name, str) else None
            if found is None:
                raise not_found(COMPACTION, str(name)[:64], param=where)
            # It stands for everything before it.
            before, messages, items = found, [], []
            items.append({"type": COMPACTION, "id": found.id, "encrypted_content": found.id})
        else:
            messages.append(said_in(item, where))
            items.append(message_item(messages[-1], item.get("id")))
    known = {} if before is None else before.body
    instructions, compacted = known.get("instructions"), known.get("compacted", 0)
    # What the stream has read, it need not read again.
    if body.instructions and body.instructions != instructions:
        messages.insert(0, Message("system", body.instructions))
        instructions = body.instructions
    new = items[len(pending) :] if len(items) == len(pending) + len(raw) else items
    kept = None
    if before is not None and before.stream is not None:
        kept = await service.find(who.name, before.stream)
        if kept is None:
            raise not_found("stream", before.stream)
    if not messages and (kept is None or isinstance(body, ResponseBody)):
        raise invalid("input has no message", "input")
    if kept is None:
        tokens = service.tokens(_rendered(service.chat.begin, messages), "input")
        kept, tokens = await service.prefix(who.name, tokens)
    else:
        window = kept.window
        last = int(window[-1]) if len(window) else None
        # After a sleep nothing tells which token was last; the template then begins a message as it would
        # anyway.
        rendered = _rendered(lambda m: service.chat.go_on(m, last), messages) if messages else []
        tokens = service.tokens(rendered, "input")
    return Input(kept, tokens, items, new, conversation, compacted, instructions)


def _conversation(body: ResponseBody | CompactBody) -> str | None:
    asked = body.conversation
    return asked.id if isinstance(asked, ConversationName) else asked


def _rendered(render: Any, messages: Sequence[Message]) -> list[int]:
    try:
        tokens: list[int] = render(messages)
    except ValueError as error:
        raise invalid(str(error), "input") from None
    return tokens


def _item() -> dict[str, Any]:
    """Return a compaction: an item whose name is all that a client needs to keep."""
    name = f"cmp_{secrets.token_hex(16)}"
    return {"type": COMPACTION, "id": name, "encrypted_content": name}


async def _compact(
    here: Context, who: Who, item: dict[str, Any], written: Written, given: Input
) -> AsyncGenerator[str]:
    """Read a prompt, sleep on the open window, and keep it under the name of the item; yield what happens."""
    sleep = here.service.engine.sleep
    if sleep.window is None:
        raise invalid("this model never sleeps, so it cannot compact", "context_management")
    kept = written.before
    row = Row(stream=kept.stream, unread=torch.cat([kept.unread, written.prompt]), nap=sleep.passes)
    written.row = row
    async for event in here.service.follow(row):
        written.row = event.row
        yield event.what
    here.spent(who, read=len(written.prompt))
    after = await here.service.keep(who.name, written)
    said = {"compacted": after.stream.tokens, "instructions": given.instructions}
    await asyncio.to_thread(here.service.store.put, who.name, COMPACTION, item["id"], said, after.id)


async def _events(
    here: Context, who: Who, id: str, body: ResponseBody
) -> AsyncGenerator[dict[str, Any] | str]:
    """Make a response, and tell of it as the API streams it; strings are comments.

    The first and the last event have the response. What fails after the first is told by the last, if
    anybody reads events or comes back for the response; else it is raised.
    """
    conversation = _conversation(body)
    with nullcontext() if conversation is None else here.held(who, conversation):
        made = Making(id, body, await _input(here, who, body))
        if not len(made.input.tokens):
            raise invalid("input has no token", "input")
        if body.background:
            await asyncio.to_thread(_put, here, who, made)
        yield {"type": "response.created", "response": _resource(here, made)}
        yield {"type": "response.in_progress", "response": _resource(here, made)}
        try:
            async with aclosing(_answer(here, who, made)) as events:
                async for event in events:
                    yield event
        except asyncio.CancelledError:
            if body.background:
                made.status = "cancelled"
                await asyncio.to_thread(_put, here, who, made)
            raise
        except Exception as error:
            if not (body.stream or body.background):
                raise
            said = told(error)
            made.status = "failed"
            made.error = {"code": CODES.get(said.status, "server_error"), "message": said.body["message"]}
            if body.background:
                await asyncio.to_thread(_put, here, who, made)
        yield {"type": f"response.{made.status}", "response": _resource(here, made)}


async def _answer(here: Context, who: Who, made: Making) -> AsyncGenerator[dict[str, Any] | str]:
    """Write what a response says, and keep it."""
    body, service, given = made.body, here.service, made.input
    threshold = min(
        (c.compact_threshold for c in body.context_management or [] if c.compact_threshold), default=None
    )
    kept, tokens = given.kept, given.tokens
    began = time.perf_counter()
    if threshold is not None and given.known + len(tokens) - given.compacted >= threshold:
        split = len(tokens) - min(service.chat.opening, len(tokens))
        made.compacted, compacted = _item(), Written(kept, tokens[:split], given.known)
        number = {"output_index": 0}
        yield {"type": "response.output_item.added", **number, "item": made.compacted}
        yield {"type": "response.compaction.compacting", **number, "item_id": made.compacted["id"]}
        async for what in _compact(here, who, made.compacted, compacted, given):
            yield what
        yield {"type": "response.output_item.done", **number, "item": made.compacted}
        assert compacted.after is not None
        kept, tokens = compacted.after, tokens[split:]
        given.compacted = kept.stream.tokens
    wanted = Wanted(
        sampling=body.sampling(),
        longest=body.max_output_tokens or service.longest,
        stop=service.chat.stop,
        odds=body.top_logprobs or (0 if ODDS in (body.include or []) else None),
    )
    made.written = written = Written(kept, tokens, given.known + len(given.tokens) - len(tokens))
    number = {"output_index": 0 if made.compacted is None else 1}
    part = {**number, "item_id": made.message_id, "content_index": 0}
    item = _message(made, "in_progress", [])
    yield {"type": "response.output_item.added", **number, "item": item}
    empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    yield {"type": "response.content_part.added", **part, "part": empty}
    tells = bool(body.stream_options and body.stream_options.include_state)
    async for event in here.timed(here.write(who, written, wanted), began):
        if event.what == "wrote":
            text = "".join(map(str, event.pieces))
            odds = [] if event.odds is None else _logprobs(here, [event.odds])
            if text or odds:
                yield {"type": "response.output_text.delta", **part, "delta": text, "logprobs": odds}
        if tells:
            yield json.dumps({"what": event.what, **stream_of(event.row.stream)})
        elif event.what not in ("wrote", "done"):
            yield event.what
    here.told(written)
    if body.store is not False:
        await service.keep(who.name, written)
    made.status = "completed" if written.finish_reason == "stop" else "incomplete"
    made.completed = int(time.time())
    if body.store is not False:
        await asyncio.to_thread(_put, here, who, made)
    done = _content(here, made)
    text_done = {"text": written.text, "logprobs": done["logprobs"]}
    yield {"type": "response.output_text.done", **part, **text_done}
    yield {"type": "response.content_part.done", **part, "part": done}
    item = _message(made, made.status, [done])
    yield {"type": "response.output_item.done", **number, "item": item}


def _put(here: Context, who: Who, made: Making) -> None:
    """Store a response, and where its conversation is now, both or neither."""
    store, given = here.service.store, made.input
    after = None if made.written is None or made.written.after is None else made.written.after.id
    response = _resource(here, made)
    read = {"instructions": given.instructions, "compacted": given.compacted}
    with store.together():
        store.put(who.name, RESPONSE, made.id, {"response": response, "input": given.items, **read}, after)
        if given.conversation is not None and after is not None:
            thing = store.get(who.name, CONVERSATION, given.conversation)
            if thing is not None:  # it may have been deleted meanwhile
                items = [*thing.body["items"], *given.new, *response["output"]]
                said = {**thing.body, "items": items, "pending": [], **read}
                store.put(who.name, CONVERSATION, thing.id, said, after)


async def _in_background(events: AsyncGenerator[dict[str, Any] | str]) -> None:
    with suppress(ApiError):  # the log has why the store refuses
        async with aclosing(events):
            async for _ in events:
                pass


async def _sse(
    first: dict[str, Any] | str, rest: AsyncGenerator[dict[str, Any] | str]
) -> AsyncGenerator[str]:
    """Number the events and write them."""
    number = 0

    def event(said: dict[str, Any] | str) -> str:
        nonlocal number
        if isinstance(said, str):  # a comment: nobody may take silence for a connection that has died
            return f": {said}\n\n"
        text = json.dumps({**said, "sequence_number": number})
        number += 1
        return f"event: {said['type']}\ndata: {text}\n\n"

    async with aclosing(rest):
        yield event(first)
        async for said in rest:
            yield event(said)


def said_in(item: dict[str, Any], where: str) -> Message:
    """Return what an item says.

    Raises:
        ApiError: if it is no message of text.
    """
    kind = item.get("type", "message")
    if kind != "message":
        raise invalid(
            f"items of type {kind!r} are not supported by a model of text", where, "unsupported_content"
        )
    return message(str(item.get("role")), item.get("content"), where)


def message_item(said: Message, id: Any = None) -> dict[str, Any]:
    """Return an input message as the API lists it, under the `id` that a client gave it or a new one."""
    kind = "output_text" if said.role == "assistant" else "input_text"
    part: dict[str, Any] = {"type": kind, "text": said.content}
    if said.role == "assistant":
        part |= {"annotations": [], "logprobs": []}
    id = id if isinstance(id, str) and id else f"msg_{secrets.token_hex(12)}"
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
    """Return odds as `listed_odds` does; here every token must have bytes, if only none."""

    def whole(one: dict[str, Any]) -> dict[str, Any]:
        return {**one, "bytes": one["bytes"] or []}

    listed = listed_odds(here.service.tokenizer, odds)
    return [{**whole(one), "top_logprobs": [*map(whole, one["top_logprobs"])]} for one in listed]


def _usage(given: Input, written: Written) -> dict[str, Any]:
    read, wrote = given.known + len(given.tokens), len(written.tokens)
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": given.known, "cache_write_tokens": 0},
        "output_tokens": wrote,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + wrote,
    }


def _resource(here: Context, made: Making) -> dict[str, Any]:
    """Return a response as the API describes it, whole or on its way."""
    body, written = made.body, made.written
    extra = {name: value for name, value in (body.model_extra or {}).items() if value is not None}
    over = made.status in ("completed", "incomplete")
    output = [made.compacted] if made.compacted is not None else []
    if over:
        output.append(_message(made, made.status, [_content(here, made)]))
    reason = {"reason": "max_output_tokens"} if made.status == "incomplete" else None
    return {
        "id": made.id,
        "object": "response",
        "created_at": made.created,
        "completed_at": made.completed,
        "status": made.status,
        "incomplete_details": reason,
        "model": body.model,
        "previous_response_id": body.previous_response_id,
        "conversation": None if made.input.conversation is None else {"id": made.input.conversation},
        "instructions": body.instructions,
        "output": output,
        "error": made.error,
        "tools": [],
        "tool_choice": extra.get("tool_choice", "auto"),
        "truncation": extra.get("truncation", "disabled"),
        "parallel_tool_calls": extra.get("parallel_tool_calls", True),
        "text": {"format": {"type": "text"}, **extra.get("text", {})},
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "top_logprobs": body.top_logprobs or 0,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "reasoning": None,
        "usage": _usage(made.input, written) if over and written else None,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "store": body.store is not False,
        "background": bool(body.background),
        "service_tier": "default",
        "metadata": body.metadata or {},
        "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
        "stream": stream_of(
            made.input.kept.stream if written is None or written.row is None else written.row.stream
        ),
    }


def stream_of(stream: Stream) -> dict[str, int]:
    """Say how far a stream is."""
    return {"tokens": stream.tokens, "sleeps": stream.sleeps, "window_tokens": len(stream.window)}
