"""The mover: what is copied is what was there, in the right order, and nothing after the fence."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from ktransformers.kvcache.mover import QUEUE, Done, Mover, Tier
from ktransformers.kvcache.stores.memory import U8, HostBlocks

BLOCK_BYTES = 4096


@dataclass(frozen=True)
class Name:
    key: bytes
    parent: bytes = bytes(32)
    owner: bytes = bytes(16)
    content: bytes = bytes(64)


@dataclass(frozen=True)
class Move:
    id: int
    source: Tier
    target: Tier
    source_block: int = -1
    target_block: int = -1
    name: Name | None = None


class Device:
    """A pool that can be made to wait in the middle of a copy."""

    block_bytes = BLOCK_BYTES

    def __init__(self, blocks: int) -> None:
        self.kv = np.random.default_rng(1).integers(0, 256, (blocks, BLOCK_BYTES)).astype(np.uint8)
        self.touched: list[int] = []

    def read_block(self, block: int, into: U8) -> None:
        self.touched.append(block)
        into[:] = self.kv[block]

    def write_block(self, block: int, data: U8) -> None:
        self.touched.append(block)
        self.kv[block] = data


@dataclass
class Disk:
    """Blocks in a dict; `gate` holds every operation up."""

    blocks: dict[bytes, bytes] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    broken: bool = False
    flushes: int = 0

    def __post_init__(self) -> None:
        self.gate.set()

    def _enter(self, what: str) -> None:
        self.entered.release()
        assert self.gate.wait(120)
        self.log.append(what)
        if self.broken:
            raise RuntimeError("broken")

    def put(self, name: Name, buffer: memoryview) -> int:
        self._enter("put")
        self.blocks[name.key] = bytes(buffer)
        return len(buffer) + 100

    def get_into(self, name: Name, buffer: memoryview) -> bool:
        self._enter("get")
        if name.key not in self.blocks:
            return False
        buffer[:] = self.blocks[name.key]
        return True

    def flush(self) -> None:
        self.flushes += 1


class Rig:
    """A mover with its tiers; `wait` collects what has ended, as woken."""

    def __init__(self) -> None:
        self.device, self.host, self.disk = Device(8), HostBlocks(8, BLOCK_BYTES), Disk()
        self.woken = threading.Semaphore(0)
        disk: Any = self.disk
        self.mover = Mover(self.device, self.host, disk, self.woken.release)

    def wait(self, count: int) -> dict[int, Done]:
        found: dict[int, Done] = {}
        while len(found) < count:
            assert self.woken.acquire(timeout=120)
            for done in self.mover.take():
                assert done.id not in found
                found[done.id] = done
        return found


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.disk.gate.set()
    rig.mover.close(20)


def name(i: int) -> Name:
    return Name(bytes([i]) * 32)


def test_bytes_go_round_all_tiers(rig: Rig) -> None:
    want = rig.device.kv[3].copy()
    way = [
        Move(1, "device", "host", 3, 5),
        Move(2, "host", "disk", 5, name=name(1)),
        Move(3, "disk", "host", target_block=6, name=name(1)),
        Move(4, "host", "device", 6, 0),
        Move(5, "device", "disk", 0, name=name(2)),
        Move(6, "disk", "device", target_block=7, name=name(2)),
    ]
    for move in way:
        assert rig.mover.start(move)
        (done,) = rig.wait(1).values()
        assert (done.id, done.ok) == (move.id, True) and done.seconds > 0
        assert done.bytes == BLOCK_BYTES + (100 if move.target == "disk" else 0)
    assert (rig.device.kv[7] == want).all() and (rig.host.view(6) == want).all()
    assert len(rig.disk.blocks) == 2


def test_a_miss_leaves_the_target_alone(rig: Rig) -> None:
    before = rig.device.kv.copy()
    rig.mover.start(Move(1, "disk", "device", target_block=2, name=name(9)))
    assert not rig.wait(1)[1].ok
    assert (rig.device.kv == before).all() and not rig.device.touched


@pytest.mark.parametrize(
    "move",
    [
        Move(1, "disk", "device", target_block=2, name=name(1)),
        Move(1, "device", "host", 0, 99),
        Move(1, "device", "disk", 0),
    ],
)
def test_what_raises_is_a_miss(rig: Rig, move: Move) -> None:
    rig.disk.broken = True
    rig.mover.start(move)
    assert rig.wait(1)[1] == Done(1, False, 0, pytest.approx(0, abs=20))
    rig.disk.broken = False
    rig.mover.start(Move(2, "device", "host", 0, 0))
    assert rig.wait(1)[2].ok  # the thread is still there


def test_a_full_queue_refuses(rig: Rig) -> None:
    rig.disk.gate.clear()
    started = [rig.mover.start(Move(i, "device", "disk", 0, name=name(1))) for i in range(QUEUE + 2)]
    assert started.count(False) in (1, 2)  # one may be under way
    rig.disk.gate.set()
    assert all(done.ok for done in rig.wait(started.count(True)).values())


def test_loads_and_copies_pass_writes_to_a_slow_disk(rig: Rig) -> None:
    rig.disk.blocks[name(7).key] = bytes(BLOCK_BYTES)
    rig.disk.gate.clear()
    for i in range(5):
        rig.mover.start(Move(i, "device", "disk", 0, name=name(i)))
    rig.disk.entered.acquire(timeout=120)  # one is being written, the others wait
    rig.mover.start(Move(10, "device", "host", 1, 1))
    assert rig.wait(1)[10].ok
    rig.mover.start(Move(11, "disk", "device", target_block=1, name=name(7)))
    assert rig.disk.entered.acquire(timeout=120)
    rig.disk.gate.set()
    assert len(rig.wait(6)) == 6


def test_to_the_device_comes_first(rig: Rig) -> None:
    """Both threads busy, then one of each kind in the wrong order."""
    for key in (1, 2, 3):
        rig.disk.blocks[name(key).key] = bytes(BLOCK_BYTES)
    rig.disk.gate.clear()
    rig.mover.start(Move(1, "disk", "host", target_block=0, name=name(1)))
    rig.mover.start(Move(2, "disk", "host", target_block=1, name=name(2)))
    assert rig.disk.entered.acquire(timeout=120) and rig.disk.entered.acquire(timeout=120)
    rig.mover.start(Move(3, "device", "disk", 5, name=name(4)))
    rig.mover.start(Move(4, "device", "host", 6, 3))
    rig.mover.start(Move(5, "host", "device", 2, 7))
    with rig.mover._lock:  # both threads then choose with all three there
        rig.disk.gate.set()
    assert len(rig.wait(5)) == 5
    assert rig.device.touched[0] == 7


def test_nothing_is_touched_after_the_fence(rig: Rig) -> None:
    """The disk is slow to answer; another scheduler comes meanwhile, and uses the blocks."""
    rig.disk.blocks[name(1).key] = bytes(BLOCK_BYTES)
    rig.disk.gate.clear()
    rig.mover.start(Move(1, "disk", "device", target_block=2, name=name(1)))
    rig.mover.start(Move(2, "disk", "host", target_block=2, name=name(1)))
    rig.disk.entered.acquire(timeout=120)
    for i in range(3, 8):
        rig.mover.start(Move(i, "disk", "device", target_block=i, name=name(1)))
    rig.mover.abandon()
    before, host = rig.device.kv.copy(), rig.host.view(2).copy()
    rig.disk.gate.set()
    rig.mover.start(Move(1, "device", "host", 0, 0))
    assert list(rig.wait(1)) == [1]  # the new scheduler's, not the old one's of that number
    rig.mover.close(20)
    assert rig.device.touched == [0]
    assert (rig.device.kv == before).all() and (rig.host.view(2) == host).all()
    assert rig.mover.take() == []


def test_a_fence_waits_for_the_copy_it_meets() -> None:
    class Slow(Device):
        def __init__(self) -> None:
            super().__init__(2)
            self.writing, self.go_on = threading.Event(), threading.Event()

        def write_block(self, block: int, data: U8) -> None:
            self.writing.set()
            assert self.go_on.wait(120)
            super().write_block(block, data)

    device, host = Slow(), HostBlocks(1, BLOCK_BYTES)
    mover = Mover(device, host, None, lambda: None)
    mover.start(Move(1, "host", "device", 0, 1))
    assert device.writing.wait(120)
    fence = threading.Thread(target=mover.abandon)
    fence.start()
    fence.join(0.1)
    assert fence.is_alive()  # the block is being written: it is not the new scheduler's yet
    device.go_on.set()
    fence.join(120)
    assert not fence.is_alive() and (device.kv[1] == 0).all()
    mover.close(20)


def test_a_disk_that_hangs_holds_up_nothing() -> None:
    rig = Rig()
    rig.disk.gate.clear()
    rig.mover.start(Move(1, "disk", "device", target_block=2, name=name(1)))
    rig.disk.entered.acquire(timeout=120)
    rig.mover.abandon()
    rig.mover.close(0.05)
    rig.mover.close(0.05)
    assert not rig.mover.start(Move(2, "device", "host", 0, 0))
    rig.disk.gate.set()


def test_copies_are_given_up(rig: Rig) -> None:
    """That waits, that is in hand, and that has ended; a number of before the fence is no number of after."""
    rig.disk.blocks[name(1).key] = bytes([7]) * BLOCK_BYTES
    before = rig.device.kv.copy()
    rig.disk.gate.clear()
    for i in (1, 2, 3):
        rig.mover.start(Move(i, "disk", "device", target_block=i, name=name(1)))
    assert all(rig.disk.entered.acquire(timeout=120) for _ in range(2))  # both threads are in the disk
    assert rig.mover.give_up([3, 1, 4]) == {1, 3}
    rig.disk.gate.set()
    assert rig.wait(1).keys() == {2}
    assert (rig.device.kv[[1, 3]] == before[[1, 3]]).all() and (rig.device.kv[2] == 7).all()
    assert not rig.mover.give_up([2])
    rig.disk.gate.clear()
    rig.mover.start(Move(1, "disk", "device", target_block=1, name=name(1)))
    rig.disk.entered.acquire(timeout=120)
    rig.mover.abandon()
    assert not rig.mover.give_up([1])
    rig.mover.start(Move(1, "host", "device", 0, 4))
    assert rig.wait(1)[1].ok and not rig.mover.give_up([1])
    rig.disk.gate.set()


def test_flushes_a_while_after_the_last_use(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktransformers.kvcache.mover._FLUSH_SECONDS", 0.02)
    rig.mover.start(Move(1, "device", "host", 0, 0))
    rig.wait(1)
    time.sleep(0.05)
    assert rig.disk.flushes == 0
    rig.mover.start(Move(2, "device", "disk", 0, name=name(1)))
    rig.wait(1)
    deadline = time.monotonic() + 20
    while not rig.disk.flushes and time.monotonic() < deadline:
        time.sleep(0.01)
    assert rig.disk.flushes == 1
    time.sleep(0.1)
    assert rig.disk.flushes == 1  # and then it sleeps


def test_many_at_once(rig: Rig) -> None:
    """Random copies between device and host, one user of a block at a time, against a model."""
    rng = np.random.default_rng(3)
    device, host = rig.device.kv.copy(), np.zeros((8, BLOCK_BYTES), np.uint8)
    sent = 0
    for _ in range(200):
        pairs = list(zip(rng.permutation(8).tolist(), rng.permutation(8).tolist(), strict=True))
        for at, to in pairs:
            sent += 1
            if rng.integers(2):
                device[at] = host[to]
                rig.mover.start(Move(sent, "host", "device", to, at))
            else:
                host[to] = device[at]
                rig.mover.start(Move(sent, "device", "host", at, to))
        assert len(rig.wait(8)) == 8
    assert (rig.device.kv == device).all()
    assert all((rig.host.view(i) == host[i]).all() for i in range(8))


def test_host_blocks_end_where_they_end() -> None:
    host = HostBlocks(2, 16)
    for block in (-1, 2, 1 << 40):
        with pytest.raises(ValueError, match="block"):
            host.view(block)
