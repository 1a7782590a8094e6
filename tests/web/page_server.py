"""A stand-in for the server, for the page's own tests: the built page under security headers, a scripted API.

`python tests/web/page_server.py [PORT]` serves it for looking at the page by hand. What the API answers is
chosen by the last message of the user: `#slow` streams until the client leaves, `#error` refuses with 429,
`#long` with 400, `#broken` fails inside the stream, `#cut` closes too early, `#xss N` streams the N-th entry
of the corpus, `#think` reasons first; all else gets `ANSWER`.
"""

import json
import mimetypes
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DIST = HERE.parent.parent / "web" / "dist"
CORPUS: list[str] = json.loads((HERE / "xss_corpus.json").read_text("utf-8"))
ANSWER = (HERE / "answer.md").read_text("utf-8")
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class MockServer(ThreadingHTTPServer):
    """Serves on a port of its own choice; remembers what was asked."""

    daemon_threads = True

    def __init__(self, port: int = 0, delay: float = 0.002) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.delay = delay
        """Seconds between two pieces of an answer."""
        self.api_key = ""
        """The key that the API asks for; empty: none."""
        self.requests: list[dict[str, Any]] = []
        """Bodies of the chat requests, in order."""
        self.disconnected = threading.Event()
        """Set when a client has left before its answer was complete."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: MockServer

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class names it so)
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            if self._authorised():
                self._json(200, {"object": "list", "data": [{"id": "smollm2"}, {"id": "other"}]})
            return
        name = "index.html" if self.path == "/" else self.path.lstrip("/")
        file = (DIST / name).resolve()
        if not file.is_relative_to(DIST) or not file.is_file():
            self._json(404, _error("Not found.", "not_found"))
            return
        self._send(200, mimetypes.guess_type(file.name)[0] or "application/octet-stream", file.read_bytes())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._authorised():
            return
        if self.headers["Origin"] != self.server.url.rstrip("/"):
            self._json(403, _error("Another page's request.", "origin_not_allowed"))
            return
        self.server.requests.append(body)
        # The page joins messages that were not answered.
        prompt: str = body["messages"][-1]["content"].rpartition("\n\n")[2]
        if prompt.startswith("#error"):
            message = "You have sent more than 3 requests in this minute."
            self._json(429, _error(message, "rate_limit_exceeded"), {"Retry-After": "7"})
            return
        if prompt.startswith("#long"):
            self._json(400, _error("The prompt is too long.", "context_length_exceeded"))
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for event in _events(prompt):
                self.wfile.write(f"data: {event}\n\n".encode())
                self.wfile.flush()
                time.sleep(self.server.delay)
        except (BrokenPipeError, ConnectionResetError):
            self.server.disconnected.set()

    def _authorised(self) -> bool:
        key = self.server.api_key
        if key in ("", self.headers.get("Authorization", "").removeprefix("Bearer ")):
            return True
        self._json(401, _error("No such API key.", "invalid_api_key"))
        return False

    def _json(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        self._send(status, "application/json", json.dumps(body).encode(), headers)

    def _send(self, status: int, kind: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (SECURITY_HEADERS | {"Content-Type": kind} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _events(prompt: str) -> Iterator[str]:
    """The `data` of each event that answers `prompt`."""
    if prompt.startswith("#slow"):
        for number in range(1_000_000):
            yield _delta(content=f"{number} ")
    if prompt.startswith("#broken"):
        yield _delta(content="So far so good")
        yield json.dumps(_error("The engine was restarted.", "engine_restarted"))
        return
    if prompt.startswith("#think"):
        for word in ("Let ", "me ", "see."):
            yield _delta(reasoning_content=word)
    answer = CORPUS[int(prompt.split()[1])] if prompt.startswith("#xss") else ANSWER
    pieces = [answer[start : start + 4] for start in range(0, len(answer), 4)]
    for piece in pieces:
        yield _delta(content=piece)
    if prompt.startswith("#cut"):
        return
    yield json.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    usage = {"prompt_tokens": 10, "completion_tokens": len(pieces), "total_tokens": 10 + len(pieces)}
    yield json.dumps({"choices": [], "usage": usage})
    yield "[DONE]"


def _error(message: str, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "error", "param": None, "code": code}}


def _delta(**fields: str) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": fields, "finish_reason": None}], "usage": None})


if __name__ == "__main__":
    mock = MockServer(int(sys.argv[1]) if len(sys.argv) > 1 else 8000, delay=0.02)
    print(mock.url)
    mock.serve_forever()
