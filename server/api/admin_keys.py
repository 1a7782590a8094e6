"""The admin API's keys: service accounts with their API keys, and the keys of administrators.

A key is made for a service account, which is a user of its project; its value is in that one answer and never
again.
"""

import time
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from ktransformers.server.api.admin import KeyLimits, Name, key_limits
from ktransformers.server.api.admin_access import PREFIX, Query, act, answer, ask, page
from ktransformers.server.api.parameters import StrictModel
from ktransformers.server.auth import Role, requires
from ktransformers.server.errors import RESPONSES
from ktransformers.server.routing import GuardedRoute
from ktransformers.server.tenants.records import SCOPES, Account, Key, Limits
from ktransformers.server.tenants.store import Store

router = APIRouter(route_class=GuardedRoute, tags=["admin"], responses=RESPONSES)
PROJECT = f"{PREFIX}/projects/{{project}}"
Seconds = Annotated[int, Field(ge=1, le=10 * 366 * 86400)]
Scopes = Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=len(SCOPES))]


class NewAccount(StrictModel):
    """POST .../service_accounts."""

    name: Name
    create_service_account_only: bool | None = None
    expires_in_seconds: Seconds | None = None


class AccountChange(StrictModel):
    """POST .../service_accounts/{id}."""

    name: Name


class NewKey(KeyLimits):
    """POST .../service_accounts/{id}/api_keys. Limits of a key, OpenAI's API does not have."""

    name: Name | None = None
    expires_in_seconds: Seconds | None = None
    scopes: Scopes = Field(default_factory=list)


class KeyChange(KeyLimits):
    """POST .../api_keys/{id}. What is not given stays as it is."""

    expires_in_seconds: Seconds | None = None
    scopes: Scopes | None = None


class NewAdminKey(StrictModel):
    """POST /organization/admin_api_keys."""

    name: Name
    expires_in_seconds: Seconds | None = None


def _until(seconds: int | None) -> int | None:
    return None if seconds is None else int(time.time()) + seconds


# ---- service accounts


def _account(account: Account) -> dict[str, Any]:
    return {
        "id": account.id,
        "object": "organization.project.service_account",
        "name": account.name,
        "role": "member",
        "created_at": account.created_at,
    }


def _new_key(made: tuple[Key, str]) -> dict[str, Any]:
    key, value = made
    return {
        "id": key.id,
        "object": "organization.project.service_account.api_key",
        "name": key.name,
        "value": value,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
    }


@router.get(f"{PROJECT}/service_accounts", operation_id="list_service_accounts")
@requires(Role.ADMIN)
async def list_service_accounts(project: str, request: Request) -> Response:
    """By age."""

    def accounts(store: Store) -> list[Account]:
        return store.accounts(store.project_by_id(project).id)

    return page(Query(request, "after", "limit"), await ask(request, accounts), _account)


@router.post(f"{PROJECT}/service_accounts", operation_id="create_service_account")
@requires(Role.ADMIN)
async def create_service_account(project: str, body: NewAccount, request: Request) -> Response:
    """A user of the project, with a key unless told otherwise."""

    def create(store: Store, actor: str) -> dict[str, Any]:
        account = store.create_account(project, body.name, actor)
        key = None
        if not body.create_service_account_only:
            until = _until(body.expires_in_seconds)
            key = _new_key(store.create_key(account, body.name, actor, expires_at=until))
        return _account(account) | {"api_key": key}

    return answer(await act(request, create))


@router.get(f"{PROJECT}/service_accounts/{{account}}", operation_id="retrieve_service_account")
@requires(Role.ADMIN)
async def retrieve_service_account(project: str, account: str, request: Request) -> Response:
    """One user of the project."""
    return answer(_account(await ask(request, lambda store: store.account(project, account))))


@router.post(f"{PROJECT}/service_accounts/{{account}}", operation_id="update_service_account")
@requires(Role.ADMIN)
async def update_service_account(
    project: str, account: str, body: AccountChange, request: Request
) -> Response:
    """Its name."""
    changed = await act(
        request, lambda store, actor: store.rename_account(project, account, body.name, actor)
    )
    return answer(_account(changed))


@router.delete(f"{PROJECT}/service_accounts/{{account}}", operation_id="delete_service_account")
@requires(Role.ADMIN)
async def delete_service_account(project: str, account: str, request: Request) -> Response:
    """Its keys work no longer."""
    await act(request, lambda store, actor: store.delete_account(project, account, actor))
    return answer(
        {"id": account, "object": "organization.project.service_account.deleted", "deleted": True}
    )


@router.post(f"{PROJECT}/service_accounts/{{account}}/api_keys", operation_id="create_api_key")
@requires(Role.ADMIN)
async def create_api_key(project: str, account: str, body: NewKey, request: Request) -> Response:
    """One more key, so that the one before can be replaced without a gap."""

    def create(store: Store, actor: str) -> dict[str, Any]:
        owner = store.account(project, account)
        until = _until(body.expires_in_seconds)
        name, limits = body.name or owner.name, Limits(**body.limits())
        return _new_key(
            store.create_key(owner, name, actor, expires_at=until, scopes=body.scopes, limits=limits)
        )

    return answer(await act(request, create))


