"""What every tenant used: counted on the event loop as tokens come, on disk within a second.

Tokens are added when their event is read, not when the request ends, so that an answer that is cut off (by
its client, an error, or the end of this process) is in the ledger as far as it came. The numbers are those of
the answers' `usage`: a prompt counts once however many answers it has.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

from ktransformers.server.tenants.records import UsageRow

FLUSH_SECONDS = 0.5
RETRY_SECONDS = 5.0

Write = Callable[[int, Sequence[UsageRow], Mapping[str, int]], Future[None]]
"""Append rows at a time (Unix seconds), and when keys were last used; the future is done when they are on
disk."""

log = logging.getLogger("ktransformers.server.tenants")


class Ledger:
    """Used on one event loop. Without `write` it forgets."""

    def __init__(self, write: Write | None = None, clock: Callable[[], float] = time.time) -> None:
        self._write, self._clock = write, clock
        self._counts: dict[tuple[str, str, str], list[int]] = {}
        self._used: dict[str, int] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Future[None] | None = None

    def add(
        self,
        subject: tuple[str, str, str],
        *,
        requests: int = 0,
        input: int = 0,  # noqa: A002 (the ledger's word)
        cached: int = 0,
        output: int = 0,
        reasoning: int = 0,
    ) -> None:
        """Count for (project, key, model). Tokens of reasoning are among those of the output."""
        self._count(subject, (requests, input, cached, output, reasoning))

    def touch(self, key: str) -> None:
        """The key was used now."""
        self._used[key] = int(self._clock())
        self._arm(FLUSH_SECONDS)

    async def close(self) -> None:
        """Write what is not written yet; gives up where that fails."""
        while self._write is not None and (self._writing is not None or self._counts or self._used):
            self._flush()
            if self._writing is not None:
                (done,), _ = await asyncio.wait([self._writing])
                if done.exception() is not None:
                    break
        if self._timer is not None:
            self._timer.cancel()

    def _count(self, subject: tuple[str, str, str], numbers: Sequence[int]) -> None:
        counts = self._counts.setdefault(subject, [0] * len(numbers))
        for i, number in enumerate(numbers):
            counts[i] += number
        self._arm(FLUSH_SECONDS)

    def _arm(self, seconds: float) -> None:
        if self._timer is None and self._write is not None and self._writing is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._flush)

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._write is None or self._writing is not None or not (self._counts or self._used):
            return
        counts, self._counts = self._counts, {}
        used, self._used = self._used, {}
        rows = [UsageRow(0, *subject, *numbers) for subject, numbers in counts.items()]
        self._writing = asyncio.wrap_future(self._write(int(self._clock()), rows, used))
        self._writing.add_done_callback(lambda done: self._written(done, counts, used))

    def _written(
        self,
        done: "asyncio.Future[None]",
        counts: Mapping[tuple[str, str, str], Sequence[int]],
        used: Mapping[str, int],
    ) -> None:
        self._writing = None
        error = None if done.cancelled() else done.exception()
        if error is not None:
            log.error("the ledger cannot be written, trying again: %s", error)
            for subject, numbers in counts.items():
                self._count(subject, numbers)
            self._used = {**used, **self._used}
        if self._counts or self._used:
            if error is not None and self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._arm(FLUSH_SECONDS if error is None else RETRY_SECONDS)
