"""JSON lines on standard output. No prompt, no output, no key ever gets into one (keys as eight hex
digits).
"""

import json
import logging
import queue
import sys
import time
from logging.handlers import QueueHandler, QueueListener

MAX_MESSAGE = 2000
QUEUED = 10_000
PER_SECOND = 10
"""Lines a second that one place in the code may write."""


class JsonLines(logging.Formatter):
    """One record, one line, whatever characters are in it."""

    def format(self, record: logging.LogRecord) -> str:
        """time (UTC), level, logger, message, and for an exception its type."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:MAX_MESSAGE],
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = record.exc_info[0].__name__
        return json.dumps(line)


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


def start_logging(level: str) -> QueueListener:
    """Send all loggers to standard output through a thread; stop the returned listener to flush."""
    lines: queue.Queue[logging.LogRecord] = queue.Queue(QUEUED)
    out = logging.StreamHandler(sys.stdout)
    out.setFormatter(JsonLines())
    front = DropWhenFull(lines)
    front.addFilter(RateLimit())
    root = logging.getLogger()
    root.handlers[:] = [front]
    root.setLevel(level.upper())
    # They say in prose at "info" what the server's own lines say, and the access log holds query strings.
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, root.level))
    logging.getLogger("uvicorn.access").disabled = True
    listener = QueueListener(lines, out)
    listener.start()
    return listener
