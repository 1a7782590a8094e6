"""Who waits, and in which order they are let in."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Protocol

from ktransformers.scheduler.request import Request


class RequestQueue(Protocol):
    """The order is the queue's own; the planner only asks who is next."""

    tokens: int
    """Prompt tokens that wait."""

    def __len__(self) -> int:
        """Requests that wait."""
        ...

    def __iter__(self) -> Iterator[Request]:
        """All of them, next one first."""
        ...

    def push(self, request: Request) -> None:
        """A new request."""
        ...

    def push_front(self, request: Request) -> None:
        """A request that had been let in and is put back for no fault of its own: the next of its kind."""
        ...

    def peek(self) -> Request | None:
        """The next one."""
        ...

    def remove(self, request: Request) -> None:
        """It was let in, or has ended. Errors: KeyError when it does not wait."""
        ...


class FifoQueue:
    """First come, first served. All operations O(1)."""

    def __init__(self) -> None:
        self.tokens = 0
        self._waiting: OrderedDict[str, Request] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._waiting.values())

    def push(self, request: Request) -> None:
        self._waiting[request.id] = request
        self.tokens += request.n_prompt

    def push_front(self, request: Request) -> None:
        self.push(request)
        self._waiting.move_to_end(request.id, last=False)

    def peek(self) -> Request | None:
        return next(iter(self._waiting.values()), None)

    def remove(self, request: Request) -> None:
        del self._waiting[request.id]
        self.tokens -= request.n_prompt
