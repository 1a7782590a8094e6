"""Moves of blocks, as the scheduler asks for them: what is wrong is refused, and all are answered once."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import msgspec
import psutil
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from ktransformers.engine import moves as moves_module
from ktransformers.engine.channel import Client
from ktransformers.engine.client import EngineClient
from ktransformers.engine.moves import BlockMoves
from ktransformers.engine.protocol import (
    BlockName,
    FromEngine,
    Go,
    Hello,
    Move,
    Moved,
    Moves,
    MovesDone,
    NewSeq,
    Ready,
    Sampling,
    Shutdown,
    Step,
    StepDone,
    Stored,
    Tier,
)
from ktransformers.engine.runner import Limits, Runner
from ktransformers.kvcache.stores.disk import DiskStore
from ktransformers.kvcache.stores.memory import HostBlocks

BLOCKS, HOST_BLOCKS, BLOCK_TOKENS = 16, 8, 16
GREEDY = Sampling(temperature=0.0, max_tokens=100)
T = TypeVar("T")


def name(i: int) -> BlockName:
    return BlockName(bytes([i]) * 32, bytes(32), bytes(16), bytes([i]) * 4 * BLOCK_TOKENS)


def move(
    number: int, source: Tier, source_block: int, target: Tier, target_block: int, key: int | None = None
) -> Move:
    named = None if key is None else name(key)
    return Move(
        id=number,
        source=source,
        source_block=source_block,
        target=target,
        target_block=target_block,
        name=named,
    )


class Rig:
    """BlockMoves over a fake executor and real stores."""

    def __init__(self, fake: ModuleType, folder: Path) -> None:
        self.executor = fake.FakeExecutor(BLOCKS, BLOCK_TOKENS)
        size = self.executor.block_bytes
        self.host = HostBlocks(HOST_BLOCKS, size)
        self.disk = DiskStore.open(folder, fake.FINGERPRINT, size, 1 << 24)
        self.woken = threading.Semaphore(0)
        self.moves = BlockMoves(self.executor, self.host, self.disk, self.woken.release)

    def do(self, *moves: Move) -> dict[int, Moved]:
        """Start them; the answers to all."""
        self.moves.start(Moves(list(moves), []))
        return self.wait(len(moves))

    def wait(self, count: int) -> dict[int, Moved]:
        """So many answers, or more that came with them; each comes once."""
        found: dict[int, Moved] = {}
        while True:
            news = self.moves.news()
            for moved in news.moves if news is not None else []:
                assert moved.id not in found
                found[moved.id] = moved
            if len(found) >= count:
                return found
            assert self.woken.acquire(timeout=120)

    @contextmanager
    def held(self) -> Iterator[None]:
        """No copy touches memory, so that all moves stay open."""
        gates = [worker.gate for worker in self.moves._mover._workers]
        for gate in gates:
            gate.acquire()
        try:
            yield
        finally:
            for gate in gates:
                gate.release()

    def close(self) -> None:
        self.moves.close(20)
        self.disk.close()


@pytest.fixture
def rig(fake: ModuleType, tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(fake, tmp_path / "kv")
    yield rig
    rig.close()


WRONG = [
    move(1, "device", 0, "device", 1),
    move(1, "host", 0, "host", 1),
    move(1, "disk", -1, "disk", -1, 1),
    move(1, "device", -1, "host", 0),
    move(1, "device", BLOCKS, "host", 0),
    move(1, "device", 2**63 - 1, "host", 0),
    move(1, "device", 0, "host", HOST_BLOCKS),
    move(1, "device", 0, "host", -(2**63)),
    move(1, "device", 0, "host", 0, 1),
    move(1, "device", 0, "disk", -1),
    move(1, "device", 0, "disk", 0, 1),
    move(1, "disk", 3, "device", 0, 1),
    Move(id=1, source="disk", target="device", target_block=0, name=BlockName(b"", b"", b"", b"")),
    Move(id=1, source="device", source_block=0, target="disk", name=BlockName(b"k" * 32, b"", b"", b"")),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_moves_are_refused(rig: Rig, wrong: Move) -> None:
    before = rig.executor.kv.copy()
    assert rig.do(wrong) == {1: Moved(1, False, 0, 0.0)}
    assert (rig.executor.kv == before).all() and not rig.moves.arriving
    assert rig.do(move(1, "device", 0, "host", 0))[1].ok


def test_there_may_be_no_other_tier(fake: ModuleType) -> None:
    moves = BlockMoves(fake.FakeExecutor(4, 16), None, None, lambda: None)
    moves.start(Moves([move(1, "device", 0, "host", 0), move(2, "device", 0, "disk", -1, 1)], [b"x" * 32]))
    assert moves.news() == MovesDone([Moved(1, False, 0, 0.0), Moved(2, False, 0, 0.0)], [])
    assert moves.news() is None
    moves.close(20)


def test_moves_that_would_meet_are_refused(rig: Rig) -> None:
    rig.disk.put(name(1), bytes(rig.executor.block_bytes))
    good = [
        move(1, "device", 0, "host", 0),
        move(2, "device", 0, "host", 1),  # a source may be read twice
        move(3, "disk", -1, "device", 1, 1),
        move(4, "host", 2, "disk", -1, 2),
    ]
    bad = [
        move(11, "device", 5, "host", 0),  # is written already
        move(12, "host", 3, "device", 0),  # is being read
        move(13, "device", 1, "host", 3),  # is being written
        move(14, "disk", -1, "host", 4, 2),
        move(15, "device", 5, "disk", -1, 1),
    ]
    with rig.held():
        rig.moves.start(Moves([*good, *bad], []))
        news = rig.moves.news()
    assert news == MovesDone([Moved(m.id, False, 0, 0.0) for m in bad], [])
    assert all(moved.ok for moved in rig.wait(len(good)).values())
    assert all(moved.ok for moved in rig.do(*bad[:2]).values())  # nothing of it is left


def test_a_number_twice_has_one_answer(rig: Rig) -> None:
    with rig.held():
        rig.moves.start(Moves([move(1, "device", 0, "host", 0), move(1, "device", 1, "host", 1)], []))
    assert rig.wait(1)[1].ok and rig.moves.news() is None
    assert (rig.host.view(0) == rig.executor.kv[0].view("u1")).all()
    assert (rig.host.view(1) == 0).all()


def test_a_sequence_gets_no_block_that_is_still_arriving(rig: Rig) -> None:
    runner = Runner(rig.executor, Limits(BLOCKS, BLOCK_TOKENS, 256, 4, 64, 1000), rig.moves.arriving)

    def finish(n: int) -> str:
        done = runner.step(Step(n, [0] * n, [NewSeq(0, [1, 2, 3], 3, 0, GREEDY)], [Go(0, 3, [3])]))
        assert isinstance(done, StepDone)
        return done.tokens[0].finish

    with rig.held():
        rig.moves.start(Moves([move(1, "host", 0, "device", 3)], []))
        assert finish(0) == "error"
    rig.wait(1)
    assert finish(1) == ""


def test_what_does_not_end_is_given_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answered once, as a miss; what it was to write is another's at once, and it leaves that alone."""
    monkeypatch.setattr(moves_module, "PATIENCE_SECONDS", 3600.0)
    before = rig.executor.kv.copy()
    with rig.held():
        asked = [move(i, "host", i, "device", i) for i in range(4)]
        rig.moves.start(Moves(asked, []))
        rig.moves.give_up_overdue()
        assert not rig.moves.has_news and rig.moves.arriving == {0, 1, 2, 3}
        monkeypatch.setattr(moves_module, "PATIENCE_SECONDS", -1.0)
        given_up = threading.Thread(target=rig.moves.give_up_overdue)
        given_up.start()
        given_up.join(0.2)
    given_up.join(20)
    assert {i: m.ok for i, m in rig.wait(4).items()} == dict.fromkeys(range(4), False)
    assert rig.moves.is_idle and not rig.moves.arriving
    assert rig.do(move(4, "device", 9, "host", 7))[4].ok
    assert (rig.executor.kv == before).all() and rig.moves.news() is None


