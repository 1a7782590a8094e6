"""The chat page: one route for each of its files, read once, so that no path of a client ever reaches a
disk.
"""

import gzip
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
    index = _File(_INDEX, page[_INDEX]) if _INDEX in page else None

    @router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    @requires(Role.PUBLIC)
    async def root(request: Request) -> Response:
        """The page for browsers. Ollama's clients look here whether somebody runs, and know the words."""
        if index is not None and "text/html" in request.headers.get("accept", ""):
            return index.answer(request)
        return PlainTextResponse("Ollama is running", headers={"Vary": "Accept"})

    for path, content in page.items():
        if path != _INDEX:
            endpoint = requires(Role.PUBLIC)(_File(path, content).endpoint())
            router.add_api_route(f"/{path}", endpoint, methods=["GET", "HEAD"], include_in_schema=False)
    return router


class _File:
    """One file as it is sent, compressed once."""

    def __init__(self, path: str, content: bytes) -> None:
        self._plain, self._gzipped = content, gzip.compress(content, mtime=0)
        self._media_type = mimetypes.guess_type(path)[0] or "application/octet-stream"
        self._headers = {
            "Content-Security-Policy": _POLICY,
            # Names under assets/ hold a hash of the content.
            "Cache-Control": "public, max-age=31536000, immutable"
            if path.startswith("assets/")
            else "no-cache",
            "Vary": "Accept, Accept-Encoding",
        }

    def answer(self, request: Request) -> Response:
        if "gzip" in request.headers.get("accept-encoding", ""):
            headers = self._headers | {"Content-Encoding": "gzip"}
            return Response(self._gzipped, media_type=self._media_type, headers=headers)
        return Response(self._plain, media_type=self._media_type, headers=self._headers)

    def endpoint(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def answer(request: Request) -> Response:
            return self.answer(request)

        return answer
