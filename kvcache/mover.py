"""Copies blocks between tiers, in two threads of its own, beside the steps.

Who starts copies never waits for one: a full queue refuses, a slow or broken disk only makes copies late or
fail. What goes to the device, where somebody is waiting for it, is copied before what goes to the host, and
that before what goes to the disk. One of the threads never writes to the disk: that holds up no read.

`abandon` is a fence. The disk is read into, and written from, memory of the mover's own, and a block of the
other tiers is touched only inside a thread's gate, after a look at the epoch there. So once abandon has
passed through every gate no copy that was started before it touches a block, however long its disk may still
take.
"""

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import numpy as np

from ktransformers.kvcache.stores.memory import U8, Blocks, HostBlocks
from ktransformers.kvcache.stores.store import BlockStore, Name

log = logging.getLogger(__name__)

Tier = Literal["device", "host", "disk"]

QUEUE: Final = 1024
"""Copies to each tier that may wait."""
_ORDER: Final[tuple[Tier, ...]] = ("device", "host", "disk")
_FLUSH_SECONDS: Final = 1.0
_NICE: Final = 5
"""More than the threads of a step: they go first where there are no CPUs to spare."""


class Move(Protocol):
    """One copy (engine.protocol.Move is one), already checked: its blocks exist, its name is complete."""

    @property
    def id(self) -> int: ...
    @property
    def source(self) -> Tier: ...
    @property
    def source_block(self) -> int: ...
    @property
    def target(self) -> Tier: ...
    @property
    def target_block(self) -> int: ...
    @property
    def name(self) -> Name | None: ...


@dataclass(frozen=True, slots=True)
class Done:
    """A copy that has ended; when it is not `ok` the target holds nothing of use."""

    id: int
    ok: bool
    bytes: int
    """That were copied; for a target on disk, that it takes there."""
    seconds: float
    """Of the copy itself, without the wait before it."""


class _AbandonedError(Exception):
    """The copy was started before the fence, or was given up."""


class _Worker:
    """What one thread has for itself."""

    def __init__(self, block_bytes: int) -> None:
        self.gate = threading.Lock()
        """Held while a block in memory is touched: microseconds."""
        self.buffer: U8 = np.empty(block_bytes, np.uint8)
        self.in_hand: tuple[int, int] | None = None
        """Epoch and number of the copy that it does."""


