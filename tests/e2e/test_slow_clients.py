"""Clients that read slowly, or say nothing, cost the others nothing."""

import asyncio
import json
import socket
import time

from clients import LONG, SHORT, ask, client, drained, stream


def test_slow_readers_do_not_slow_the_others(start) -> None:
    server = start()
    front = server.role("server")

    def slow() -> socket.socket:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", server.port))
        body = json.dumps(LONG | {"logprobs": 20}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        return connection

    async def fast() -> float:
        async with client() as http:
            begin = time.monotonic()
            body = SHORT | {"max_tokens": 32}
            ends = await asyncio.gather(*(stream(http, server.url, body) for _ in range(16)))
            assert {end for _, end in ends} <= {"length", "stop"}
            return time.monotonic() - begin

    alone = asyncio.run(fast())
    before = front.memory_info().rss
    connections = [slow() for _ in range(32)]
    time.sleep(0.5)
    beside = asyncio.run(fast())
    grown = front.memory_info().rss - before
    for connection in connections:
        connection.close()
    print(f"fast streams: {alone:.2f} s alone, {beside:.2f} s beside 32 slow; RSS +{grown / 2**20:.1f} MiB")
    assert grown < 64 << 20
    assert drained(server)["ktransformers_kv_blocks_used"] == 0


def test_idle_and_unfinished_connections(start) -> None:
    """They cost a descriptor each, and no time of the others; a head that does not come is hung up on."""
    server = start()
    front = server.role("server")
    files = front.num_fds()
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(500)]
    slowloris = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(500)]
    for connection in slowloris:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: loc")
    begin = time.monotonic()
    assert ask(server).status_code == 200
    print(f"answered after {time.monotonic() - begin:.2f} s beside 1,000 idle connections")
    for connection in slowloris:
        connection.settimeout(60)
        while connection.recv(4096):
            pass
        connection.close()
    for connection in idle:
        connection.close()
    deadline = time.monotonic() + 60
    while front.num_fds() > files + 8 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert front.num_fds() <= files + 8
