"""`ktransformers chat`: a conversation in the terminal, over the OpenAI API of a running server."""

import http.client
import json
import re
import readline
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ktransformers.server.config import state_dir

HELP = "/clear starts over, /exit or Ctrl-D ends, Ctrl-C stops an answer"
_HISTORY_LINES = 1000
# What a model writes may not steer the terminal.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class ChatError(Exception):
    """The server cannot be reached, or refuses; in one line."""


@dataclass
class Answer:
    """What came back so far."""

    text: str = ""
    tokens: int = 0
    finish: str = ""


@dataclass
class Server:
    """A server with the OpenAI API."""

    url: str
    key: str = ""
    timeout: float = 600.0
    _path: str = field(init=False, default="")

    def connect(self) -> http.client.HTTPConnection:
        """A new connection, not opened yet. Errors: ChatError."""
        parts = urlsplit(self.url if "//" in self.url else f"http://{self.url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ChatError(f"{self.url} is not a URL such as http://127.0.0.1:8000")
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        try:
            return kind(parts.hostname, parts.port, timeout=self.timeout)
        except ValueError as error:  # the port is looked at only now
            raise ChatError(f"{self.url}: {error}") from None

    def request(
        self, connection: http.client.HTTPConnection, path: str, body: dict[str, Any] | None = None
    ) -> http.client.HTTPResponse:
        """GET, or POST when there is a body. Errors: ChatError, also for a status that is not 200."""
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        method = "GET" if body is None else "POST"
        # What was typed, or piped, in another encoding has surrogates, which no JSON may.
        data = None if body is None else json.dumps(body, ensure_ascii=False).encode(errors="replace")
        try:
            connection.request(method, self._path + path, data, headers)
            response = connection.getresponse()
            if response.status != 200:
                raise ChatError(_refusal(response))
        except (OSError, http.client.HTTPException) as error:
            cause = error.strerror if isinstance(error, OSError) and error.strerror else error
            why = f"no answer from {self.url} ({cause}); is `ktransformers serve` running?"
            raise ChatError(why) from None
        return response

    def first_model(self) -> str:
        """The name of the model that the server lists first."""
        with closing(self.connect()) as connection, self.request(connection, "/v1/models") as response:
            listed = json.load(response)["data"]
        if not listed:
            raise ChatError(f"{self.url} serves no model")
        return str(listed[0]["id"])

    def stream(self, body: dict[str, Any], answer: Answer) -> Iterator[str]:
        """Pieces of the answer, also noted in `answer`. Leaving early closes the connection: cancelled."""
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        with closing(self.connect()) as connection:
            response = self.request(connection, "/v1/chat/completions", body)
            try:
                for line in response:
                    data = line.removeprefix(b"data:").strip()
                    if data == line.strip() or data == b"[DONE]":
                        continue
                    event = json.loads(data)
                    if "error" in event:
                        raise ChatError(str(event["error"].get("message", event["error"])))
                    if event.get("usage"):
                        answer.tokens = event["usage"]["completion_tokens"]
                    for choice in event["choices"]:
                        piece = choice["delta"].get("content") or ""
                        answer.text += piece
                        answer.finish = choice.get("finish_reason") or answer.finish
                        yield piece
            except (OSError, http.client.HTTPException) as error:
                raise ChatError(f"the connection broke: {error}") from None


def _refusal(response: http.client.HTTPResponse) -> str:
    text = response.read(65536).decode("utf-8", "replace")
    with suppress(ValueError, LookupError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    return f"{response.status} {response.reason}: {_CONTROL.sub(' ', text).strip()[:500]}"


def run(url: str, key: str, model: str, system: str, options: dict[str, Any]) -> int:
    """Talk until the end of input; the exit code. `options` are fields of each request."""
    server = Server(url, key)
    beginning = [{"role": "system", "content": system}] if system else []
    try:
        model = model or server.first_model()
    except ChatError as error:
        print(f"ktransformers chat: {error}", file=sys.stderr)
        return 1
    interactive = sys.stdin.isatty()
    messages = list(beginning)
    failed = False
    if interactive:
        print(f"{model} at {url}; {HELP}")
    for line in _lines(interactive):
        if line == "/clear":
            messages = list(beginning)
        elif line == "/help":
            print(HELP)
        elif line.startswith("/"):
            print(f"{line} is unknown; {HELP}", file=sys.stderr)
        else:
            messages.append({"role": "user", "content": line})
            body = {"model": model, "messages": messages} | options
            answer, problem = _show(server, body, sys.stdout.isatty())
            if problem:
                failed = True
                print(f"ktransformers chat: {problem}", file=sys.stderr)
            if answer.text:
                messages.append({"role": "assistant", "content": answer.text})
            else:
                messages.pop()
    return 1 if failed and not interactive else 0


def _show(server: Server, body: dict[str, Any], terminal: bool) -> tuple[Answer, str]:
    """Print an answer as it comes; what came, and what went wrong."""
    answer, problem, begin = Answer(), "", time.monotonic()
    try:
        for piece in server.stream(body, answer):
            print(_CONTROL.sub("\ufffd", piece), end="", flush=True)
    except KeyboardInterrupt:
        answer.finish = "stopped"
    except ChatError as broken:
        problem = str(broken)
    print()
    if terminal and not problem:
        seconds = time.monotonic() - begin
        rate = f"{answer.tokens} tokens, {answer.tokens / seconds:.1f} a second" if answer.tokens else ""
        reason = "" if answer.finish == "stop" else answer.finish
        if note := ", ".join(filter(None, (rate, reason))):
            print(f"\x1b[2m({note})\x1b[0m")
    return answer, problem


def _lines(interactive: bool) -> Iterator[str]:
    """What the user says, line by line; with editing and a history that is kept on a terminal."""
    history = state_dir() / "chat_history"
    if interactive:
        with suppress(OSError):
            readline.read_history_file(history)
        readline.set_history_length(_HISTORY_LINES)
    try:
        while True:
            try:
                line = input(">>> " if interactive else "").strip()
            except KeyboardInterrupt:
                print()
                continue
            except EOFError:
                return
            if line in ("/exit", "/bye", "/quit"):
                return
            if line:
                yield line
    finally:
        if interactive:
            print()
            with suppress(OSError):
                history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                readline.write_history_file(history)
                history.chmod(0o600)