class Mover:
    """Two threads and their queues. All methods may be called from any one thread."""

    def __init__(
        self, device: Blocks, host: HostBlocks | None, disk: BlockStore | None, wake: Callable[[], None]
    ) -> None:
        """`wake` is called, in one of the threads, when `take` has something after it had nothing."""
        self._device, self._host, self._disk = device, host, disk
        self._wake = wake
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._waiting: dict[Tier, deque[tuple[int, Move]]] = {target: deque() for target in _ORDER}
        """(epoch, move), by target."""
        self._epoch = 0
        self._closed = False
        self._flush_at = math.inf
        """When the disk's index is to be written, on the monotonic clock."""
        self._done: list[Done] = []
        self._given_up: set[int] = set()
        """Numbers of copies that a thread has in hand and that are not to touch a block any more."""
        self._workers = [_Worker(device.block_bytes) for _ in range(2)]
        self._threads = [
            threading.Thread(target=self._run, args=(worker, targets), name="mover", daemon=True)
            for worker, targets in zip(self._workers, (_ORDER[:2], _ORDER), strict=True)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def has_news(self) -> bool:
        """Whether `take` would give anything."""
        return bool(self._done)

    def take(self) -> list[Done]:
        """What has ended since the last call."""
        with self._lock:
            done, self._done = self._done, []
            return done

    def start(self, move: Move) -> bool:
        """Queue a copy; False, with nothing done, when too many wait."""
        with self._lock:
            queue = self._waiting[move.target]
            if len(queue) >= QUEUE or self._closed:
                return False
            queue.append((self._epoch, move))
            # Both: only one of them writes to the disk.
            self._work.notify_all()
            return True

    def give_up(self, moves: Collection[int]) -> set[int]:
        """Forget these copies: they touch no block of device or host after this, and are not reported. Left
        out of what is returned are those that have ended."""
        with self._lock:
            found: set[int] = set()
            for target, queue in self._waiting.items():
                found.update(move.id for _, move in queue if move.id in moves)
                self._waiting[target] = deque(item for item in queue if item[1].id not in moves)
            busy = [w for w in self._workers if w.in_hand is not None and w.in_hand[0] == self._epoch]
            in_hand = {w.in_hand[1] for w in busy if w.in_hand is not None} & set(moves)
            self._given_up |= in_hand
        for worker in self._workers:
            with worker.gate:
                pass
        return found | in_hand

    def abandon(self) -> None:
        """Forget every copy. None of them touches a block of device or host after this, or is reported."""
        with self._lock:
            self._epoch += 1
            for queue in self._waiting.values():
                queue.clear()
            self._done.clear()
            self._given_up.clear()
        for worker in self._workers:
            with worker.gate:
                pass

    def close(self, seconds: float) -> None:
        """Abandon all, and give what is under way on disk that long to end. May be called twice."""
        self.abandon()
        with self._lock:
            self._closed = True
            self._work.notify_all()
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))

    # ---- in the threads

    def _run(self, worker: _Worker, targets: tuple[Tier, ...]) -> None:
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICE)
        while not self._closed:
            if (work := self._next(worker, targets)) is not None:
                self._do(worker, *work)
            elif self._disk is not None and not self._closed:
                self._disk.flush()

    def _next(self, worker: _Worker, targets: tuple[Tier, ...]) -> tuple[int, Move] | None:
        """Wait for work; None: it is time to flush the disk, which the thread does that writes to it, or all
        is over."""
        with self._lock:
            while not self._closed:
                wait = self._flush_at - time.monotonic() if "disk" in targets else math.inf
                if wait <= 0:
                    self._flush_at = math.inf
                    return None
                for target in targets:
                    if self._waiting[target]:
                        epoch, move = self._waiting[target].popleft()
                        worker.in_hand = epoch, move.id
                        return epoch, move
                self._work.wait(None if wait == math.inf else wait)
        return None

    def _do(self, worker: _Worker, epoch: int, move: Move) -> None:
        begin = time.perf_counter()
        copied = 0
        try:
            copied = self._copy(worker, epoch, move)
        except _AbandonedError:
            pass  # known below
        except Exception:
            # A miss for whoever waits, never an error; but it should not happen.
            log.exception("copying a block from %s to %s failed", move.source, move.target)
        done = Done(move.id, copied > 0, copied, time.perf_counter() - begin)
        with self._lock:
            if "disk" in (move.source, move.target) and self._flush_at == math.inf:
                self._flush_at = time.monotonic() + _FLUSH_SECONDS
                self._work.notify_all()
            worker.in_hand = None
            if epoch != self._epoch:
                return
            if move.id in self._given_up:
                self._given_up.discard(move.id)
                return
            first = not self._done
            self._done.append(done)
        if first:
            self._wake()

    def _copy(self, worker: _Worker, epoch: int, move: Move) -> int:
        """Bytes copied; 0: there was nothing to be had, or no space."""
        buffer = worker.buffer
        if move.source == "disk":
            disk, name = self._on_disk(move)
            if not disk.get_into(name, buffer.data):
                return 0
            with worker.gate:
                self._check(epoch, move)
                self._write(move.target, move.target_block, buffer)
        elif move.target == "disk":
            disk, name = self._on_disk(move)
            with worker.gate:
                self._check(epoch, move)
                self._read(move.source, move.source_block, buffer)
            return disk.put(name, buffer.data)
        elif move.target == "host":
            with worker.gate:
                self._check(epoch, move)
                self._device.read_block(move.source_block, self._host_view(move.target_block))
        else:
            with worker.gate:
                self._check(epoch, move)
                self._device.write_block(move.target_block, self._host_view(move.source_block))
        return len(buffer)

    def _on_disk(self, move: Move) -> tuple[BlockStore, Name]:
        if self._disk is None or move.name is None:
            raise ValueError("there is no disk tier, or no name")
        return self._disk, move.name

    def _check(self, epoch: int, move: Move) -> None:
        if epoch != self._epoch or move.id in self._given_up:
            raise _AbandonedError

    def _read(self, tier: Tier, block: int, into: U8) -> None:
        if tier == "device":
            self._device.read_block(block, into)
        else:
            into[:] = self._host_view(block)

    def _write(self, tier: Tier, block: int, data: U8) -> None:
        if tier == "device":
            self._device.write_block(block, data)
        else:
            self._host_view(block)[:] = data

    def _host_view(self, block: int) -> U8:
        if self._host is None:
            raise ValueError("there is no host tier")
        return self._host.view(block)
