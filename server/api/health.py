"""Whether the server lives, is ready, and how it does."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from ktransformers.server.auth import Role, requires
from ktransformers.server.errors import RESPONSES
from ktransformers.server.routing import GuardedRoute, context_of

router = APIRouter(route_class=GuardedRoute, tags=["health"], responses=RESPONSES)


@router.head("/livez", include_in_schema=False)
@router.get("/livez", operation_id="livez", response_class=PlainTextResponse)
@requires(Role.PUBLIC)
async def livez() -> Response:
    """200 when the event loop turns, which answering shows."""
    return PlainTextResponse("ok\n")


def _state(request: Request) -> tuple[bool, str]:
    generator = context_of(request).generator
    if generator.draining:
        return False, "draining"
    status = generator.scheduler.status
    if status is None:
        return False, "no word from the scheduler for 3 s"
    return status.ready, "ready" if status.ready else status.detail


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", operation_id="readyz", response_class=PlainTextResponse)
@requires(Role.PUBLIC)
async def readyz(request: Request) -> Response:
    """200 when a request would be served now, else 503 and what is missing."""
    ready, detail = _state(request)
    return PlainTextResponse(detail + "\n", 200 if ready else 503, {} if ready else {"Retry-After": "1"})


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", operation_id="healthz")
@requires(Role.PUBLIC)
async def healthz(request: Request) -> Response:
    """The same with numbers. Says nothing about tenants."""
    ready, detail = _state(request)
    generator = context_of(request).generator
    status = generator.scheduler.status
    answer: dict[str, Any] = {
        "ready": ready,
        "detail": detail,
        "model": generator.model_name,
        "scheduler": status is not None,
    }
    if status is not None:
        answer |= {
            "isa": status.isa,
            "context": status.max_len,
            "steps": status.steps,
            "engine_restarts": status.engine_restarts,
        }
    return JSONResponse(answer, 200 if ready else 503)


@router.get("/metrics", operation_id="metrics", response_class=PlainTextResponse)
@requires(Role.ADMIN)
async def metrics(request: Request) -> Response:
    """Prometheus text. For the operator: the load of the others is no tenant's business."""
    return Response(
        context_of(request).service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8"
    )
