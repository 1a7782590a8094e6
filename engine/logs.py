"""The log of every process: JSON lines on standard output, or on a terminal lines for people.

No prompt, no output, no key ever gets into one (keys as eight hex digits). No process ever waits for its log:
a full disk, a stopped terminal or a reader that went away costs lines, which the next line counts.
"""

import asyncio
import errno
import json
import logging
import os
import queue
import sys
import threading
import time
import traceback
from contextlib import suppress
from logging.handlers import QueueHandler, QueueListener
from typing import Any

MAX_MESSAGE = 2000
QUEUED = 10_000
PER_SECOND = 10
"""Lines a second that one place in the code may write."""
FLUSH_SECONDS = 1.0
"""What the last lines may take at the end of the process."""
_STDOUT = 1
_CONTROL = dict.fromkeys((*range(32), *range(0x7F, 0xA0)), "\ufffd") | {9: " ", 10: "\n    "}
"""A terminal obeys these, and a model's name or a path may hold them."""

log = logging.getLogger("ktransformers.engine.logs")


def frames(error: BaseException | None) -> str:
    """What kind of error it is and where it was raised. Not its text, which may hold what a client sent."""
    if error is None:
        return "no exception"
    found = traceback.extract_tb(error.__traceback__)[-6:]
    number = error.errno if isinstance(error, OSError) else None
    kind = " ".join(filter(None, (type(error).__name__, errno.errorcode.get(number or 0))))
    return f"{kind} at {' < '.join(f'{f.name}:{f.lineno}' for f in reversed(found))}"


def log_loop_error(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An exception that nobody waits for. asyncio's own line shows its text, and the arguments of calls."""
    log.error("the event loop met %s", frames(context.get("exception")))


class JsonLines(logging.Formatter):
    """One record, one line, whatever characters are in it."""

    def format(self, record: logging.LogRecord) -> str:
        """time (UTC), level, logger, message, and for an exception its type and where it came from."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:MAX_MESSAGE],
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = frames(record.exc_info[1])
        return json.dumps(line)


class ForPeople(logging.Formatter):
    """What a terminal shows: the time of day, which process, and what it says."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        """One line, or more that are indented; what is worse than "info" in colour."""
        message = record.getMessage()[:MAX_MESSAGE].strip().translate(_CONTROL)
        if record.exc_info:
            message += f" ({frames(record.exc_info[1])})"
        if record.levelno >= logging.WARNING:
            message = f"\x1b[{31 if record.levelno >= logging.ERROR else 33}m{message}\x1b[0m"
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        return f"\x1b[2m{clock} {self._role:<10}\x1b[0m{message}"


class RateLimit(logging.Filter):
    """Lets each place in the code write PER_SECOND lines a second; what was left out is counted in the next
    one."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple[str, int], tuple[int, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """False for a line too many."""
        place, second = (record.pathname, record.lineno), int(record.created)
        last, count = self._seen.get(place, (second, 0))
        left_out = max(0, count - PER_SECOND)
        if last != second:
            count = 0
            if left_out:
                record.msg, record.args = f"{record.getMessage()} [{left_out} more left out]", None
        self._seen[place] = (second, count + 1)
        return count < PER_SECOND


class DropWhenFull(QueueHandler):
    """A full disk or a stopped reader of the pipe must not stop the server; the next line says how many were
    lost.
    """

    _dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        """Put the record in the queue, or drop it."""
        if self._dropped:
            record.msg, record.args = f"{record.getMessage()} [{self._dropped} lines dropped]", None
        try:
            self.queue.put_nowait(record)
            self._dropped = 0
        except queue.Full:
            self._dropped += 1

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Nothing: formatting is the listener's."""
        return record


class _StandardOutput(logging.Handler):
    """Writes to the descriptor itself: a buffer's lock, held by a write that never ends, would keep the
    process from exiting.
    """

    lost = 0

    def createLock(self) -> None:
        """No lock: one thread writes, and the end of the process would wait for the lock."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line, or count it as lost."""
        if self.lost:
            record.msg, record.args = f"{record.getMessage()} [{self.lost} lines lost]", None
        left = self.format(record).encode("utf-8", "replace") + b"\n"
        try:
            while left:
                left = left[os.write(_STDOUT, left) :]
            self.lost = 0
        except OSError:  # no space, or nobody reads: no reason to stop serving
            self.lost += 1


class Listener(QueueListener):
    """The thread that writes."""

    def stop(self) -> None:
        """Write what is queued, but do not wait for a reader that does not read."""
        thread: threading.Thread | None = self._thread
        self._thread = None
        if thread is not None:
            with suppress(queue.Full):
                self.enqueue_sentinel()
                thread.join(FLUSH_SECONDS)


def start_logging(role: str, level: str = "info") -> Listener:
    """Send all loggers of this process to standard output through a thread; stop the returned listener to
    flush.
    """
    lines: queue.Queue[logging.LogRecord] = queue.Queue(QUEUED)
    out = _StandardOutput()
    out.setFormatter(ForPeople(role) if sys.stdout.isatty() else JsonLines())
    front = DropWhenFull(lines)
    front.addFilter(RateLimit())
    root = logging.getLogger()
    root.handlers[:] = [front]
    root.setLevel(level.upper())
    # They say in prose at "info" what the server's own lines say, and the access log holds query strings.
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, root.level))
    logging.getLogger("uvicorn.access").disabled = True
    listener = Listener(lines, out)
    listener.start()
    return listener
