"""One connection, several requests: what a client says out of turn, and what it leaves unsaid."""

import json
import socket
import time
from collections.abc import Callable

import pytest

from ktransformers.server import connections

LIVE = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"


def chat(stream: bool) -> bytes:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
    return post("/v1/chat/completions", json.dumps(body).encode())


def post(path: str, body: bytes, length: int | None = None) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % (len(body) if length is None else length) + body


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def read_until(connection: socket.socket, part: bytes) -> bytes:
    connection.settimeout(60)
    read = b""
    while part not in read:
        data = connection.recv(1 << 16)
        assert data, read
        read += data
    return read


def read_all(connection: socket.socket) -> bytes:
    connection.settimeout(60)
    read = b""
    while data := connection.recv(1 << 16):
        read += data
    return read


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("behind", [LIVE, chat(True), b"GET /livez HT"], ids=["whole", "another", "half"])
def test_a_client_leaves_with_requests_in_line(make, served, scheduler, stream: bool, behind: bytes) -> None:
    scheduler.pause = 0.5
    with served(make()) as port:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(chat(stream))
            wait_for(lambda: scheduler.submits)
            connection.sendall(behind)
            time.sleep(0.05)
        wait_for(lambda: scheduler.left)
        assert len(scheduler.submits) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_requests_in_line_are_not_taken(make, served, scheduler, stream: bool) -> None:
    with served(make()) as port:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(chat(stream) + post("/v1/chat/completions", b" " * 70_000) + LIVE)
            answer = read_all(connection)
        assert answer.count(b"HTTP/1.1") == 1 and b"chat.completion" in answer
        assert (b"[DONE]" in answer) == stream
        with socket.create_connection(("127.0.0.1", port)) as connection:
            for request, part in ((LIVE, b"ok\n"), (chat(False), b"chat.completion"), (LIVE, b"ok\n")):
                connection.sendall(request)
                read_until(connection, part)
    assert len(scheduler.submits) == 2


def test_nothing_is_written_into_a_running_answer(make, served, scheduler) -> None:
    scheduler.reply, scheduler.pause = "x" * 4000, 0.01
    with served(make()) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(chat(True))
        begun = read_until(connection, b"data: ")
        connection.sendall(b"nonsense\r\n\r\n")
        assert (begun + read_all(connection)).count(b"HTTP/1.1") == 1
        wait_for(lambda: scheduler.left)


def test_a_body_that_nobody_waits_for(make, served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.2)
    with served(make()) as port:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(post("/nothing", b"{", length=1000))
            read = read_all(connection)
            assert read.startswith(b"HTTP/1.1 404") and read.count(b"HTTP/1.1") == 1
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(post("/nothing", b"{}"))
            read_until(connection, b"not_found")
            time.sleep(0.3)  # it is kept alive, for the body has come
            connection.sendall(LIVE)
            read_until(connection, b"ok\n")


@pytest.mark.parametrize("at_once", [True, False])
def test_an_offer_of_another_protocol_is_passed_over(make, served, at_once: bool) -> None:
    """As Java's HTTP client makes with each request, and a page's websocket."""
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n"
    head, body = chat(False).split(b"\r\n\r\n")
    parts = [head + b"\r\n" + offer + b"\r\n", body]
    with served(make()) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        for _ in range(2):
            for part in [b"".join(parts)] if at_once else parts:
                connection.sendall(part)
                time.sleep(0.02)
            read_until(connection, b"chat.completion")
        websocket = offer.replace(b"h2c", b"websocket")
        connection.sendall(LIVE[:-2] + websocket + b"\r\n")
        read_until(connection, b"ok\n")


def test_idle_connections_make_room(make, served, scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 3)
    scheduler.pause = 0.05

    def connect() -> socket.socket:
        return socket.create_connection(("127.0.0.1", port))

    with served(make()) as port, connect() as running, connect() as idle, connect() as half:
        running.sendall(chat(True))
        idle.sendall(LIVE)
        read_until(idle, b"ok\n")
        half.sendall(LIVE[:20])
        wait_for(lambda: scheduler.submits)
        others = [connect() for _ in range(6)]
        others[-1].sendall(LIVE)  # one of those before gave way to each
        read_until(others[-1], b"ok\n")
        read_until(running, b"[DONE]")
        for another in others:
            another.close()


def test_a_connection_too_many(make, served, scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 2)
    scheduler.pause = 0.05
    with served(make()) as port:
        running = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        for connection in running:
            connection.sendall(chat(True))
        wait_for(lambda: len(scheduler.submits) == 2)
        with socket.create_connection(("127.0.0.1", port)) as another:
            assert read_all(another) == b""
        for connection in running:
            read_until(connection, b"[DONE]")
            connection.close()


@pytest.mark.parametrize("value", [b"a" * 40_000 + b"\r\n\r\n", b"a" * 40_000], ids=["whole", "half"])
def test_a_large_head_is_named(make, served, value: bytes) -> None:
    with served(make()) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Large: " + value)
        assert b"head is larger than 16 KiB" in read_all(connection)


def test_a_body_too_large_is_told_to_a_client_that_writes_before_it_reads(make, served) -> None:
    with served(make()) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(post("/v1/completions", b" " * (40 << 20)))
        assert read_until(connection, b"request_too_large").startswith(b"HTTP/1.1 413")
        connection.sendall(LIVE)
        read_until(connection, b"ok\n")
