"""The socket between two processes: order, loss, garbage, back-pressure, latency."""

import asyncio
import os
import pickle
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop
import zmq

from ktransformers.engine.channel import EPOCH, Back, Client, Full, Lost, PeerGone, Server
from ktransformers.engine.client import EngineClient
from ktransformers.engine.protocol import Hello, Loading, ToEngine


class Ping(msgspec.Struct, frozen=True, tag=True, array_like=True):
    n: int
    numbers: list[int] = []
    text: str = ""


class Pong(msgspec.Struct, frozen=True, tag=True, array_like=True):
    n: int


Message = Ping | Pong


@pytest.fixture
def path() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="kt") as folder:
        yield f"{folder}/s"


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    """Runs a test's coroutine, at most 20 s, on each kind of event loop."""
    return lambda main: request.param(asyncio.wait_for(main, 120))


def test_both_directions_in_order(path: str, run: Callable[..., None]) -> None:
    async def main() -> None:
        server: Server[Message] = Server(path, Message)
        clients: list[Client[Message]] = [Client(path, Message) for _ in range(3)]
        for client in clients:
            assert await client.recv() == Back()
            for n in range(100):
                client.send(Ping(n))
        seen: dict[bytes, list[int]] = {}
        for _ in range(300):
            peer, message = await server.recv()
            seen.setdefault(peer, []).append(message.n)
            server.send(peer, Pong(message.n))
        assert sorted(seen.values()) == [list(range(100))] * 3
        for client in clients:
            assert [await client.recv() for _ in range(100)] == [Pong(n) for n in range(100)]
            client.close()
        server.close()

    run(main())


def test_send_while_recv_waits(path: str, run: Callable[..., None]) -> None:
    """A send may use up the descriptor's edge; the waiting recv must not sleep through it."""

    async def main() -> None:
        server: Server[Message] = Server(path, Message)
        client: Client[Message] = Client(path, Message)
        assert await client.recv() == Back()
        client.send(Ping(0))
        peer, _ = await server.recv()

        async def receive(channel: Server[Message] | Client[Message]) -> None:
            for _ in range(2000):
                await channel.recv()

        async def flood(send: Callable[[Message], None]) -> None:
            for n in range(2000):
                send(Ping(n))
                if n % 7 == 0:
                    await asyncio.sleep(0)

        await asyncio.gather(
            receive(server), receive(client), flood(client.send), flood(lambda m: server.send(peer, m))
        )
        client.close()
        server.close()

    run(main())


def test_modes_and_folder(path: str) -> None:
    server: Server[Message] = Server(path, Message)
    assert os.stat(path).st_mode & 0o777 == 0o600
    server.close()
    os.chmod(Path(path).parent, 0o755)
    with pytest.raises(PermissionError, match="0700"):
        Server(path, Message)
    with pytest.raises(ValueError, match="107"):
        Server("/tmp/" + "x" * 120, Message)


def test_peer_that_is_not_there(path: str, run: Callable[..., None]) -> None:
    async def main() -> None:
        client: Client[Message] = Client(path, Message)
        with pytest.raises(PeerGone):
            client.send(Ping(1))
        server: Server[Message] = Server(path, Message)
        with pytest.raises(PeerGone):
            server.send(b"nobody", Pong(1))
        assert await client.recv() == Back()
        client.send(Ping(2))
        peer, message = await server.recv()
        assert message == Ping(2)
        client.close()
        deadline = time.monotonic() + 2
        with pytest.raises(PeerGone):
            while time.monotonic() < deadline:
                server.send(peer, Pong(1))
                await asyncio.sleep(0.01)
        server.close()

    run(main())


SERVER = """
import sys
from typing import Any
from ktransformers.engine.channel import Server
from ktransformers.engine.client import EngineClient
from ktransformers.engine.protocol import Hello, Loading, ToEngine
import msgspec
class Ping(msgspec.Struct, frozen=True, tag=True, array_like=True):
    n: int
class Pong(msgspec.Struct, frozen=True, tag=True, array_like=True):
    n: int
server = Server(sys.argv[1], Ping)
while True:
    peer, message = server.poll(None)
    server.send(peer, Pong(message.n))
"""


def start_server(path: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SERVER, path])


