"""Who need not ask the scheduler for a place in its queue, because it has just refused the tenant.

The scheduler alone decides who waits; this spares the asking, and what it takes to ask: reading a body,
rendering it, encoding it. So it has to let through whoever might be let in:

- Who is refused while others of the tenant's requests wait has its share of a full queue. The next place for
  it is the one that a request of its own leaves: for each that does, one may ask. Others may have left as
  well; whether they have, one of its requests asks now and then.
- Who has nothing waiting is not kept from asking for longer than a moment.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from ktransformers.server.errors import RequestError

REFUSAL_SECONDS = 0.25
"""So long what the scheduler has refused a tenant without a place is refused to it again without asking."""
IN_LINE_SECONDS = 5.0
"""How often one of a tenant that has places asks, although none of its own has left one."""
_MOST = 1024


@dataclass
class _Line:
    """One tenant's requests."""

    waiting: int = 0
    """Submitted and not begun."""
    places: int = 0
    """Left by its own since it was refused; so many may ask."""
    error: RequestError | None = None
    until: float = 0.0


class Refusals:
    """By tenant. Used on one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lines: dict[str, _Line] = {}

    def check(self, tenant: str) -> None:
        """Raises the RequestError with which its last request was refused, if the next one would be, too."""
        line = self._lines.get(tenant)
        if line is None or line.error is None or line.places:
            return
        now = self._clock()
        if now < line.until:
            # It is raised again and again, and would keep the frames of each time.
            raise line.error.with_traceback(None)
        if line.waiting:
            line.places, line.until = 1, now + IN_LINE_SECONDS

    def join(self, tenant: str) -> None:
        """One of its requests asks for a place."""
        line = self._lines.get(tenant)
        if line is None:
            if len(self._lines) >= _MOST:
                self._lines = {name: line for name, line in self._lines.items() if line.waiting}
            line = self._lines[tenant] = _Line()
        line.waiting += 1
        line.places = max(0, line.places - 1)

    def leave(self, tenant: str) -> None:
        """One that joined has begun, or waits no longer for reasons of its own."""
        line = self._lines[tenant]
        line.waiting -= 1
        line.places += 1

    def refused(self, tenant: str, error: RequestError) -> None:
        """One that joined got no place, or lost it to another tenant."""
        line = self._lines[tenant]
        line.waiting -= 1
        line.places = 0
        line.error = error
        line.until = self._clock() + (IN_LINE_SECONDS if line.waiting else REFUSAL_SECONDS)
