"""Moves of blocks over the socket of an engine process, which may end, or its disk fail, in the middle."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import msgspec
import psutil
import pytest
import uvloop
from block_moves import HOST_BLOCKS, move, name

from ktransformers.engine.channel import Client
from ktransformers.engine.client import EngineClient
from ktransformers.engine.protocol import (
    FromEngine,
    Go,
    Hello,
    Move,
    Moves,
    MovesDone,
    NewSeq,
    Ready,
    Sampling,
    Shutdown,
    Step,
    StepDone,
    Stored,
)
from ktransformers.kvcache.stores.disk import DiskStore

GREEDY = Sampling(temperature=0.0, max_tokens=100)
T = TypeVar("T")




@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kt") as name:
        yield Path(name)


@asynccontextmanager
async def engine(
    folder: Path, environment: dict[str, str] | None = None, **cache: Any
) -> AsyncIterator[tuple[subprocess.Popen[bytes], EngineClient]]:
    """A fake engine that is ready, with a host and a disk tier."""
    script = Path(__file__).parent / "fake_engine.py"
    socket, file = str(folder / "engine"), folder / "engine.json"
    cache = {"host_bytes": HOST_BLOCKS * 128, "disk_bytes": 1 << 24, "cache_dir": str(folder / "kv"), **cache}
    file.write_text(json.dumps({"model": "fake", "socket": socket, "cache": cache}))
    command = [sys.executable, str(script), str(file)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ | (environment or {}))
    client = EngineClient(socket)
    try:
        yield process, client
    finally:
        client.close()
        process.kill()
        process.communicate()


async def until(client: Client[FromEngine], kind: type[T]) -> T:
    while not isinstance(message := await client.recv(), kind):
        pass
    return message


async def moved(client: Client[FromEngine], *moves: Move) -> dict[int, bool]:
    """Ask for them without any step; whether each was done."""
    client.send(Moves(list(moves), []))
    found: dict[int, bool] = {}
    while len(found) < len(moves):
        found |= {m.id: m.ok for m in (await until(client, MovesDone)).moves}
    return found


async def draw(client: Client[FromEngine], n: int, computed: int, blocks: list[int]) -> int:
    """The token after PROMPT, of which the first blocks hold `computed` tokens."""
    new = NewSeq(0, PROMPT, len(PROMPT), computed, GREEDY)
    client.send(Step(n, [0], [new], [Go(0, len(PROMPT) - computed, blocks)]))
    return (await until(client, StepDone)).tokens[0].token


def run(main: Coroutine[Any, Any, None]) -> None:
    uvloop.run(asyncio.wait_for(main, 200))


PROMPT = list(range(100, 140))


def test_blocks_outlive_the_engine(folder: Path, fake: ModuleType) -> None:
    """From the device to disk, and back in the next engine, which is told what there is."""

    async def main() -> None:
        (want,) = fake.generate(PROMPT, 1)
        async with engine(folder) as (process, client):
            ready = await until(client, Ready)
            assert (ready.host_blocks, ready.disk_bytes) == (HOST_BLOCKS, 1 << 24)
            assert await until(client, Stored) == Stored([], complete=True)
            assert await draw(client, 0, 0, [0, 1, 2]) == want
            stores = [move(i, "device", i, "disk", -1, i + 1) for i in range(2)]
            assert await moved(client, *stores) == {0: True, 1: True}
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        async with engine(folder) as (_, client):
            stored = await until(client, Stored)
            assert [block.key for block in stored.blocks] == [name(1).key, name(2).key]
            loads = [move(i, "disk", -1, "device", 9 - i, i + 1) for i in range(2)]
            assert await moved(client, *loads) == {0: True, 1: True}
            assert await draw(client, 0, 32, [9, 8, 7]) == want
            assert await moved(client, move(5, "disk", -1, "host", 3, 3)) == {5: False}

    run(main())


def test_another_scheduler_comes_in_the_middle(folder: Path, fake: ModuleType) -> None:
    """What the first had asked for is not reported to the second, whose numbers are its own."""

    async def main() -> None:
        (want,) = fake.generate(PROMPT, 1)
        async with engine(folder) as (_, first):
            await until(first, Stored)
            for _ in range(50):
                first.send(Moves([move(i, "host", i, "device", i) for i in range(HOST_BLOCKS)], []))
            second = EngineClient(str(folder / "engine"))
            await until(second, Stored)
            assert await draw(second, 0, 0, [0, 1, 2]) == want
            assert await moved(second, move(3, "device", 0, "host", 5)) == {3: True}
            assert await draw(second, 1, 16, [0, 6, 7]) == want
            second.close()

    run(main())


def test_idle_with_a_disk(folder: Path) -> None:
    """Copies end without a step, and then nobody works: not the socket's thread, nor the mover's."""

    async def main() -> None:
        async with engine(folder) as (process, client):
            await until(client, Stored)
            stores = [move(i, "device", i, "disk", -1, i) for i in range(9)]
            assert all((await moved(client, *stores)).values())
            await asyncio.sleep(1.5)  # the index is flushed
            threads = psutil.Process(process.pid)
            before = sum(threads.cpu_times()[:2])
            await asyncio.sleep(2)
            assert sum(threads.cpu_times()[:2]) - before < 0.1

    run(main())


def test_copies_that_end_together_are_told_together(folder: Path) -> None:
    async def main() -> None:
        async with engine(folder) as (_, client):
            await until(client, Stored)
            begin, told, found = time.monotonic(), 0, 0
            client.send(Moves([move(i, "device", i, "disk", -1, i) for i in range(200)], []))
            while found < 200:
                found += len((await until(client, MovesDone)).moves)
                told += 1
            assert told <= (time.monotonic() - begin) / 0.002 + 2

    run(main())


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk that is slow, hangs or fails, for LD_PRELOAD."""
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("shim") / "slow_disk.so"
    source = Path(__file__).parent.parent / "bench" / "slow_disk.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", source, "-o", library, "-ldl"], check=True)
    return library