def test_losses_and_names_to_forget(rig: Rig) -> None:
    assert rig.do(move(1, "device", 0, "disk", -1, 1))[1].bytes > rig.executor.block_bytes
    rig.moves.start(Moves([], [name(1).key, b"short", name(2).key]))
    assert not rig.do(move(2, "disk", -1, "device", 1, 1))[2].ok
    assert rig.disk.entries() == []


_TIERS = st.sampled_from(["device", "host", "disk"])
_NUMBERS = st.integers(-2, 18) | st.integers(-(2**63), 2**63 - 1)
_NAMES = st.none() | st.integers(0, 3).map(name) | st.builds(BlockName, *[st.binary(max_size=70)] * 4)
_MOVES = st.builds(
    Move,
    id=st.integers(0, 12),
    source=_TIERS,
    source_block=st.just(-1) | _NUMBERS,
    target=_TIERS,
    target_block=st.just(-1) | _NUMBERS,
    name=_NAMES,
)


@settings(max_examples=150, deadline=None)
@given(messages=st.lists(st.lists(_MOVES, max_size=12), max_size=4))
def test_any_move_has_one_answer(shared: Rig, messages: list[list[Move]]) -> None:
    """Whatever is asked, nothing is raised, and blocks stay whole."""
    for i, row in enumerate(shared.executor.kv):
        row[:] = i
    for moves in messages:
        numbered = [msgspec.structs.replace(m, id=i) for i, m in enumerate(moves)]
        shared.moves.start(Moves(numbered, [m.name.key for m in moves if m.name is not None and m.id == 7]))
        assert set(shared.wait(len(numbered))) == set(range(len(numbered)))
    assert not shared.moves.arriving and shared.moves.news() is None
    for row in shared.executor.kv:
        assert len(set(row.tolist())) == 1


@pytest.fixture(scope="module")
def shared(fake: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    rig = Rig(fake, tmp_path_factory.mktemp("shared") / "kv")
    yield rig
    rig.close()


# ---- over the socket


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
