"""The admin API as OpenAI's organization API has it: projects, their rate limits, the models they may use.

What OpenAI does not know is there as further fields: a project's `weight` and `priority`, the limits
`max_tokens_per_1_day`, `max_running`, `max_waiting` and `kv_{device,host,disk}_bytes`. What this server does
not do is refused by name.
"""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from ktransformers.server.api.admin_access import PREFIX, Query, act, answer, ask, page
from ktransformers.server.api.parameters import StrictModel
from ktransformers.server.auth import Role, requires
from ktransformers.server.errors import RESPONSES, RequestError
from ktransformers.server.routing import GuardedRoute, context_of
from ktransformers.server.tenants.records import MAX_NAME, Limits, Priority, Project

router = APIRouter(route_class=GuardedRoute, tags=["admin"], responses=RESPONSES)
NO_LIMIT = (1 << 53) - 1
"""What the two limits that OpenAI's clients expect to be numbers say when there is none."""
RATE_LIMIT = "rl_all"
"""The one rate limit of a project: it holds for all models together."""

Name = Annotated[str, Field(max_length=MAX_NAME)]
Count = Annotated[int, Field(ge=1, le=NO_LIMIT)]
# API -> store
_LIMITS = {
    "max_requests_per_1_minute": "requests_per_minute",
    "max_tokens_per_1_minute": "tokens_per_minute",
    "max_tokens_per_1_day": "tokens_per_day",
    "max_requests_per_1_day": "requests_per_day",
    "max_running": "max_running",
    "max_waiting": "max_waiting",
    "kv_device_bytes": "kv_device_bytes",
    "kv_host_bytes": "kv_host_bytes",
    "kv_disk_bytes": "kv_disk_bytes",
}


class NewProject(StrictModel):
    """POST /organization/projects."""

    name: Name
    weight: float = 1.0
    priority: Priority = "normal"


class ProjectChange(StrictModel):
    """POST /organization/projects/{id}."""

    name: Name | None = None
    weight: float | None = None
    priority: Priority | None = None


class KeyLimits(StrictModel):
    """What a project, and each of its keys, may be limited to. null, or NO_LIMIT, takes a limit away."""

    max_requests_per_1_minute: Count | None = None
    max_tokens_per_1_minute: Count | None = None
    max_tokens_per_1_day: Count | None = None
    max_requests_per_1_day: Count | None = None
    max_running: Count | None = None
    max_waiting: Count | None = None

    def limits(self) -> dict[str, int | None]:
        """Those that were given, by the names of Limits."""
        given = self.model_dump(include=set(_LIMITS), exclude_unset=True)
        return {_LIMITS[name]: None if value == NO_LIMIT else value for name, value in given.items()}


class RateLimitChange(KeyLimits):
    """POST /organization/projects/{id}/rate_limits/{id}."""

    kv_device_bytes: Count | None = None
    kv_host_bytes: Count | None = None
    kv_disk_bytes: Count | None = None


class ModelPermissions(StrictModel):
    """POST /organization/projects/{id}/model_permissions."""

    mode: Literal["allow_list"]
    model_ids: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]],
        Field(fail_fast=True, min_length=1, max_length=128),
    ]


# ---- projects


def _project(project: Project) -> dict[str, Any]:
    return {
        "id": project.id,
        "object": "organization.project",
        "name": project.name,
        "created_at": project.created_at,
        "archived_at": project.archived_at,
        "status": "active" if project.archived_at is None else "archived",
        "weight": project.weight,
        "priority": project.priority,
    }


@router.get(f"{PREFIX}/projects", operation_id="list_projects")
@requires(Role.ADMIN)
async def list_projects(request: Request) -> Response:
    """By age."""
    query = Query(request, "after", "limit", "include_archived")
    archived = query.flag("include_archived")
    return page(query, await ask(request, lambda store: store.projects(archived)), _project)


@router.post(f"{PREFIX}/projects", operation_id="create_project")
@requires(Role.ADMIN)
async def create_project(body: NewProject, request: Request) -> Response:
    """A new tenant."""
    return answer(
        _project(
            await act(
                request,
                lambda store, actor: store.create_project(
                    body.name, actor, weight=body.weight, priority=body.priority
                ),
            )
        )
    )


