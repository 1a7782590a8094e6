"""The chat page: one route for each of its files, read once, so that no path of a client ever reaches a
disk.
"""

import mimetypes
from collections.abc import Callable, Coroutine, Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from ktransformers.server.auth import Role, requires
from ktransformers.server.routing import GuardedRoute

# Styles that the page sets on single elements at run time need no exception: only inline text in HTML would.
_POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_INDEX = "index.html"


def page_files() -> dict[str, bytes]:
    """The built page by path, from the installed package or a checkout; empty where it was not built."""
    try:
        built = files("ktransformers.web") / "dist"
    except ModuleNotFoundError:
        return {}
    return dict(_walk(built, "")) if built.is_dir() else {}


def _walk(folder: Traversable, prefix: str) -> Iterator[tuple[str, bytes]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/")
        else:
            yield prefix + entry.name, entry.read_bytes()


def page_router(page: dict[str, bytes]) -> APIRouter:
    """`/` and every other file of the page."""
    router = APIRouter(route_class=GuardedRoute)
    index = page.get(_INDEX)

    @router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    @requires(Role.PUBLIC)
    async def root(request: Request) -> Response:
        """The page for browsers. Ollama's clients look here whether somebody is running, and know the
        words.
        """
        if index is not None and "text/html" in request.headers.get("accept", ""):
            return Response(
                index,
                media_type="text/html; charset=utf-8",
                headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"},
            )
        return PlainTextResponse("Ollama is running")

    for path, content in page.items():
        if path != _INDEX:
            router.add_api_route(
                f"/{path}", _file(path, content), methods=["GET", "HEAD"], include_in_schema=False
            )
    return router


def _file(path: str, content: bytes) -> Callable[[], Coroutine[Any, Any, Response]]:
    media_type = mimetypes.guess_type(path)[0] or "application/octet-stream"
    # Names under assets/ hold a hash of the content.
    age = "public, max-age=31536000, immutable" if path.startswith("assets/") else "no-cache"

    @requires(Role.PUBLIC)
    async def endpoint() -> Response:
        return Response(
            content, media_type=media_type, headers={"Content-Security-Policy": _POLICY, "Cache-Control": age}
        )

    return endpoint
