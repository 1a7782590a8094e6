"""Streams end once and for a reason; whoever leaves cancels the work; a drain lets run what runs."""

import asyncio
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from ktransformers.scheduler.client import RequestFailed
from ktransformers.server import connections, streaming
from ktransformers.server.api import ollama, openai
from ktransformers.server.api.encoding import encode

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def post(port: int, path: str, body: dict[str, Any], chunked: bool = False) -> socket.socket:
    """Send a request on a connection of its own, and leave the answer unread."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", port))
    if chunked:
        content = b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content)
        connection.sendall((head + "Transfer-Encoding: chunked\r\n\r\n").encode() + content)
    else:
        connection.sendall((head + f"Content-Length: {len(content)}\r\n\r\n").encode() + content)
    return connection


REQUESTS = [
    ("/v1/chat/completions", CHAT | {"stream": True}),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CHAT | {"stream": True, "n": 4}),
    ("/v1/chat/completions", CHAT | {"n": 4}),
    ("/v1/completions", {"model": "tiny", "prompt": ["a", "b"], "max_tokens": 100}),
    ("/api/chat", CHAT),
    ("/api/chat", CHAT | {"stream": False}),
    ("/api/generate", {"model": "tiny", "prompt": "x", "stream": False}),
]


@pytest.mark.parametrize("begun", [False, True], ids=["before the first token", "after it"])
@pytest.mark.parametrize(("path", "body"), REQUESTS)
def test_a_client_that_leaves_cancels(
    make, served, scheduler, path: str, body: dict[str, Any], begun: bool
) -> None:
    scheduler.reply = "x" * 1000
    scheduler.pause = 0.002 if begun else 30
    count = body.get("n", 1) * (2 if isinstance(body.get("prompt"), list) else 1)
    with served(make()) as port:
        connection = post(port, path, body)
        wait_for(lambda: len(scheduler.submits) == count)
        if begun:
            time.sleep(0.05)
        connection.close()
        wait_for(lambda: len(scheduler.left) == count)
    assert sorted(scheduler.left) == sorted(submit.id for submit in scheduler.submits)


def test_a_chunked_body_is_a_body(make, served) -> None:
    with served(make()) as port:
        connection = post(port, "/v1/chat/completions", CHAT, chunked=True)
        assert b"200 OK" in connection.recv(4096)
        connection.close()


def test_a_reader_that_stops_is_cut_off(make, served, scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "SEND_SECONDS", 0.2)
    scheduler.reply = "x" * 1_000_000
    body = {"model": "tiny", "prompt": "a" * 2000, "stream": True, "n": 8, "max_tokens": 2000, "logprobs": 2}
    with served(make()) as port:
        connection = post(port, "/v1/completions", body)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wait_for(lambda: scheduler.left)
        connection.close()


def test_a_server_answers_health_while_it_streams(make, served, scheduler) -> None:
    scheduler.reply, scheduler.pause = "x" * 1_000_000, 0.001
    with served(make()) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        connections = [post(port, "/v1/chat/completions", CHAT | {"stream": True}) for _ in range(16)]
        wait_for(lambda: len(scheduler.submits) == 16)
        for _ in range(50):
            assert client.get("/livez").status_code == 200
        assert not scheduler.left  # nobody had to be cut off for it
        for connection in connections:
            connection.close()


@pytest.mark.parametrize("head", [
    b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
    b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 4000 + b"\r\n",
    b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /livez HTTP/1.1\r\nX: " + b"x" * 40_000,
    b"\x16\x03\x01\x02\x00",
    b"nonsense\r\n\r\n",
    b"GET /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
])  # fmt: skip
def test_a_head_that_cannot_be_is_400(make, served, head: bytes) -> None:
    with served(make()) as port:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.settimeout(60)
            connection.sendall(head)
            assert connection.recv(4096).startswith(b"HTTP/1.1 400")
            while connection.recv(4096):
                pass
        assert httpx.get(f"http://127.0.0.1:{port}/livez").status_code == 200


def test_a_head_that_does_not_come(make, served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.1)
    with served(make()) as port:
        for sent in (b"", b"GET /livez HTTP/1.1\r\nHost: loc"):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.settimeout(60)
                connection.sendall(sent)
                assert connection.recv(4096) == b""


@pytest.mark.anyio
async def test_drain(app: FastAPI, connect, scheduler) -> None:
    scheduler.pause = 0.02
    generator = app.state.service.generator
    async with connect(app) as client:
        running = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT | {"stream": True}))
        while not scheduler.submits:
            await asyncio.sleep(0.001)
        assert (await client.get("/readyz")).status_code == 200
        generator.drain()
        assert scheduler.drained
        ready = await client.get("/readyz")
        assert ready.status_code == 503 and "draining" in ready.text
        assert (await client.get("/livez")).status_code == 200
        refused = await client.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        assert refused.headers["connection"] == "close" and refused.headers["retry-after"]
        assert await generator.stop(5)
        assert (await running).text.endswith("data: [DONE]\n\n")


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [True, False])
async def test_what_outlives_the_drain_is_told(app: FastAPI, connect, scheduler, stream: bool) -> None:
    scheduler.reply, scheduler.pause = "x" * 1000, 0.01
    generator = app.state.service.generator
    async with connect(app) as client:
        running = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT | {"stream": stream}))
        while not scheduler.submits:
            await asyncio.sleep(0.001)
        generator.drain()
        assert not await generator.stop(0.1)
        answer = await running
    if stream:
        assert '"code":"server_shutdown"' in answer.text and "[DONE]" not in answer.text
    else:
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "server_shutdown"


@pytest.mark.anyio
async def test_a_slow_reader_of_the_scheduler_is_told(app: FastAPI, connect, scheduler) -> None:
    """The scheduler's client cancels what nobody reads."""
    scheduler.reply, scheduler.pause = "x" * 1000, 0.002
    async with connect(app) as client:
        running = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT | {"stream": True}))
        while not scheduler.submits:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        scheduler.cancel(scheduler.submits[0].id)
        assert '"error":{' in (await running).text