@router.get(f"{PREFIX}/projects/{{project}}", operation_id="retrieve_project")
@requires(Role.ADMIN)
async def retrieve_project(project: str, request: Request) -> Response:
    """One tenant, also an archived one."""
    return answer(_project(await ask(request, lambda store: store.project_by_id(project))))


@router.post(f"{PREFIX}/projects/{{project}}", operation_id="modify_project")
@requires(Role.ADMIN)
async def modify_project(project: str, body: ProjectChange, request: Request) -> Response:
    """Its name, weight or priority."""
    changes = body.model_dump(exclude_none=True)
    return answer(
        _project(await act(request, lambda store, actor: store.change_project(project, actor, **changes)))
    )


@router.post(f"{PREFIX}/projects/{{project}}/archive", operation_id="archive_project")
@requires(Role.ADMIN)
async def archive_project(project: str, request: Request) -> Response:
    """Its keys work no longer."""
    return answer(_project(await act(request, lambda store, actor: store.archive_project(project, actor))))


# ---- rate limits


def key_limits(limits: Limits) -> dict[str, int | None]:
    """Those of a key."""
    return {name: getattr(limits, _LIMITS[name]) for name in KeyLimits.model_fields}


def _rate_limit(limits: Limits, model: str) -> dict[str, Any]:
    shown = {name: getattr(limits, field) for name, field in _LIMITS.items()}
    for name in ("max_requests_per_1_minute", "max_tokens_per_1_minute"):
        shown[name] = NO_LIMIT if shown[name] is None else shown[name]
    return {"id": RATE_LIMIT, "object": "project.rate_limit", "model": model} | shown


@router.get(f"{PREFIX}/projects/{{project}}/rate_limits", operation_id="list_rate_limits")
@requires(Role.ADMIN)
async def list_rate_limits(project: str, request: Request) -> Response:
    """One, which holds for the model that is served."""
    query = Query(request, "after", "before", "limit")
    limits = (await ask(request, lambda store: store.project_by_id(project))).limits
    model = context_of(request).generator.model_name
    return page(query, [limits], lambda limits: _rate_limit(limits, model))


@router.post(f"{PREFIX}/projects/{{project}}/rate_limits/{{rate_limit}}", operation_id="update_rate_limit")
@requires(Role.ADMIN)
async def update_rate_limit(
    project: str, rate_limit: str, body: RateLimitChange, request: Request
) -> Response:
    """What is not named stays as it is."""
    if rate_limit != RATE_LIMIT:
        raise RequestError("not_found", f"a project has one rate limit, {RATE_LIMIT}")
    changes = body.limits()
    changed = await act(request, lambda store, actor: store.change_limits(project, actor, changes))
    return answer(_rate_limit(changed.limits, context_of(request).generator.model_name))


# ---- models


def _permissions(project: Project) -> Response:
    return answer(
        {
            "object": "project.model_permissions",
            # Nothing denied is everything allowed.
            "mode": "allow_list" if project.models else "deny_list",
            "model_ids": sorted(project.models),
        }
    )


@router.get(f"{PREFIX}/projects/{{project}}/model_permissions", operation_id="retrieve_model_permissions")
@requires(Role.ADMIN)
async def retrieve_model_permissions(project: str, request: Request) -> Response:
    """The models that the project may use."""
    return _permissions(await ask(request, lambda store: store.project_by_id(project)))


@router.post(f"{PREFIX}/projects/{{project}}/model_permissions", operation_id="update_model_permissions")
@requires(Role.ADMIN)
async def update_model_permissions(project: str, body: ModelPermissions, request: Request) -> Response:
    """Only these models from now on."""
    models = frozenset(body.model_ids)
    return _permissions(
        await act(request, lambda store, actor: store.change_project(project, actor, models=models))
    )


@router.delete(f"{PREFIX}/projects/{{project}}/model_permissions", operation_id="delete_model_permissions")
@requires(Role.ADMIN)
async def delete_model_permissions(project: str, request: Request) -> Response:
    """All models from now on."""
    await act(request, lambda store, actor: store.change_project(project, actor, models=frozenset()))
    return answer({"object": "project.model_permissions.deleted", "deleted": True})
