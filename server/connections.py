"""Connections: HTTP/1.1 with bounds on what a client may take before and beside its requests."""

import asyncio
import re

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 16 << 10
MAX_CONNECTIONS = 4096
HEADER_SECONDS = 10.0
_LARGE_HEAD = f"The request's head is larger than {MAX_HEADER_BYTES >> 10} KiB."

_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)


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
        self._deaf = self._large_head = False
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
                self.send_400_response(_LARGE_HEAD)

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
            self._large_head = True
            raise ValueError(_LARGE_HEAD)
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
            super().send_400_response(_LARGE_HEAD if self._large_head else msg)

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
