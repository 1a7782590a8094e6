"""The front end's end of the scheduler: submit, read the events, cancel, look at the status."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from ktransformers.engine.channel import Back, Client, Full, Lost, PeerGone
from ktransformers.scheduler.protocol import (
    Cancel,
    Drain,
    Failed,
    FromScheduler,
    Hello,
    Status,
    Submit,
    TokenEvent,
    Tokens,
    ToScheduler,
    Withdraw,
)

log = logging.getLogger(__name__)

BEHIND_EVENTS = 256
"""Events that may lie unread before the reader counts as behind; later ones are folded into the last."""
BEHIND_SECONDS = 5.0
"""How long a reader may be behind before its request is cancelled."""
AWAY_SECONDS = 30.0
"""How long a request that has not begun waits for a scheduler that is away."""
WOKEN_AT_ONCE = 4
"""Readers of a step's tokens, before the event loop turns to others: what 32 streams make of a token each
takes 2 ms, and who asks meanwhile would wait for all of it."""
STATUS_SECONDS = 3.0
"""Age at which a status says nothing any more."""


class RequestFailed(Exception):
    """The request ended with Failed. `code` is one of its codes, `retry_after` in seconds (0: no advice)."""

    def __init__(self, code: str, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after = retry_after


class Channel(Protocol):
    """What this needs of engine.channel.Client."""

    def send(self, message: ToScheduler) -> None:
        """Errors: PeerGone, Full."""
        ...

    async def recv(self) -> FromScheduler | Lost | Back:
        """The next message or news of the connection."""
        ...

    def close(self) -> None:
        """Close it."""
        ...


@dataclass(eq=False)
class _Pending:
    """One request and what its reader has not taken yet."""

    submit: Submit
    submitted: float
    sent: bool = False
    began: bool = False
    """An event has come: its tokens may have been shown, so it cannot be started over."""
    behind_since: float | None = None
    news: deque[TokenEvent | Failed] = field(default_factory=deque)
    waiter: "asyncio.Future[None] | None" = None
    """Of the reader, while there is nothing for it. (An Event costs twice as much, for every token.)"""

    def put(self, event: TokenEvent | Failed) -> None:
        last = self.news[-1] if len(self.news) >= BEHIND_EVENTS else None
        if isinstance(last, TokenEvent) and isinstance(event, TokenEvent):
            last.tokens.extend(event.tokens)
            last.logprobs.extend(event.logprobs)
            self.news[-1] = msgspec.structs.replace(last, finish=event.finish)
        else:
            self.news.append(event)
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class SchedulerClient:
    """All requests of one front end. `start` it on the event loop that uses it, `close` it there."""

    def __init__(self, channel: Channel, clock: Callable[[], float] = time.monotonic) -> None:
        self._channel = channel
        self._clock = clock
        self._pending: dict[str, _Pending] = {}
        self._status: Status | None = None
        self._status_at = 0.0
        self._away_since: float | None = clock()
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    def connect(cls, path: str) -> "SchedulerClient":
        """Of the scheduler whose unix socket is `path`; it need not be there yet."""
        return cls(Client[FromScheduler](path, FromScheduler))

    def start(self, on_failure: Callable[[], None] = lambda: None) -> None:
        """Begin to read events and to say Hello once a second. `on_failure` is called when that cannot go on,
        which only a mistake of ours can cause: nothing would ever be answered any more.
        """
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._tick())]

        def done(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("the scheduler's messages cannot be read any more", exc_info=error)
                on_failure()

        for task in self._tasks:
            task.add_done_callback(done)

    async def close(self) -> None:
        """Stop; open requests end with code "internal"."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail_all(lambda _: True, "internal", "the front end is closing")
        self._channel.close()

    @property
    def status(self) -> Status | None:
        """The last status, or None when there is none younger than three seconds."""
        return self._status if self._clock() - self._status_at < STATUS_SECONDS else None

    @property
    def open_requests(self) -> int:
        """Requests without a terminal event."""
        return len(self._pending)

    async def submit(self, submit: Submit) -> AsyncGenerator[TokenEvent, None]:
        """The events of one request; the last one has `finish` set.

        Leaving the iterator early (aclose, or the task cancelled) cancels the request. While no event of it
        has come, it survives the death of the scheduler: it is submitted again.

        Errors: RequestFailed, instead of a last event.
        """
        if submit.id in self._pending:
            raise ValueError(f"request {submit.id} is open already")
        pending = self._pending[submit.id] = _Pending(submit, self._clock())
        try:
            self._send_submit(pending)
            loop = asyncio.get_running_loop()
            while True:
                while not pending.news:
                    pending.waiter = loop.create_future()
                    await pending.waiter
                event = pending.news.popleft()
                if isinstance(event, Failed):
                    raise RequestFailed(event.code, event.message, event.retry_after)
                yield event
                if event.finish:
                    return
        finally:
            # A request that ended has been taken out when its terminal event came.
            if self._pending.get(submit.id) is pending:
                del self._pending[submit.id]
                if pending.sent:
                    self._try_send(Cancel(submit.id))

    def cancel(self, id: str) -> None:  # noqa: A002
        """End a request; its iterator gets finish "cancelled", or how it ended just before."""
        pending = self._pending.get(id)
        if pending is not None and not (pending.sent and self._try_send(Cancel(id))):
            self._end(pending, TokenEvent(id, [], [], finish="cancelled"))

    def drain(self) -> None:
        """Ask the scheduler to refuse new requests."""
        self._try_send(Drain())

    def withdraw(self, tokens: list[int]) -> bool:
        """What was computed of them in the public scope is found no more; False when the scheduler is gone,
        and all of it with it."""
        return self._try_send(Withdraw(tokens))

    # ---- the connection

    def _try_send(self, message: ToScheduler) -> bool:
        try:
            self._channel.send(message)
        except (PeerGone, Full):
            return False  # Lost follows, or the scheduler misses our Hellos: both end what is open
        return True

    def _send_submit(self, pending: _Pending) -> None:
        submit = pending.submit
        if submit.deadline > 0:
            left = pending.submitted + submit.deadline - self._clock()
            if left <= 0:
                self._end(pending, Failed(submit.id, "deadline", "the request waited past its deadline"))
                return
            submit = msgspec.structs.replace(submit, deadline=left)
        try:
            self._channel.send(submit)
            pending.sent = True
        except PeerGone:
            pending.sent = False
        except Full:
            self._end(pending, Failed(submit.id, "overloaded", "the scheduler does not keep up", 1.0))

    async def _read(self) -> None:
        while True:
            message = await self._channel.recv()
            if isinstance(message, Tokens):
                await self._take_all(message.events)
            elif isinstance(message, Failed):
                if (pending := self._pending.get(message.id)) is not None:
                    self._end(pending, message)
            elif isinstance(message, Status):
                self._status, self._status_at = message, self._clock()
            elif isinstance(message, Back):
                self._back()
            else:
                self._lost()

    async def _take_all(self, events: list[TokenEvent]) -> None:
        for i, event in enumerate(events):
            if i and i % WOKEN_AT_ONCE == 0:
                await asyncio.sleep(0)
            self._take(event)

    def _take(self, event: TokenEvent) -> None:
        pending = self._pending.get(event.id)
        if pending is None:
            return  # cancelled here; the scheduler did not know yet
        if event.finish:
            self._end(pending, event)
            return
        pending.began = True
        pending.put(event)
        now = self._clock()
        if len(pending.news) < BEHIND_EVENTS:
            pending.behind_since = None
        elif pending.behind_since is None:
            pending.behind_since = now
        elif now - pending.behind_since > BEHIND_SECONDS:
            self.cancel(event.id)

    def _back(self) -> None:
        self._away_since = None
        self._try_send(Hello())
        for pending in list(self._pending.values()):
            self._send_submit(pending)

    def _lost(self) -> None:
        self._away_since = self._clock()
        self._status = None
        for pending in self._pending.values():
            pending.sent = False
        self._fail_all(lambda p: p.began, "engine_restarted", "the scheduler was restarted during the answer")

    def _fail_all(self, which: Callable[[_Pending], bool], code: str, message: str) -> None:
        for pending in [p for p in self._pending.values() if which(p)]:
            self._end(pending, Failed(pending.submit.id, code, message))

    def _end(self, pending: _Pending, event: TokenEvent | Failed) -> None:
        del self._pending[pending.submit.id]
        pending.put(event)

    async def _tick(self) -> None:
        while True:
            self._try_send(Hello())
            if self._away_since is not None and self._clock() - self._away_since > AWAY_SECONDS:
                self._fail_all(lambda p: not p.sent, "not_ready", "the scheduler is not running")
            await asyncio.sleep(1.0)
