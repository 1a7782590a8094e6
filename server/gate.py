"""What every request passes, whatever its route: the browser-facing checks, bounds on headers and bodies, one
id, one count, and the headers that go out with every answer."""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Iterable
from typing import Any

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ktransformers.engine.logs import frames
from ktransformers.server import errors
from ktransformers.server.config import is_loopback
from ktransformers.server.errors import RequestError
from ktransformers.server.metrics import Metrics

MAX_BODY_BYTES = 16 << 20
MAX_BODIES_BYTES = 256 << 20
"""All bodies being read at one time."""
MAX_JSON_DEPTH = 32
MAX_JSON_NODES = 100_000
"""Lists, objects and keys of one document: what takes memory and time far beyond its bytes."""
MAX_JSON_VALUES = 1_100_000
"""Of one document, as of a list of token ids. Commas and quotes within a text are taken for such: a text with
more of them fits no context."""
MAX_HEADER_BYTES = 16 << 10
MAX_CONNECTIONS = 4096
HEADER_SECONDS = 10.0
BODY_SECONDS = 30.0
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
_STRINGS = re.compile(rb'"[^"]*"')
_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
_TO_SQUARE = bytes.maketrans(b"{}", b"[]")
_NOT_STRUCTURE = bytes(set(range(256)) - set(b"[]{}:"))

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


class BoundedRequest(Request):
    """A request whose body is bounded while it arrives (chunked or not) and is strict JSON."""

    held = 0

    _document: Any = None

    async def body(self) -> bytes:
        """Read the body and decode it. Of its bytes only the first is given out: the framework asks whether
        there are any, and would keep all of them until the answer is complete. Raises RequestError:
        request_too_large, request_timeout, overloaded, invalid_json.
        """
        length = self.headers.get("content-length", "")
        if length.isdecimal() and int(length[:19]) > MAX_BODY_BYTES:
            raise _too_large()
        read = await self._read()
        if read:
            self._document = strict_json(read)
        return read[:1]

    async def _read(self) -> bytes:
        chunks, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in self.stream():
                    size += len(chunk)
                    BoundedRequest.held += len(chunk)
                    if size > MAX_BODY_BYTES:
                        raise _too_large()
                    if BoundedRequest.held > MAX_BODIES_BYTES:
                        raise RequestError("overloaded", "too many large requests at the same time")
                    chunks.append(chunk)
        except TimeoutError:
            raise RequestError(
                "request_timeout", f"the body did not arrive within {BODY_SECONDS:.0f} s"
            ) from None
        finally:
            BoundedRequest.held -= size
        return b"".join(chunks)

    async def json(self) -> Any:
        """What `body` decoded."""
        return self._document

    def check_media_type(self) -> None:
        """A form or plain text is what a foreign page may post without asking first, so only JSON is
        taken.
        """
        if self.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError("unsupported_media_type", "send JSON, with 'Content-Type: application/json'")


def strict_json(body: bytes) -> Any:
    """Decode a JSON document: UTF-8, no NaN or Infinity, nested no deeper than MAX_JSON_DEPTH. Raises
    RequestError "invalid_json".
    """
    _check_structure(body)
    try:
        return msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise RequestError("invalid_json", "the body is not valid JSON") from None


def _check_structure(body: bytes) -> None:
    """Bound depth, nodes and values before anything is built. A few passes in C over the bytes, whatever they
    are."""
    if body.count(b",") > MAX_JSON_VALUES or body.count(b'"') > 2 * MAX_JSON_VALUES:
        raise RequestError("invalid_json", f"the JSON has more than {MAX_JSON_VALUES} values")
    if body.count(b"[") + body.count(b"{") + body.count(b":") <= MAX_JSON_DEPTH:
        return
    outside = _STRINGS.sub(b"", body.replace(b"\\\\", b"").replace(b'\\"', b""))
    structure = outside.translate(_TO_SQUARE, _NOT_STRUCTURE)
    nodes = structure.count(b"[") + structure.count(b":")
    if nodes > MAX_JSON_NODES:
        raise RequestError("invalid_json", f"the JSON has more than {MAX_JSON_NODES} lists, objects and keys")
    brackets = structure.replace(b":", b"")
    for _ in range(MAX_JSON_DEPTH):  # each round takes away exactly the innermost level
        brackets = brackets.replace(b"[]", b"")
    if brackets:
        raise RequestError("invalid_json", f"the JSON is nested deeper than {MAX_JSON_DEPTH}, or not closed")


def _too_large() -> RequestError:
    return RequestError(
        "request_too_large",
        f"the body is larger than {MAX_BODY_BYTES >> 20} MiB",
        headers={"Connection": "close"},
    )


def _without_upgrade(data: bytes) -> bytes:
    """`data`, which begins in a head, with its Upgrade field under another name. The parser takes what
    follows such a head for another protocol: the body of each POST of Java's client, which offers HTTP/2.
    """
    head, end, rest = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"\r\nX-Upgrade:", head) + end + rest


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with bounds it lacks: bytes and seconds that a request's head may take, seconds that
    a body may take which nobody reads any more, and connections. Requests are not taken in line: uvicorn does
    not notice that a client has left while another of its requests waits.

    An exception in a parser callback makes uvicorn answer 400 and close.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin the time that the first request's head may take."""
        super().connection_made(transport)
        self._in_head, self._in_message, self._head_bytes = True, True, 0
        self._deaf = False
        self._timer: asyncio.TimerHandle | None = None
        if len(self.connections) > MAX_CONNECTIONS:
            self._make_room()
        if not transport.is_closing():
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes from the client. The parser keeps an unfinished head, however long."""
        if self._deaf:
            return
        if (self._in_head or not self._in_message) and b"pgrade" in data:
            data = _without_upgrade(data)
        super().data_received(data)
        if self._in_head and not self._deaf:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
                self.send_400_response("Request head too large.")

    def on_message_begin(self) -> None:
        """A request begins. While another is being answered, it goes unheard: the connection closes when that
        is done, as HTTP allows, and the client asks again on another.
        """
        super().on_message_begin()
        if self._is_answering():
            self._deaf, self.cycle.keep_alive = True, False
            return
        self._in_head, self._in_message, self._head_bytes = True, True, 0
        self._start_timer()

    def on_headers_complete(self) -> None:
        """The head is there."""
        if self._deaf:
            return
        self._in_head = False
        self._stop_timer()
        if sum(len(name) + len(value) + 4 for name, value in self.headers) + len(self.url) > MAX_HEADER_BYTES:
            raise ValueError("request head too large")
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        if not self._deaf:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The body is there."""
        if not self._deaf:
            self._in_message = False
            self._stop_timer()
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer has been sent, perhaps before the end of the body it was for."""
        super().on_response_complete()
        if self._in_message and not self.transport.is_closing():
            self._start_timer()

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be read; without a word where an answer is being sent."""
        if self._is_answering():
            self.transport.close()
        else:
            super().send_400_response(msg)

    def _make_room(self) -> None:
        """Close a connection that asks for nothing, else this one: idle ones must not keep others out."""
        for other in self.connections:
            if isinstance(other, BoundedProtocol) and other is not self and not other._is_answering():
                self.connections.discard(other)  # at once, for the next one that looks for room
                other.transport.close()
                return
        self.transport.close()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