def test_killed_server_is_known_at_once_and_comes_back(path: str, run: Callable[..., None]) -> None:
    async def main() -> None:
        client: Client[Message] = Client(path, Message)
        for round_ in range(2):
            process = start_server(path)
            assert await client.recv() == Back()
            client.send(Ping(round_))
            assert await client.recv() == Pong(round_)
            os.kill(process.pid, signal.SIGSTOP)
            client.send(Ping(1000 + round_))  # for this process only: the next one must not get it
            os.kill(process.pid, signal.SIGKILL)
            assert await client.recv() == Lost()  # by the socket: nobody counts how long it keeps silent
            with pytest.raises(PeerGone):
                client.send(Ping(99))
            process.wait()
        client.close()

    run(main())


def test_answers_before_death_arrive_before_lost(path: str, run: Callable[..., None]) -> None:
    async def main() -> None:
        client: Client[Message] = Client(path, Message)
        server: Server[Message] = Server(path, Message)
        assert await client.recv() == Back()
        client.send(Ping(0))
        peer, _ = await server.recv()
        for n in range(500):
            server.send(peer, Pong(n))
        server.close()
        assert [await client.recv() for _ in range(500)] == [Pong(n) for n in range(500)]
        assert await client.recv() == Lost()
        client.close()

    run(main())


FLOOD = """
import sys
from ktransformers.engine.channel import Server
from ktransformers.engine.client import EngineClient
from ktransformers.engine.protocol import Hello, Loading, ToEngine
import msgspec
class Ping(msgspec.Struct, frozen=True, tag=True, array_like=True):
    n: int
class Pong(msgspec.Struct, frozen=True, tag=True, array_like=True):
    n: int
server = Server(sys.argv[1], Ping)
peer, _ = server.poll(None)
for n in range(10**9):
    try:
        server.send(peer, Pong(n))
    except ConnectionError:
        server.poll(0.001)
"""


def test_server_killed_in_mid_flood(path: str, run: Callable[..., None]) -> None:
    async def main() -> None:
        client: Client[Message] = Client(path, Message)
        for _ in range(3):
            process = subprocess.Popen([sys.executable, "-c", FLOOD, path])
            assert await client.recv() == Back()
            client.send(Ping(0))
            for n in range(2000):
                assert await client.recv() == Pong(n)
            process.kill()
            n = 1999
            while (message := await client.recv()) != Lost():
                n += 1
                assert message == Pong(n)
            process.wait()
        assert client.malformed == client.stale == 0
        client.close()

    run(main())


def garbage() -> list[list[bytes]]:
    """Frames after the identity, as a hostile process of the same user would send them."""
    good = msgspec.msgpack.encode(Ping(1))
    bodies = [
        b"",
        pickle.dumps({"a": print}),
        os.urandom(64),
        good[:-1],
        good + b"\x00",
        b"\x93\xa4Ping\x01\xdd\xff\xff\xff\xff",  # a list of 2**32 - 1 numbers
        b"\x94\xa4Ping\x01\x90\xdb\xff\xff\xff\xff",  # a string of 2**32 - 1 bytes
        b"\x95\xa4Ping\x01\x90\xa0" + b"\x91" * 100_000,  # deep nesting in a field that is too many
        b"\x91" * 100_000,
        msgspec.msgpack.encode(["Pang", 1]),
        msgspec.msgpack.encode(["Ping", "one"]),
        msgspec.msgpack.encode(["Ping", 1.5]),
        msgspec.msgpack.encode({"type": "Ping", "n": 1}),
        b"\x94\xa4Ping\x01\x90\xa2\xff\xfe",  # not UTF-8
    ]
    frames = [[EPOCH, body] for body in bodies]
    return [*frames, [good], [EPOCH], [EPOCH, good, good], [b"short", good], [b"", b""]]


def test_garbage_is_counted_and_dropped(path: str) -> None:
    server: Server[Message] = Server(path, Message)
    hostile = zmq.Context.instance().socket(zmq.DEALER)
    hostile.connect(f"ipc://{path}")
    frames = garbage()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(10):
        for one in frames:
            hostile.send_multipart(one)
    hostile.send_multipart([EPOCH, msgspec.msgpack.encode(Ping(7))])
    received = server.poll(10)
    assert received is not None
    assert received[1] == Ping(7)
    assert server.malformed == 10 * len(frames)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30 * 1024
    assert server.poll(0) is None
    hostile.close(linger=0)
    server.close()


