"""How a route is guarded: its role, a bounded body, and what its endpoint is given to work with."""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from ktransformers.server.auth import Caller, Role, declared_role, declared_scope
from ktransformers.server.body import BoundedRequest
from ktransformers.server.config import ServerConfig
from ktransformers.server.errors import RequestError
from ktransformers.server.gate import EXTRA_HEADERS
from ktransformers.server.generation import Generator
from ktransformers.server.metrics import Metrics
from ktransformers.server.model import ModelCard
from ktransformers.server.tenants.directory import Directory
from ktransformers.server.tenants.records import REQUEST


class UndeclaredRoute(TypeError):
    """A route without a role: the application is not to start."""


class Authority(Protocol):
    """Who may call what (auth.Keys, auth.AdminKeys)."""

    def authorize(self, role: Role, headers: Headers, scope: str) -> Caller:
        """The caller, if it may call a route of that role and scope; else RequestError."""
        ...


@dataclass(frozen=True)
class Service:
    """What the routes work with; `app.state.service`."""

    config: ServerConfig
    keys: Authority
    metrics: Metrics
    generator: Generator
    card: ModelCard
    directory: Directory = field(default_factory=Directory)


@dataclass(frozen=True)
class Context:
    """What one request is done with, and for whom."""

    service: Service
    caller: Caller
    headers: dict[str, str]
    """Further headers of the answer."""

    @property
    def generator(self) -> Generator:
        """The path of every request."""
        return self.service.generator


def context_of(request: Request) -> Context:
    """The context that the route's guard made."""
    context: Context = request.scope["ktransformers.context"]
    return context


class GuardedRoute(APIRoute):
    """Decides after routing, on the very endpoint that will run, so that no spelling of a path gets around
    it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler behind the checks. Raises UndeclaredRoute."""
        role = declared_role(self.endpoint)
        if role is None:
            raise UndeclaredRoute(f"{self.path} declares no role")
        handler, scope = super().get_route_handler(), declared_scope(self.endpoint)

        async def guarded(request: Request) -> Response:
            service: Service = request.app.state.service
            caller = service.keys.authorize(role, request.headers, scope)
            if caller.key:
                service.generator.ledger.touch(caller.key)
            if role is not Role.PUBLIC and service.generator.draining:
                raise RequestError("draining", "the server is shutting down", retry_after=5)
            if scope == REQUEST and role is Role.USER:
                service.generator.refuse_early(caller)
            headers = request.scope.setdefault(EXTRA_HEADERS, {})
            request.scope["ktransformers.context"] = Context(service, caller, headers)
            bounded = BoundedRequest(request.scope, request.receive)
            if request.method == "POST":
                bounded.check_media_type()
            return await handler(bounded)

        return guarded


def check_routes(routes: list[BaseRoute]) -> None:
    """Raises UndeclaredRoute for anything that is not a guarded route: a mount, a websocket, the framework's
    own pages."""
    for route in routes:
        if not isinstance(route, GuardedRoute):
            raise UndeclaredRoute(f"{getattr(route, 'path', route)} is not a guarded route")
