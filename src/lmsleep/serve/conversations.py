"""Conversations: a stream with a name that goes on with every response."""

import asyncio
import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import ConfigDict

from lmsleep.serve.context import Context, Who, context
from lmsleep.serve.errors import invalid, not_found
from lmsleep.serve.responses import CONVERSATION, Page, listed, message_item, said_in
from lmsleep.serve.store import Thing
from lmsleep.serve.wire import Sent

router = APIRouter(prefix="/v1/conversations", tags=["conversations"])


class ConversationBody(Sent):
    """A new conversation."""

    model_config = ConfigDict(extra="forbid")
    items: list[dict[str, Any]] | None = None
    metadata: dict[str, str] | None = None


class MetadataBody(Sent):
    """What is changed of a conversation."""

    model_config = ConfigDict(extra="forbid")
    metadata: dict[str, str] | None


class ItemsBody(Sent):
    """Items that are added."""

    model_config = ConfigDict(extra="forbid")
    items: list[dict[str, Any]]


@router.post("")
async def create(body: ConversationBody, request: Request, who: Who) -> dict[str, Any]:
    """Begin a conversation."""
    here, items = context(request), _items(body.items or [])
    id = f"conv_{secrets.token_hex(12)}"
    said = {"metadata": body.metadata or {}, "items": items, "pending": items}
    await asyncio.to_thread(here.service.store.put, who.name, CONVERSATION, id, said)
    return _resource(here.find(who, CONVERSATION, id))


@router.get("/{id}")
async def get(id: str, request: Request, who: Who) -> dict[str, Any]:
    """Describe a conversation."""
    return _resource(context(request).find(who, CONVERSATION, id))


@router.post("/{id}")
async def update(id: str, body: MetadataBody, request: Request, who: Who) -> dict[str, Any]:
    """Replace its metadata."""
    here = context(request)
    with here.held(who, id):
        thing = here.find(who, CONVERSATION, id)
        await _put(here, who, thing, {"metadata": body.metadata or {}})
    return _resource(here.find(who, CONVERSATION, id))


@router.delete("/{id}")
async def delete(id: str, request: Request, who: Who) -> dict[str, Any]:
    """Delete a conversation; its responses stay."""
    here = context(request)
    with here.held(who, id):
        here.find(who, CONVERSATION, id)
        await asyncio.to_thread(here.service.store.delete, who.name, CONVERSATION, id)
    return {"id": id, "object": "conversation.deleted", "deleted": True}


@router.get("/{id}/items")
async def items(id: str, request: Request, who: Who, page: Annotated[Page, Depends()]) -> dict[str, Any]:
    """List what was said."""
    return listed(context(request).find(who, CONVERSATION, id).body["items"], page)


@router.post("/{id}/items")
async def add(id: str, body: ItemsBody, request: Request, who: Who) -> dict[str, Any]:
    """Add items; they are read with the next response."""
    here, new = context(request), _items(body.items)
    with here.held(who, id):
        thing = here.find(who, CONVERSATION, id)
        await _put(here, who, thing, {name: [*thing.body[name], *new] for name in ("items", "pending")})
    return listed(new, Page(limit=len(new), order="asc"))


@router.get("/{id}/items/{item}")
async def item(id: str, item: str, request: Request, who: Who) -> dict[str, Any]:
    """Return one item."""
    for found in context(request).find(who, CONVERSATION, id).body["items"]:
        if found["id"] == item:
            one: dict[str, Any] = found
            return one
    raise not_found("item", item)


@router.delete("/{id}/items/{item}")
async def remove(id: str, item: str, request: Request, who: Who) -> dict[str, Any]:
    """Remove an item that was not read yet; what was read is part of the memory and cannot be taken out."""
    here = context(request)
    with here.held(who, id):
        thing = here.find(who, CONVERSATION, id)
        left = {name: [i for i in thing.body[name] if i["id"] != item] for name in ("items", "pending")}
        if len(left["items"]) == len(thing.body["items"]):
            raise not_found("item", item)
        if len(left["pending"]) == len(thing.body["pending"]):
            raise invalid(
                "this item has been read, and a memory cannot unread it; delete the conversation", "item"
            )
        await _put(here, who, thing, left)
    return _resource(here.find(who, CONVERSATION, id))


def _items(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return items as they are listed, each checked to be a message of text."""
    return [message_item(said_in(item, f"items[{i}]"), item.get("id")) for i, item in enumerate(given)]


async def _put(here: Context, who: Who, thing: Thing, changes: dict[str, Any]) -> None:
    said = {**thing.body, **changes}
    await asyncio.to_thread(here.service.store.put, who.name, CONVERSATION, thing.id, said, thing.stream)


def _resource(thing: Thing) -> dict[str, Any]:
    said = {"id": thing.id, "object": "conversation", "created_at": int(thing.created)}
    return {**said, "metadata": thing.body["metadata"]}