def preloaded(shim: Path, folder: Path) -> dict[str, str]:
    paths = {f"SLOW_DISK_{what.upper()}": str(folder / what) for what in ("hang", "fail")}
    return {"LD_PRELOAD": str(shim), "SLOW_DISK_FOLDER": str(folder / "kv"), **paths}


def test_steps_go_on_while_the_disk_hangs(folder: Path, fake: ModuleType, shim: Path) -> None:
    """K11, counted: a load that hangs holds up no step, no copy between device and host, and arrives."""

    async def main() -> None:
        (want,) = fake.generate(PROMPT, 1)
        async with engine(folder, preloaded(shim, folder)) as (_, client):
            await until(client, Stored)
            assert await draw(client, 0, 0, [0, 1, 2]) == want
            assert await moved(client, move(0, "device", 0, "disk", -1, 1)) == {0: True}
            (folder / "hang").touch()
            client.send(Moves([move(1, "disk", -1, "device", 9, 1), move(2, "device", 1, "disk", -1, 2)], []))
            for n in range(1, 101):
                new = NewSeq(0, PROMPT, len(PROMPT), 0, GREEDY)
                client.send(Step(n, [0], [new], [Go(0, len(PROMPT), [3, 4, 5])]))
                answer = await client.recv()
                assert isinstance(answer, StepDone) and answer.n == n and answer.tokens[0].token == want
            (folder / "hang").unlink()
            answer = await until(client, MovesDone)
            found = {m.id: m.ok for m in answer.moves}
            while len(found) < 2:
                found |= {m.id: m.ok for m in (await until(client, MovesDone)).moves}
            assert found == {1: True, 2: True}
            assert await draw(client, 101, 16, [9, 7, 8]) == want

    run(main())


def test_a_disk_that_fails_costs_misses_only(folder: Path, fake: ModuleType, shim: Path) -> None:
    """K7: EIO of every read, write and sync, of the C library's, not of Python's."""

    async def main() -> None:
        (want,) = fake.generate(PROMPT, 1)
        async with engine(folder, preloaded(shim, folder)) as (process, client):
            await until(client, Stored)
            assert await draw(client, 0, 0, [0, 1, 2]) == want
            stores = [move(i, "device", i, "disk", -1, i + 1) for i in range(2)]
            assert await moved(client, *stores) == {0: True, 1: True}
            (folder / "fail").touch()
            for i in range(2, 12):
                asked = [move(i, "disk", -1, "device", 9, 1), move(100 + i, "device", 1, "disk", -1, i + 9)]
                assert await moved(client, *asked) == {i: False, 100 + i: False}
                assert await draw(client, i, 0, [3, 4, 5]) == want
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0

    run(main())


@pytest.mark.parametrize("how", ["shutdown", "sigterm"])
def test_ends_with_copies_under_way(folder: Path, fake: ModuleType, how: str) -> None:
    async def main() -> None:
        async with engine(folder) as (process, client):
            await until(client, Stored)
            stores = [move(i, "device", i % 16, "disk", -1, i) for i in range(200)]
            client.send(Moves(stores, []))
            if how == "shutdown":
                client.send(Shutdown())
            else:
                await until(client, MovesDone)
                process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        store = DiskStore.open(folder / "kv", fake.FINGERPRINT, 128, 1 << 24)
        buffer = bytearray(128)
        for entry in store.entries():
            assert store.get_into(name(entry.key[0]), memoryview(buffer)) and set(buffer) == {255}
        store.close()

    run(main())


def test_a_folder_that_cannot_be_used_is_no_tier(folder: Path) -> None:
    async def main() -> None:
        (folder / "kv").write_text("a file")
        async with engine(folder) as (_, client):
            assert (await until(client, Ready)).disk_bytes == 0
            assert await moved(client, move(1, "device", 0, "disk", -1, 1)) == {1: False}

    run(main())


def test_mangled_messages(folder: Path) -> None:
    """Frames with any byte changed: what can still be read is refused or done, and the engine goes on."""

    async def main() -> None:
        good = msgspec.msgpack.encode(
            Moves([move(1, "device", 0, "disk", -1, 1), move(2, "host", 3, "device", 2)], [bytes(32)])
        )
        async with engine(folder) as (process, _):
            client: Client[FromEngine] = Client(str(folder / "engine"), FromEngine)
            await asyncio.sleep(0)
            while True:
                message = await client.recv()
                if isinstance(message, Stored):
                    break
                if not isinstance(message, Ready):
                    client.send(Hello())
            for i in range(len(good)):
                for value in (0, 1, 0x7F, 0x80, 0xC0, 0xFF):
                    body = good[:i] + bytes([value]) + good[i + 1 :]
                    client._socket.send_multipart([bytes(16), body])
            client.send(Moves([move(77, "device", 15, "host", 7)], []))
            while 77 not in {m.id for m in (await until(client, MovesDone)).moves}:
                pass
            assert process.poll() is None
            client.close()

    run(main())
