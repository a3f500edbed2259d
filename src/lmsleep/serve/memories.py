"""Memories as a resource: read into, asked, forked, compared, merged, carried away and brought back."""

import asyncio
import secrets
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ConfigDict, Field

from lmsleep.memory.figures import diff_rows, head_rows
from lmsleep.serve.context import Context, Who, context
from lmsleep.serve.errors import ApiError, invalid
from lmsleep.serve.leaving import unless_gone
from lmsleep.serve.service import Wanted, Written
from lmsleep.serve.store import NO_TOKENS, Kept, Thing
from lmsleep.serve.wire import Count, Sent
from lmsleep.session import Row, Sampling, Stream, saving
from lmsleep.state import Memory, Origin, State

router = APIRouter(prefix="/v1/memories", tags=["memories"])
MEMORY = "memory"
OCTETS = "application/octet-stream"
Name = Annotated[str, Field(max_length=200)]
Tags = Annotated[dict[Name, Name], Field(max_length=64)]


class Strict(Sent):
    """A body without unknown fields."""

    model_config = ConfigDict(extra="forbid")


class NewMemory(Strict):
    """A memory to be made.

    Attributes:
        name: for people.
        text: read into it, in the background.
        tags: for programs.
    """

    name: Name = ""
    text: str = ""
    tags: Tags = Field(default_factory=dict)


class Text(Strict):
    """Text to be read."""

    text: str


class Fork(Strict):
    """A fork to be made."""

    name: Name | None = None


class Merge(Strict):
    """A merge to be made."""

    memories: Annotated[list[str], Field(min_length=2, max_length=64)]
    weights: list[float] | None = None
    name: Name = ""


class Question(Strict):
    """A question to a memory."""

    question: Annotated[str, Field(min_length=1)]
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: int | None = None
    stop: list[str] = Field(default_factory=list)


@router.post("", status_code=201)
async def create(body: NewMemory, request: Request, who: Who) -> JSONResponse:
    """Make a memory; text is read in the background."""
    here = context(request)
    _room(here, who)
    tokens = here.service.tokens(body.text, "text")
    empty = Written(here.service.store.nothing(), tokens[:0], 0)
    empty.row = Row(stream=empty.before.stream)
    kept = await here.service.keep(who.name, empty)
    id = f"mem_{secrets.token_hex(12)}"
    origin = Origin().id
    said = {"name": body.name, "tags": body.tags, "origin": origin, "parents": [], "status": "ready"}
    await asyncio.to_thread(here.service.store.put, who.name, MEMORY, id, said, kept.id)
    if len(tokens):
        here.spent(who, read=len(tokens))
        await here.reader.read(who, id, tokens)
    return JSONResponse(_resource(here, who, here.find(who, MEMORY, id)), 202 if len(tokens) else 201)


@router.get("")
async def all(
    request: Request, who: Who, limit: Annotated[int, Query(ge=1, le=100)] = 20, after: str = ""
) -> dict[str, Any]:
    """List memories, the newest first."""
    here = context(request)
    found = await asyncio.to_thread(here.service.store.all, who.name, MEMORY, limit + 1, after)
    data = [_resource(here, who, thing) for thing in found[:limit]]
    last = data[-1]["id"] if data else None
    return {"object": "list", "data": data, "last_id": last, "has_more": len(found) > limit}


@router.get("/{id}")
async def get(id: str, request: Request, who: Who) -> dict[str, Any]:
    """Describe a memory: how far it has read, and its fast weights head by head."""
    here = context(request)
    thing = here.find(who, MEMORY, id)
    kept = await _kept(here, who, thing)
    memory = kept.stream.state.memory
    heads = await asyncio.to_thread(head_rows, memory)
    return {**_resource(here, who, thing), "bytes": memory.nbytes, "heads": heads}


@router.delete("/{id}")
async def delete(id: str, request: Request, who: Who) -> dict[str, Any]:
    """Delete a memory, with all that nothing else needs."""
    here = context(request)
    here.find(who, MEMORY, id)
    await here.reader.stop(id)
    await asyncio.to_thread(here.service.store.delete, who.name, MEMORY, id)
    return {"id": id, "object": "memory.deleted", "deleted": True}


@router.post("/{id}/read", status_code=202)
async def read(id: str, body: Text, request: Request, who: Who) -> JSONResponse:
    """Read text into a memory, in the background."""
    here = context(request)
    thing = _idle(here, who, id)
    read, _, _ = here.service.store.position(who.name, thing.stream or "")
    tokens = here.service.tokens(body.text, "text", first=not read)
    if len(tokens):
        here.spent(who, read=len(tokens))
        await here.reader.read(who, id, tokens)
    return JSONResponse(_resource(here, who, here.find(who, MEMORY, thing.id)), 202)


