"""Closed-loop streaming clients of an OpenAI-style server: each sends its next request when the last is done.

On plain sockets, and an event is not parsed unless it must be: the clients share the CPUs of the server that
they measure.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

_WORDS: Final = tuple(
    """time year people way day man thing woman life child world school state family student group country
    problem hand part place case week company system program question work government number night point
    home water room mother area money story fact month lot right study book eye job word business issue
    """.split()  # noqa: SIM905
)
_LINE_BYTES: Final = 1 << 22


class ServerError(Exception):
    """A server that cannot be reached or refuses; in one line."""


@dataclass(frozen=True)
class Traffic:
    """What the clients send."""

    clients: int = 16
    requests: int = 3
    """Of each client."""
    prompt: int = 100
    """Tokens in."""
    output: int = 64
    """Tokens out, whatever the model would like to say."""


@dataclass
class Answer:
    """One request, in seconds of a monotonic clock."""

    sent: float
    events: list[float] = field(default_factory=list)
    """Arrivals of the pieces of text."""
    tokens: int = 0


@dataclass(frozen=True)
class Measured:
    """One round of traffic."""

    tokens_per_second: float
    """Output tokens of all clients together."""
    first_p50: float
    first_p95: float
    """Seconds from sending a request to its first event."""
    between_p50: float
    between_p95: float
    """Seconds between the events of an answer."""
    output_tokens: int
    seconds: float


class Target:
    """A server at a URL, and the model that it lists first. `open` it, and `calibrate` before `load`."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme != "http" or not parts.hostname:
            raise ServerError(f"{url} is not a URL such as http://127.0.0.1:8000")
        self.url = url
        self._host, self.port = parts.hostname, parts.port or 80
        self.local = self._host in ("127.0.0.1", "::1", "localhost")
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._model = ""
        self._words = 0

    async def open(self) -> None:
        """Find the name of the model. Errors: ServerError."""
        reader, writer = await self._send("GET", "/v1/models")
        self._model = str((await self._json(reader, writer))["data"][0]["id"])

    async def calibrate(self, tokens: int) -> None:
        """Find how many words are a prompt of so many tokens, by the usage that the server reports."""
        self._words = tokens
        for _ in range(3):
            seen = await self._prompt_tokens(self._prompt(random.Random(0)))
            if seen == tokens:
                return
            self._words = max(1, self._words + tokens - seen)

    async def load(self, traffic: Traffic, seed: int) -> Measured:
        """One round; equal seeds send equal prompts, no two of which begin alike. Errors: ServerError."""
        begin = time.monotonic()
        rounds = await asyncio.gather(
            *(self._client(traffic, random.Random(f"{seed} {c}")) for c in range(traffic.clients))
        )
        seconds = time.monotonic() - begin
        answers = [answer for answers in rounds for answer in answers]
        firsts = [a.events[0] - a.sent for a in answers]
        gaps = [b - a for answer in answers for a, b in zip(answer.events, answer.events[1:], strict=False)]
        tokens = sum(answer.tokens for answer in answers)
        return Measured(
            tokens / seconds,
            quantile(firsts, 0.5),
            quantile(firsts, 0.95),
            quantile(gaps, 0.5),
            quantile(gaps, 0.95),
            tokens,
            seconds,
        )

    async def first_token(self) -> float:
        """Seconds of a request for one token."""
        answer = await self._stream("The", 1)
        return answer.events[0] - answer.sent

    async def _client(self, traffic: Traffic, words: random.Random) -> list[Answer]:
        return [await self._stream(self._prompt(words), traffic.output) for _ in range(traffic.requests)]

    def _prompt(self, words: random.Random) -> str:
        return " ".join(words.choices(_WORDS, k=self._words))

    async def _prompt_tokens(self, prompt: str) -> int:
        body = {"model": self._model, "prompt": prompt, "max_tokens": 1, "stream": False}
        reader, writer = await self._send("POST", "/v1/completions", body)
        return int((await self._json(reader, writer))["usage"]["prompt_tokens"])

    async def _json(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> dict[str, Any]:
        """The whole answer: the connection is closed after it. Servers send it in one chunk, or in none."""
        text = (await reader.read()).decode()
        writer.close()
        try:
            answer: dict[str, Any] = json.loads(text[text.index("{") : text.rindex("}") + 1])
        except ValueError:
            raise ServerError(f"{self.url}: not JSON: {text[:200]}") from None
        return answer

    async def _stream(self, prompt: str, output: int) -> Answer:
        answer = Answer(time.monotonic())
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": output,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        reader, writer = await self._send("POST", "/v1/completions", body)
        last = b""
        try:
            async for line in lines(reader):
                if not line.startswith(b"data: {"):
                    continue
                if b'"error"' in line[:16]:
                    raise ServerError(f"{self.url}: {line.decode().strip()}")
                last = line
                if b'"choices":[]' not in line:
                    answer.events.append(time.monotonic())
        finally:
            writer.close()
        answer.tokens = _completion_tokens(last)
        if not answer.events or answer.tokens != output:
            what = f"{answer.tokens} tokens in {len(answer.events)} events instead of {output}"
            raise ServerError(f"{self.url}: {what}")
        return answer

    async def _send(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The answer's stream after its head. Errors: ServerError."""
        data = b"" if body is None else json.dumps(body).encode()
        head = [
            f"{method} {self._path}{path} HTTP/1.1",
            f"Host: {self._host}:{self.port}",
            "Content-Type: application/json",
            f"Content-Length: {len(data)}",
            "Connection: close",
        ]
        try:
            reader, writer = await asyncio.open_connection(self._host, self.port, limit=_LINE_BYTES)
            writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + data)
            await writer.drain()
            status = (await reader.readline()).decode().strip()
            while (await reader.readline()).strip():
                pass
        except OSError as error:
            raise ServerError(f"{self.url}: {error.strerror or error}") from None
        if " 200 " not in f"{status} ":
            said = (await reader.read(500)).decode(errors="replace").strip()
            writer.close()
            raise ServerError(f"{self.url}: {status}: {said}")
        return reader, writer


async def lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """As they come, without their ends: awaited once for all that has come, not for each of them,
    and an event has two."""
    rest = b""
    while data := await reader.read(_LINE_BYTES):
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield line
    if rest:
        yield rest


def _completion_tokens(line: bytes) -> int:
    """Of the last event, which carries the usage."""
    event = json.loads(line.removeprefix(b"data: ") or b"{}")
    return int((event.get("usage") or {}).get("completion_tokens", 0))


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` of the others are not above; 0 for none."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else 0.0
