"""Answers that are sent as they are made: raw ASGI, one send a token, and nothing goes on once the client has
left."""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from ktransformers.engine.logs import frames
from ktransformers.server.errors import RequestError

SEND_SECONDS = 30.0
"""How long, or half as long again, a client may take no bytes at all before it counts as gone."""
HEARTBEAT_SECONDS = 15.0
"""Proxies give up after 60 s without a byte as a rule, some after 30 s."""
SSE_IDLE = b": in the queue\n\n"
"""A comment: the event stream's own way to say nothing (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
Result = TypeVar("Result")

log = logging.getLogger("ktransformers.server.streaming")


class ByteStream(Response):
    """Sends each chunk as it comes. When the client leaves or stops reading, `chunks` is closed.

    Before the first chunk `idle`, which says nothing, is sent each HEARTBEAT_SECONDS, so that neither client
    nor proxy gives up while a request waits for its turn. (SSE: a comment.)
    """

    def __init__(self, chunks: AsyncGenerator[bytes, None], media_type: str, idle: bytes) -> None:
        super().__init__(media_type=media_type, headers={"X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._idle = idle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await while_connected(receive, self._send_all(send))

    async def _beat(self, send: Send) -> None:
        while True:
            await send({"type": "http.response.body", "body": self._idle, "more_body": True})
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def _send_all(self, send: Send) -> None:
        patience = _Patience(SEND_SECONDS)
        try:
            await self._send_chunks(patience.watched(send))
        except asyncio.CancelledError:
            if not patience.exhausted:
                raise
            raise ClientDisconnect from None
        finally:
            patience.end()

    async def _send_chunks(self, send: Send) -> None:
        async with aclosing(self._chunks) as chunks:
            # The first chunk is there already unless the request is still in the queue.
            first = asyncio.ensure_future(anext(chunks, None))
            await asyncio.wait({first}, timeout=0)
            beat = None if first.done() else asyncio.ensure_future(self._beat(send))
            try:
                chunk = await first
            finally:
                for task in filter(None, (first, beat)):
                    task.cancel()
                await asyncio.gather(*filter(None, (first, beat)), return_exceptions=True)
            if chunk is not None:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Patience:
    """Cancels the task that made it when one of its sends takes longer than `seconds`, at most half as long
    again. One timer for all: to set and cancel one for each token is a tenth of what a token costs."""

    def __init__(self, seconds: float) -> None:
        self.exhausted = False
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._seconds = seconds
        self._since = math.inf
        self._timer = self._loop.call_later(seconds / 2, self._look)

    def watched(self, send: Send) -> Send:
        """`send`, whose calls must not take too long."""

        async def timed(message: Message) -> None:
            self._since = self._loop.time()
            try:
                await send(message)
            finally:
                self._since = math.inf

        return timed

    def end(self) -> None:
        """Nothing is sent any more."""
        self._timer.cancel()

    def _look(self) -> None:
        if self._loop.time() - self._since < self._seconds:
            self._timer = self._loop.call_later(self._seconds / 2, self._look)
        elif self._task is not None:
            self.exhausted = True
            self._task.cancel()


async def with_error_event(
    chunks: AsyncGenerator[bytes, None], event: Callable[[RequestError], bytes]
) -> AsyncGenerator[bytes, None]:
    """`chunks`, and if they fail, one last chunk that says so: the status line has long been sent."""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk
    except RequestError as error:
        yield event(error)
    except Exception as error:
        log.error("a stream failed: %s", frames(error))
        yield event(RequestError("internal", "the request failed"))


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client leaves before. Raises ClientDisconnect then.

    The request's body must have been read: the only message left to receive is the disconnect.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
