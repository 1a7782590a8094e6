"""The ASGI application: routes, guards, error formats."""

from collections.abc import Sequence

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ktransformers.server import errors
from ktransformers.server.api import admin, admin_keys, admin_prefixes, admin_usage, health, ollama, openai
from ktransformers.server.api.page import page_files, page_router
from ktransformers.server.api.parameters import validation_error
from ktransformers.server.config import ADMIN_HOST
from ktransformers.server.errors import RequestError
from ktransformers.server.gate import Gate, HostPolicy, error_response
from ktransformers.server.routing import Service, check_routes


def make_app(service: Service) -> FastAPI:
    """Raises UndeclaredRoute for a route without a role: nothing is served by accident."""
    config = service.config
    policy = HostPolicy(config.host, config.allowed_hosts, config.allowed_origins)
    return _make(service, [health.router, openai.router, ollama.router, page_router(page_files())], policy)


def make_admin_app(service: Service) -> FastAPI:
    """The admin API, for a listener of its own. No page may call it. Raises UndeclaredRoute."""
    policy = HostPolicy(ADMIN_HOST, (), ())
    parts = (admin, admin_keys, admin_prefixes, admin_usage)
    return _make(service, [health.router, *(part.router for part in parts)], policy)


def _make(service: Service, routers: Sequence[APIRouter], policy: HostPolicy) -> FastAPI:
    # The framework's own pages load scripts from elsewhere and would be routes without a role.
    app = FastAPI(
        title="ktransformers",
        version=ollama.VERSION,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    for router in routers:
        # As they are, not through include_router, which wraps them: what was guarded is what will run.
        app.router.routes.extend(router.routes)
    check_routes(list(app.router.routes))
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_middleware(Gate, policy=policy, metrics=service.metrics)
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestError):
        known = error if isinstance(error, HTTPException) else HTTPException(500)
        error = errors.from_status(known.status_code)
        error.headers = known.headers
    return error_response(request.scope["path"], error)


async def _validation_error(request: Request, error: Exception) -> Response:
    found = error.errors() if isinstance(error, RequestValidationError) else []
    return error_response(request.scope["path"], validation_error(found))