@router.post("/{id}/sleep")
async def sleep(id: str, request: Request, who: Who) -> dict[str, Any]:
    """Sleep on the open window now."""
    here = context(request)
    thing = _idle(here, who, id)
    kept = await _kept(here, who, thing)
    if here.service.engine.sleep.window is None:
        raise invalid("this model never sleeps", "id")
    with here.reader.held(id):
        written = Written(kept, kept.unread[:0], 0, row=Row(stream=kept.stream))
        nap = Row(stream=kept.stream, unread=kept.unread, nap=here.service.engine.sleep.passes)
        async for event in here.service.follow(nap):
            written.row = event.row
        after = await here.service.keep(who.name, written)
        await asyncio.to_thread(here.service.store.put, who.name, MEMORY, id, thing.body, after.id)
    return _resource(here, who, here.find(who, MEMORY, id))


@router.post("/{id}/ask")
async def ask(id: str, body: Question, request: Request, who: Who) -> dict[str, Any]:
    """Ask a memory something; it stays as it is."""
    here = context(request)
    service = here.service
    kept = await _kept(here, who, here.find(who, MEMORY, id))
    empty = not (kept.stream.tokens or len(kept.unread))
    written = Written(kept, service.tokens(body.question, "question", first=empty), 0)
    wanted = Wanted(
        sampling=Sampling(temperature=body.temperature, top_p=body.top_p),
        longest=body.max_tokens or service.longest,
        stop=tuple(body.stop),
        seed=body.seed,
    )

    async def write() -> None:
        async for _ in here.write(who, written, wanted):
            pass

    await unless_gone(request, write())
    here.told(written)
    usage = {"read": len(written.prompt), "written": len(written.tokens), "sleeps": written.sleeps}
    return {
        "object": "memory.answer",
        "memory": id,
        "answer": written.text,
        "finish_reason": written.finish_reason,
        "usage": usage,
    }


@router.post("/{id}/fork", status_code=201)
async def fork(id: str, body: Fork, request: Request, who: Who) -> dict[str, Any]:
    """Make a memory that has read the same; neither changes the other."""
    here = context(request)
    _room(here, who)
    thing = here.find(who, MEMORY, id)
    new = f"mem_{secrets.token_hex(12)}"
    name = thing.body["name"] if body.name is None else body.name
    child = {"name": name, "origin": Origin().id, "parents": [thing.body["origin"]], "status": "ready"}
    await asyncio.to_thread(
        here.service.store.put, who.name, MEMORY, new, {**thing.body, **child}, thing.stream
    )
    return _resource(here, who, here.find(who, MEMORY, new))


@router.get("/{id}/diff/{other}")
async def diff(id: str, other: str, request: Request, who: Who) -> dict[str, Any]:
    """Compare two memories head by head."""
    here = context(request)
    first, second = [(await _whole(here, who, name)).stream.state.memory for name in (id, other)]
    heads = await asyncio.to_thread(diff_rows, first, second)
    return {"object": "memory.diff", "first": id, "second": other, "heads": heads}


@router.post("/merge", status_code=201)
async def merge(body: Merge, request: Request, who: Who) -> dict[str, Any]:
    """Add memories up, with weights."""
    here = context(request)
    _room(here, who)
    things = [here.find(who, MEMORY, id) for id in body.memories]
    keeps = [await _kept(here, who, thing) for thing in things]
    for thing, kept in zip(things, keeps, strict=True):
        if len(kept.window):
            said = f"{thing.id} has {len(kept.window)} tokens in its open window, which a merge would lose"
            raise invalid(f"{said}; POST /v1/memories/{thing.id}/sleep first", "memories")
    first, *others = [kept.stream.state.memory for kept in keeps]
    try:
        merged = first.merge(others, body.weights)
    except ValueError as error:
        raise invalid(str(error), "weights") from None
    parents = [thing.body["origin"] for thing in things]
    read = sum(kept.stream.tokens for kept in keeps), sum(kept.stream.sleeps for kept in keeps)
    thing = await _bring(here, who, merged, read, {"name": body.name, "tags": {}, "parents": parents})
    return _resource(here, who, thing)


@router.get("/{id}/content")
async def content(id: str, request: Request, who: Who) -> Response:
    """Download a memory as a file, which `lmsleep ask` and `Session.load` take."""
    here = context(request)
    thing = here.find(who, MEMORY, id)
    kept = await _kept(here, who, thing)
    store = here.service.store

    def written() -> bytes:
        stream = kept.stream
        if len(kept.unread):
            stream = replace(stream, window=kept.unread, tokens=stream.tokens + len(kept.unread))
        origin = Origin(
            id=thing.body["origin"], parents=tuple(thing.body["parents"]), model=store.origin.model,
            tokens=stream.tokens, sleeps=stream.sleeps, passes=store.sleep.passes, tags=thing.body["tags"],
        )  # fmt: skip
        with tempfile.TemporaryDirectory(dir=store.scratch) as folder:
            path = Path(folder) / "memory"
            saving.write(path, stream, origin, store.sleep, None)
            return path.read_bytes()

    headers = {"Content-Disposition": f'attachment; filename="{id}.mem"'}
    return Response(await asyncio.to_thread(written), media_type=OCTETS, headers=headers)


