"""Conversations: a stream with a name that goes on with every response."""

import asyncio
import secrets
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict

from lmsleep.serve.context import Who, context
from lmsleep.serve.errors import invalid, not_found
from lmsleep.serve.responses import CONVERSATION, listed, message_item
from lmsleep.serve.store import Store, Thing
from lmsleep.serve.wire import message

router = APIRouter(prefix="/v1/conversations", tags=["conversations"])


class ConversationBody(BaseModel):
    """A new conversation, or what is changed of one."""

    model_config = ConfigDict(extra="forbid")
    items: list[dict[str, Any]] | None = None
    metadata: dict[str, str] | None = None


class ItemsBody(BaseModel):
    """Items that are added."""

    model_config = ConfigDict(extra="forbid")
    items: list[dict[str, Any]]


@router.post("")
async def create(body: ConversationBody, request: Request, who: Who) -> dict[str, Any]:
    """Begin a conversation."""
    store, items = context(request).service.store, _items(body.items or [])
    id = f"conv_{secrets.token_hex(12)}"
    said = {"metadata": body.metadata or {}, "items": items, "pending": items}
    await asyncio.to_thread(store.put, who.name, CONVERSATION, id, said)
    return _resource(_find(store, who, id))


@router.get("/{id}")
async def get(id: str, request: Request, who: Who) -> dict[str, Any]:
    """Describe a conversation."""
    return _resource(_find(context(request).service.store, who, id))


@router.post("/{id}")
async def update(id: str, body: ConversationBody, request: Request, who: Who) -> dict[str, Any]:
    """Replace its metadata."""
    store = context(request).service.store
    thing = _find(store, who, id)
    said = {**thing.body, "metadata": body.metadata or {}}
    await asyncio.to_thread(store.put, who.name, CONVERSATION, id, said, thing.stream)
    return _resource(_find(store, who, id))


@router.delete("/{id}")
async def delete(id: str, request: Request, who: Who) -> dict[str, Any]:
    """Delete a conversation; its responses stay."""
    if not await asyncio.to_thread(context(request).service.store.delete, who.name, CONVERSATION, id):
        raise not_found(CONVERSATION, id)
    return {"id": id, "object": "conversation.deleted", "deleted": True}


@router.get("/{id}/items")
async def items(id: str, request: Request, who: Who, limit: int = 20, order: str = "desc") -> dict[str, Any]:
    """List what was said."""
    return listed(_find(context(request).service.store, who, id).body["items"], limit, order)


@router.post("/{id}/items")
async def add(id: str, body: ItemsBody, request: Request, who: Who) -> dict[str, Any]:
    """Add items; they are read with the next response."""
    store, new = context(request).service.store, _items(body.items)
    thing = _find(store, who, id)
    said = {**thing.body, "items": [*thing.body["items"], *new], "pending": [*thing.body["pending"], *new]}
    await asyncio.to_thread(store.put, who.name, CONVERSATION, id, said, thing.stream)
    return listed(new, 100, "asc")


@router.get("/{id}/items/{item}")
async def item(id: str, item: str, request: Request, who: Who) -> dict[str, Any]:
    """Return one item."""
    for found in _find(context(request).service.store, who, id).body["items"]:
        if found["id"] == item:
            one: dict[str, Any] = found
            return one
    raise not_found("item", item)


@router.delete("/{id}/items/{item}")
async def remove(id: str, item: str, request: Request, who: Who) -> dict[str, Any]:
    """Remove an item that was not read yet; what was read is part of the memory and cannot be taken out."""
    store = context(request).service.store
    thing = _find(store, who, id)
    pending = [found for found in thing.body["pending"] if found["id"] != item]
    if len(pending) == len(thing.body["pending"]):
        if any(found["id"] == item for found in thing.body["items"]):
            raise invalid(
                "this item has been read, and a memory cannot unread it; delete the conversation", "item"
            )
        raise not_found("item", item)
    left = [found for found in thing.body["items"] if found["id"] != item]
    said = {**thing.body, "items": left, "pending": pending}
    await asyncio.to_thread(store.put, who.name, CONVERSATION, id, said, thing.stream)
    return _resource(_find(store, who, id))


def _items(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return items as they are listed, each checked to be a message of text."""
    said = []
    for i, item in enumerate(given):
        if item.get("type", "message") != "message":
            raise invalid(
                f"items of type {item['type']!r} are not supported", f"items[{i}]", "unsupported_content"
            )
        said.append(message_item(message(str(item.get("role")), item.get("content"), f"items[{i}]")))
    return said


def _find(store: Store, who: Who, id: str) -> Thing:
    thing = store.get(who.name, CONVERSATION, id)
    if thing is None:
        raise not_found(CONVERSATION, id)
    return thing


def _resource(thing: Thing) -> dict[str, Any]:
    said = {"id": thing.id, "object": "conversation", "created_at": int(thing.created)}
    return {**said, "metadata": thing.body["metadata"]}
