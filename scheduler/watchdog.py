"""Is the engine still alive? Of one life of it, from Ready to Lost."""

import signal
from collections.abc import Callable

from ktransformers.scheduler.stats import Pace

HANG_SECONDS = 30.0
HANG_FACTOR = 10.0
UNMEASURED_HANG_SECONDS = 300.0
"""Before the first step is done nobody knows how long one takes."""
MOVE_SECONDS = 600.0
"""The engine answers a move, or gives it up, in a tenth of that. It holds blocks until then."""
KILL_SECONDS = 5.0
"""From SIGABRT, on which the engine dumps its stacks, to SIGKILL."""


class Watchdog:
    """Says when to signal the engine: a step is in hand and takes far longer than it should, or a move of a
    block has no answer.

    Once condemned an engine gets no more steps: it is expected to die, and its supervisor to start another.
    """

    def __init__(self, pace: Pace, asked: Callable[[], float | None]) -> None:
        """`asked`: when the oldest move that has no answer was sent; None: all have."""
        self.condemned = False
        self._asked = asked
        self._slept = 0.0
        self._pace = pace
        self._since = 0.0
        self._due: signal.Signals | None = None

    def moved(self, now: float) -> None:
        """The oldest step in flight became the oldest: the one before it is done, or there was none."""
        if not self.condemned:
            self._since = now

    def slept(self, seconds: float) -> None:
        """This process stood still for so long: nobody else is to blame."""
        self._since += seconds
        self._slept += seconds

    def condemn(self, now: float) -> None:
        """The engine has to go."""
        if not self.condemned:
            self.condemned = True
            self._since = now
            self._due = signal.SIGABRT

    def check(self, now: float, tokens: int) -> signal.Signals | None:
        """The signal that is due, once. `tokens`: of the oldest step in flight; 0: none is."""
        if not self.condemned and tokens and now - self._since > self._patience(tokens):
            self.condemn(now)
        asked = self._asked()
        if asked is None:
            self._slept = 0.0
        elif now - asked - self._slept > MOVE_SECONDS:
            self.condemn(now)
        due, self._due = self._due, None
        if due is signal.SIGABRT:
            self._since = now
        elif self.condemned and now - self._since > KILL_SECONDS:
            self._since = now
            due = signal.SIGKILL
        return due

    def _patience(self, tokens: int) -> float:
        expected = self._pace.at_most(tokens)
        return UNMEASURED_HANG_SECONDS if expected is None else max(HANG_SECONDS, HANG_FACTOR * expected)
