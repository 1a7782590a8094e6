"""What every request passes, whatever its route: the browser-facing checks, one id, one count, and the
headers that go out with every answer. (Its body is body.py's, its connection connections.py's.)"""

import logging
import secrets
import time
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ktransformers.engine.logs import frames
from ktransformers.server import errors
from ktransformers.server.config import is_loopback
from ktransformers.server.errors import RequestError
from ktransformers.server.metrics import Metrics

EXTRA_HEADERS = "ktransformers.headers"
"""Key in the scope of further headers (a dict) of the answer, which a route may add until it begins."""
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

_SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_NO_CONTENT_POLICY = "default-src 'none'; frame-ancestors 'none'"

log = logging.getLogger("ktransformers.server.gate")


class HostPolicy:
    """Which Host headers and Origins are ours (against DNS rebinding and foreign pages)."""

    def __init__(self, listen: str, hosts: Iterable[str], origins: Iterable[str]) -> None:
        """`listen` is the address listened on. Where other machines can reach it keys are required, which a
        foreign page does not have, so that without a list of hosts any name is accepted there."""
        listed = {host.lower() for host in hosts}
        self._any = "*" in listed or not (listed or is_loopback(listen))
        # Names that a foreign page's request cannot carry.
        self._hosts = listed | {listen.lower(), "localhost", "127.0.0.1", "::1"}
        self._origins = {origin.lower().rstrip("/") for origin in origins}

    def check(self, method: str, headers: Headers) -> None:
        """Raises RequestError for a Host that is not ours or, unless it only reads, a page that is not
        ours.
        """
        given = headers.getlist("host")
        if len(given) != 1:
            raise RequestError("invalid_host", "exactly one Host header is needed")
        if not self._any and _host_name(given[0]) not in self._hosts:
            raise RequestError("host_not_allowed", "this Host is not allowed; see the setting allowed_hosts")
        origin = headers.get("origin")
        if origin is not None and method not in SAFE_METHODS and not self.is_own(origin, given[0]):
            raise RequestError(
                "origin_not_allowed", "this Origin is not allowed; see the setting allowed_origins"
            )

    def is_own(self, origin: str, host: str) -> bool:
        """Whether the page is ours or of an allowed origin."""
        return self.is_listed(origin) or origin.lower().partition("://")[2] == host.lower()

    def is_listed(self, origin: str) -> bool:
        """Whether the origin is among the allowed ones, which alone get CORS headers."""
        return origin.lower() in self._origins


def _host_name(host: str) -> str:
    host = host.lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, policy: HostPolicy, metrics: Metrics) -> None:
        self._app, self._policy, self._metrics = app, policy, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 0
        headers = Headers(scope=scope)
        request_id = f"req-{secrets.token_hex(16)}"
        scope["request_id"] = request_id
        origin = headers.get("origin")
        extra: dict[str, str] = scope.setdefault(EXTRA_HEADERS, {})

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answer = MutableHeaders(scope=message)
                answer.update(extra)
                # OpenAI's: until the answer begins, of a stream until its first token.
                answer["openai-processing-ms"] = str(round((time.monotonic() - started) * 1e3))
                _add_headers(
                    answer,
                    request_id,
                    origin if origin is not None and self._policy.is_listed(origin) else None,
                )
            await send(message)

        try:
            self._policy.check(scope["method"], headers)
            if scope["method"] == "OPTIONS" and origin is not None and self._policy.is_listed(origin):
                await _preflight()(scope, receive, send_with_headers)
            else:
                await self._app(scope, receive, send_with_headers)
        except RequestError as error:
            await error_response(scope["path"], error)(scope, receive, send_with_headers)
        except ClientDisconnect:
            status = status or 499
        except Exception as error:
            log.error("request %s failed: %s", request_id, frames(error))
            if status:
                raise
            failure = RequestError("internal", f"the server failed; its log has the request id {request_id}")
            await error_response(scope["path"], failure)(scope, receive, send_with_headers)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            seconds = time.monotonic() - started
            self._metrics.http_request(scope["method"], route, status or 499, seconds)
            log.debug(
                "%s %s -> %d in %.1f ms (%s)",
                scope["method"],
                route,
                status or 499,
                seconds * 1e3,
                request_id,
            )


def error_response(path: str, error: RequestError) -> Response:
    """The answer that tells a client about `error`."""
    headers = dict(error.headers or {})
    if error.code == "draining":
        headers["Connection"] = "close"
    return JSONResponse(errors.body(path, error), error.status_code, headers)


def _add_headers(headers: MutableHeaders, request_id: str, origin: str | None) -> None:
    headers["X-Request-Id"] = request_id
    for name, value in _SECURITY_HEADERS.items():
        headers[name] = value
    headers.setdefault("Content-Security-Policy", _NO_CONTENT_POLICY)
    headers.setdefault("Cache-Control", "no-store")
    if origin is not None:
        headers["Access-Control-Allow-Origin"] = origin
        headers["Access-Control-Expose-Headers"] = "X-Request-Id, Retry-After"
        headers["Cross-Origin-Resource-Policy"] = "cross-origin"
        headers.append("Vary", "Origin")


def _preflight() -> Response:
    return Response(
        status_code=204,
        headers={
            "Access-Control-Allow-Methods": "GET, HEAD, POST",
            # The star covers what SDKs add, but never Authorization.
            "Access-Control-Allow-Headers": "Authorization, *",
            "Access-Control-Max-Age": "600",
        },
    )