def test_no_line_separator_inside_an_event() -> None:
    """httpx's iter_lines, which ollama's client reads with, splits at these; JSON allows them as they are."""
    text = "a\x85b\u2028c\u2029d\x1ce\x0bf\u00e9"
    encoded = encode({"text": text})
    assert len(encoded.decode().splitlines()) == 1
    assert json.loads(encoded) == {"text": text}


@pytest.mark.parametrize("failure", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/api/chat"])
def test_who_waits_in_the_queue_hears_of_it(
    make, served, scheduler, monkeypatch, path: str, failure: bool
) -> None:
    """The status, and then something that says nothing, long before a proxy gives up."""
    for module in (openai, ollama):
        monkeypatch.setattr(module, "QUEUE_PATIENCE", 0.05)
    monkeypatch.setattr(streaming, "HEARTBEAT_SECONDS", 0.05)
    scheduler.held, scheduler.reply = True, "x"
    scheduler.failure = RequestFailed("overloaded", "full", 1) if failure else None
    body = {"model": "tiny", "prompt": "x"} if path == "/v1/completions" else CHAT
    lines = []
    with (
        served(make()) as port,
        httpx.stream("POST", f"http://localhost:{port}{path}", json=body | {"stream": True}) as answer,
    ):
        assert answer.status_code == 200
        for line in filter(None, answer.iter_lines()):
            lines.append(line)
            scheduler.held = scheduler.held and len(lines) < 3
    if path == "/api/chat":
        pieces = [json.loads(line) for line in lines]
        empty = {"role": "assistant", "content": ""}
        assert sum(p.get("message") == empty and not p["done"] for p in pieces[:-1]) >= 3
        assert pieces[-1] == {"error": "full"} if failure else pieces[-1]["done"]
        return
    assert lines[:3] == [": in the queue"] * 3
    events = [line for line in lines if not line.startswith(":")]
    assert all(line.startswith("data: ") for line in events)
    if failure:
        assert json.loads(events[0][6:])["error"]["code"] == "overloaded" and len(events) == 1
    else:
        assert events[-1] == "data: [DONE]"


def test_who_leaves_the_queue_cancels(make, served, scheduler, monkeypatch) -> None:
    monkeypatch.setattr(openai, "QUEUE_PATIENCE", 0.05)
    scheduler.pause = 30
    with served(make()) as port:
        connection = post(port, "/v1/chat/completions", CHAT | {"stream": True})
        connection.settimeout(60)
        received = b""
        while b": in the queue" not in received:
            received += connection.recv(4096)
        connection.close()
        wait_for(lambda: scheduler.left == [submit.id for submit in scheduler.submits])
