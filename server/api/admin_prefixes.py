"""The admin API's public prefixes: beginnings of prompts whose KV every tenant finds, as nothing else."""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from ktransformers.server.api.admin_access import PREFIX, Query, act, answer, ask, page
from ktransformers.server.api.openai_requests import Message
from ktransformers.server.api.parameters import StrictModel
from ktransformers.server.auth import Role, requires
from ktransformers.server.errors import RESPONSES
from ktransformers.server.public_prefixes import tokens_of
from ktransformers.server.routing import GuardedRoute, context_of
from ktransformers.server.tenants.records import MAX_NAME, PublicPrefix

router = APIRouter(route_class=GuardedRoute, tags=["admin"], responses=RESPONSES)


class NewPrefix(StrictModel):
    """POST /organization/public_prefixes: a `text`, as prompts of completions begin, or `messages`, as
    conversations do."""

    name: Annotated[str, Field(max_length=MAX_NAME)]
    text: Annotated[str, Field(min_length=1, max_length=1 << 20)] | None = None
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=2048)] | None = None


def _prefix(prefix: PublicPrefix) -> dict[str, Any]:
    return {
        "id": prefix.id,
        "object": "organization.public_prefix",
        "name": prefix.name,
        "created_at": prefix.created_at,
    }


@router.get(f"{PREFIX}/public_prefixes", operation_id="list_public_prefixes")
@requires(Role.ADMIN)
async def list_public_prefixes(request: Request) -> Response:
    """By age."""
    query = Query(request, "after", "limit")
    return page(query, await ask(request, lambda store: store.public_prefixes()), _prefix)


@router.post(f"{PREFIX}/public_prefixes", operation_id="create_public_prefix")
@requires(Role.ADMIN)
async def create_public_prefix(body: NewPrefix, request: Request) -> Response:
    """Its KV is computed within a second or so, when there is room."""
    given: dict[str, object] = {}
    if body.text is not None:
        given["text"] = body.text
    if body.messages is not None:
        given["messages"] = [message.for_template() for message in body.messages]
    tokens = await tokens_of(context_of(request).generator, given)
    made = await act(request, lambda store, actor: store.publish(body.name, given, actor))
    return answer(_prefix(made) | {"tokens": len(tokens)})


@router.delete(f"{PREFIX}/public_prefixes/{{prefix}}", operation_id="delete_public_prefix")
@requires(Role.ADMIN)
async def delete_public_prefix(prefix: str, request: Request) -> Response:
    """It is found no longer."""
    gone = await act(request, lambda store, actor: store.withdraw(prefix, actor))
    return answer({"object": "organization.public_prefix.deleted", "id": gone.id, "deleted": True})