def test_too_large_a_frame_ends_that_connection_only(path: str) -> None:
    server: Server[Message] = Server(path, Message)
    hostile = zmq.Context.instance().socket(zmq.DEALER)
    hostile.connect(f"ipc://{path}")
    hostile.send_multipart([EPOCH, bytes(65 * 1024 * 1024)])
    good = zmq.Context.instance().socket(zmq.DEALER)
    good.connect(f"ipc://{path}")
    time.sleep(0.2)
    good.send_multipart([EPOCH, msgspec.msgpack.encode(Ping(7))])
    received = server.poll(10)
    assert received is not None
    assert received[1] == Ping(7)
    with pytest.raises(ValueError, match="can be sent"):
        server.send(received[0], Ping(1, text="x" * (65 * 1024 * 1024)))
    hostile.close(linger=0)
    good.close(linger=0)
    server.close()


def test_stale_epoch_is_dropped(path: str, run: Callable[..., None]) -> None:
    async def main() -> None:
        router = zmq.Context.instance().socket(zmq.ROUTER)
        router.bind(f"ipc://{path}")
        client: Client[Message] = Client(path, Message)
        assert await client.recv() == Back()
        client.send(Ping(0))
        while not router.poll(0):
            await asyncio.sleep(0.01)
        peer = router.recv_multipart()[0]
        for epoch, n in [(b"a" * 16, 1), (b"b" * 16, 2), (b"a" * 16, 3)]:
            router.send_multipart([peer, epoch, msgspec.msgpack.encode(Pong(n))])
        assert [await client.recv(), await client.recv()] == [Pong(1), Pong(3)]
        assert client.stale == 1
        client.close()
        router.close(linger=0)

    run(main())


def test_full_queue_raises_and_nothing_blocks(path: str, run: Callable[..., None]) -> None:
    async def main() -> None:
        server: Server[Message] = Server(path, Message)
        client: Client[Message] = Client(path, Message)
        assert await client.recv() == Back()
        client.send(Ping(-1))
        peer, _ = await server.recv()
        sent = {"down": 0, "up": 0}
        with pytest.raises(Full):
            while True:
                client.send(Ping(sent["down"], text="x" * 500))
                sent["down"] += 1
                await asyncio.sleep(0)
        with pytest.raises(Full):
            while True:
                server.send(peer, Pong(sent["up"]))
                sent["up"] += 1
                await asyncio.sleep(0)
        # Nothing that was accepted is lost.
        assert [(await server.recv())[1].n for _ in range(sent["down"])] == list(range(sent["down"]))
        for n in range(sent["up"]):
            assert await client.recv() == Pong(n)
        client.close()
        server.close()

    run(main())


def test_close_ends_a_waiting_recv(path: str, run: Callable[..., None]) -> None:
    async def main() -> None:
        client: Client[Message] = Client(path, Message)
        waiting = asyncio.create_task(client.recv())
        await asyncio.sleep(0.05)
        client.close()
        client.close()
        with pytest.raises(PeerGone):
            await waiting

    run(main())


def test_round_trip_is_short_and_idle_is_free(path: str) -> None:
    async def main() -> None:
        process = start_server(path)
        client: Client[Message] = Client(path, Message)
        assert await client.recv() == Back()
        seconds = []
        for n in range(1000):
            start = time.perf_counter()
            client.send(Ping(n))
            assert await client.recv() == Pong(n)
            seconds.append(time.perf_counter() - start)
        cpu = time.process_time()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.recv(), 0.5)
        idle = time.process_time() - cpu
        process.kill()
        process.wait()
        client.close()
        print(f"round trip: median {statistics.median(seconds) * 1e6:.0f} us")
        assert min(seconds) < 1e-3
        assert idle < 0.05

    uvloop.run(asyncio.wait_for(main(), 120))


def test_engine_client_says_hello_on_each_connection(path: str, run: Callable[..., None]) -> None:
    async def main() -> None:
        client = EngineClient(path)
        peers = set()
        for _ in range(2):
            server: Server[ToEngine] = Server(path, ToEngine)
            assert await client.recv() == Back()
            hellos = [await server.recv() for _ in range(2)]
            assert [message for _, message in hellos] == [Hello(), Hello()]
            peers.update(peer for peer, _ in hellos)
            server.send(hellos[0][0], Loading(1, 2))
            assert await client.recv() == Loading(1, 2)
            server.close()
            assert await client.recv() == Lost()
        assert len(peers) == 2
        client.close()

    run(main())
