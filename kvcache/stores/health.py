"""Whether a disk store goes on after errors of its medium.

no space, read-only   nothing is written for a minute, then it is tried again
other errors          three within a minute: off for good
"""

import errno
import logging
import sqlite3
import time
from collections import deque

from ktransformers.kvcache.stores.store import State

PAUSE = 60.0
"""Seconds."""
ERRORS = 3
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NOT_WRITABLE = _NO_SPACE | {errno.EROFS, errno.EACCES, errno.EPERM}
_OUR_LIMITS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN})
_log = logging.getLogger(__name__)


def no_space(error: Exception) -> bool:
    """Whether an error goes away when something is deleted."""
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return isinstance(error, OSError) and error.errno in _NO_SPACE


def is_ours(error: OSError) -> bool:
    """Whether an error says nothing of the medium: this process has too many files open, or the like."""
    return error.errno in _OUR_LIMITS


class Health:
    """Its owner holds a lock around each call."""

    def __init__(self) -> None:
        self.errors = 0
        self._reason = ""
        self._off = False
        self._paused_until = 0.0
        self._recent: deque[float] = deque(maxlen=ERRORS)
        self._quiet_until = 0.0

    @property
    def state(self) -> State:
        """As of now."""
        if self._off:
            return "off"
        return "read-only" if time.monotonic() < self._paused_until else "on"

    @property
    def reason(self) -> str:
        """Why the state is what it is; "" when it is on."""
        return self._reason if self.state != "on" else ""

    def failed(self, doing: str, error: Exception) -> None:
        """Something could not be done."""
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        self.errors += 1
        if no_space(error) or (isinstance(error, OSError) and error.errno in _NOT_WRITABLE):
            self.pause(f"{doing}: {why}")
            return
        self._say(f"{doing}: {why}")
        if not (isinstance(error, OSError) and is_ours(error)):
            self._recent.append(time.monotonic())
            if len(self._recent) == ERRORS and self._recent[-1] - self._recent[0] < PAUSE:
                self.turn_off(f"{ERRORS} errors within a minute, the last: {doing}: {why}")

    def pause(self, reason: str) -> None:
        """Nothing is written for a while."""
        self._reason = reason
        self._paused_until = time.monotonic() + PAUSE
        self._say(f"nothing is stored for a minute: {reason}")

    def turn_off(self, reason: str) -> None:
        """For good."""
        if not self._off:
            self._off, self._reason = True, reason
            _log.warning("the disk tier is off: %s", reason)

    def _say(self, text: str) -> None:
        """Once a minute at most."""
        now = time.monotonic()
        if now >= self._quiet_until:
            self._quiet_until = now + PAUSE
            _log.warning("disk tier: %s", text)