# ---- keys of projects


def _key(key: Key, owner: Account) -> dict[str, Any]:
    return {
        "id": key.id,
        "object": "organization.project.api_key",
        "name": key.name,
        "redacted_value": key.redacted,
        "created_at": key.created_at,
        "last_used_at": key.last_used_at,
        "expires_at": key.expires_at,
        "scopes": sorted(key.scopes),
        **key_limits(key.limits),
        "owner": {"type": "service_account", "service_account": _account(owner)},
        "owner_project_access": "active",
    }


@router.get(f"{PROJECT}/api_keys", operation_id="list_api_keys")
@requires(Role.ADMIN)
async def list_api_keys(project: str, request: Request) -> Response:
    """By age; the owners of all of them have access."""
    query = Query(request, "after", "limit", "owner_project_access")

    def keys(store: Store) -> list[dict[str, Any]]:
        owners = {account.id: account for account in store.accounts(store.project_by_id(project).id)}
        return [_key(key, owners[key.account]) for key in store.keys(project)]

    found = await ask(request, keys)
    return page(query, [] if query.text("owner_project_access") == "inactive" else found, lambda key: key)


@router.get(f"{PROJECT}/api_keys/{{key}}", operation_id="retrieve_api_key")
@requires(Role.ADMIN)
async def retrieve_api_key(project: str, key: str, request: Request) -> Response:
    """What may be shown of a key."""

    def find(store: Store) -> dict[str, Any]:
        found = store.key(store.project_by_id(project).id, key)
        return _key(found, store.account(project, found.account))

    return answer(await ask(request, find))


@router.post(f"{PROJECT}/api_keys/{{key}}", operation_id="update_api_key")
@requires(Role.ADMIN)
async def update_api_key(project: str, key: str, body: KeyChange, request: Request) -> Response:
    """Its scopes, when it expires, its limits."""
    changes: dict[str, Any] = {}
    if body.expires_in_seconds is not None:
        changes["expires_at"] = _until(body.expires_in_seconds)
    if body.scopes is not None:
        changes["scopes"] = frozenset(body.scopes)

    def change(store: Store, actor: str) -> dict[str, Any]:
        found = store.key(store.project_by_id(project).id, key)
        if limits := body.limits():
            changes["limits"] = msgspec.structs.replace(found.limits, **limits)
        changed = store.change_key(found, actor, **changes)
        return _key(changed, store.account(project, changed.account))

    return answer(await act(request, change))


@router.delete(f"{PROJECT}/api_keys/{{key}}", operation_id="delete_api_key")
@requires(Role.ADMIN)
async def delete_api_key(project: str, key: str, request: Request) -> Response:
    """It works no longer."""

    def revoke(store: Store, actor: str) -> None:
        store.revoke_key(store.key(store.project_by_id(project).id, key), actor)

    await act(request, revoke)
    return answer({"id": key, "object": "organization.project.api_key.deleted", "deleted": True})


# ---- keys of administrators


def _admin_key(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "object": "organization.admin_api_key",
        "name": key.name,
        "redacted_value": key.redacted,
        "created_at": key.created_at,
        "last_used_at": key.last_used_at,
        "expires_at": key.expires_at,
        "owner": {"object": "organization.user", "type": "user", "role": "owner", "name": key.name},
    }


@router.get(f"{PREFIX}/admin_api_keys", operation_id="list_admin_api_keys")
@requires(Role.ADMIN)
async def list_admin_api_keys(request: Request) -> Response:
    """By age."""
    query = Query(request, "after", "limit", "order")
    keys = await ask(request, lambda store: store.keys(""))
    return page(query, keys[::-1] if query.text("order") == "desc" else keys, _admin_key)


@router.post(f"{PREFIX}/admin_api_keys", operation_id="create_admin_api_key")
@requires(Role.ADMIN)
async def create_admin_api_key(body: NewAdminKey, request: Request) -> Response:
    """One more administrator."""
    key, value = await act(
        request,
        lambda store, actor: store.create_key(
            None, body.name, actor, expires_at=_until(body.expires_in_seconds)
        ),
    )
    return answer(_admin_key(key) | {"value": value})


@router.get(f"{PREFIX}/admin_api_keys/{{key}}", operation_id="retrieve_admin_api_key")
@requires(Role.ADMIN)
async def retrieve_admin_api_key(key: str, request: Request) -> Response:
    """What may be shown of it."""
    return answer(_admin_key(await ask(request, lambda store: store.key("", key))))


@router.delete(f"{PREFIX}/admin_api_keys/{{key}}", operation_id="delete_admin_api_key")
@requires(Role.ADMIN)
async def delete_admin_api_key(key: str, request: Request) -> Response:
    """It works no longer."""
    await act(request, lambda store, actor: store.revoke_key(store.key("", key), actor))
    return answer({"id": key, "object": "organization.admin_api_key.deleted", "deleted": True})