@router.post("/upload", status_code=201)
async def upload(request: Request, who: Who, name: str = "") -> dict[str, Any]:
    """Take up a memory file, sent as it is; refused if another model or another sleep wrote it."""
    here = context(request)
    _room(here, who)
    store = here.service.store
    data = await here.body(request)

    def read() -> tuple[State, Origin, torch.Tensor]:
        with tempfile.TemporaryDirectory(dir=store.scratch) as folder:
            path = Path(folder) / "memory"
            path.write_bytes(data)
            try:
                state, origin, sleep, window = saving.read(path, store.model, store.sleep)
            except ValueError as error:
                raise invalid(str(error).replace(str(path), "the file"), "file", "foreign_memory") from None
        if sleep != store.sleep:
            raise invalid(
                f"the file was read with {sleep}, this server sleeps by {store.sleep}",
                "file",
                "foreign_memory",
            )
        return state, origin, window

    state, origin, window = await asyncio.to_thread(read)
    said = {"name": name, "tags": dict(origin.tags), "origin": origin.id, "parents": list(origin.parents)}
    counted = (origin.tokens - len(window), origin.sleeps)
    thing = await _bring(here, who, state, counted, said, window)
    return _resource(here, who, thing)


async def _bring(
    here: Context, who: Who, state: State | Memory, counted: tuple[int, int], said: dict[str, Any],
    window: torch.Tensor = NO_TOKENS,
) -> Thing:  # fmt: skip
    """Keep a state that came from elsewhere as a memory."""
    service, nothing = here.service, here.service.store.nothing()
    if isinstance(state, Memory):
        state = State(Memory(state.layers), nothing.stream.state.cache)
    begun = Stream.begin(state, tokens=counted[0], sleeps=counted[1])
    try:
        kept = await asyncio.to_thread(service.store.bring, who.name, begun, window)
    except ValueError:
        raise invalid("the memory would hold NaN or infinity", "weights") from None
    id = f"mem_{secrets.token_hex(12)}"
    body = {"origin": Origin().id, "status": "ready", **said}
    await asyncio.to_thread(service.store.put, who.name, MEMORY, id, body, kept.id)
    return here.find(who, MEMORY, id)


def _room(here: Context, who: Who) -> None:
    """Refuse one memory too many; the store refuses bytes.

    Raises:
        ApiError: 403.
    """
    quota, store = here.keys.quota, here.service.store
    if quota.memories is not None and store.count(who.name, MEMORY) >= quota.memories:
        raise ApiError(403, f"{quota.memories} memories are in use; delete one", code="quota_exceeded")


def _idle(here: Context, who: Who, id: str) -> Thing:
    """Return a memory that reads nothing just now; raises ApiError 409 for one that does."""
    thing = here.find(who, MEMORY, id)
    if here.reader.busy(id):
        raise ApiError(409, f"memory {id!r} is being read into; wait, or ask a fork of it", code="busy")
    return thing


async def _kept(here: Context, who: Who, thing: Thing) -> Kept:
    """Return the stream of a memory."""
    while thing.stream is not None:
        if (kept := await here.service.find(who.name, thing.stream)) is not None:
            return kept
        # Read on meanwhile, so that it has another one now?
        before, thing = thing.stream, here.find(who, MEMORY, thing.id)
        if thing.stream == before:
            break
    raise ApiError(500, "the stream of this memory is missing", code="lost")


async def _whole(here: Context, who: Who, id: str) -> Kept:
    """Return a memory whose open window has been read, so that its state is what it knows."""
    return await here.service.whole(await _kept(here, who, here.find(who, MEMORY, id)))


def _resource(here: Context, who: Who, thing: Thing) -> dict[str, Any]:
    store, body = here.service.store, thing.body
    position = store.position(who.name, thing.stream or "")
    progress = here.reader.progress(thing.id)
    return {
        "id": thing.id,
        "object": MEMORY,
        "created_at": int(thing.created),
        "name": body["name"],
        "tags": body["tags"],
        "origin": body["origin"],
        "parents": body["parents"],
        "status": "reading" if progress else body["status"],
        "tokens": position[0],
        "sleeps": position[1],
        "window_tokens": position[2],
        "reading": progress,
        "error": body.get("error"),
    }
