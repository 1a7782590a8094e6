"""How a route is guarded: its role, a bounded body, and what its endpoint is given to work with."""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from ktransformers.server.auth import Caller, Keys, Role, declared_role
from ktransformers.server.config import ServerConfig
from ktransformers.server.errors import RequestError
from ktransformers.server.gate import BoundedRequest
from ktransformers.server.generation import Generator
from ktransformers.server.metrics import Metrics
from ktransformers.server.model import ModelCard


class UndeclaredRoute(TypeError):
    """A route without a role: the application is not to start."""


@dataclass(frozen=True)
class Service:
    """What the routes work with; `app.state.service`."""

    config: ServerConfig
    keys: Keys
    metrics: Metrics
    generator: Generator
    card: ModelCard


@dataclass(frozen=True)
class Context:
    """What one request is done with, and for whom."""

    service: Service
    caller: Caller

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
        handler = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            service: Service = request.app.state.service
            caller = service.keys.authorize(role, request.headers)
            if role is not Role.PUBLIC and service.generator.draining:
                raise RequestError("draining", "the server is shutting down", retry_after=5)
            request.scope["ktransformers.context"] = Context(service, caller)
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
