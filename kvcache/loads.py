"""Fetching what a waiting request will need: the queue is where a load hides.

As a request is put into the queue, the blocks of its beginning that lie in slower tiers are started towards
the device, if loading them is predicted to take less time than computing them. They become idle blocks there
like any other, found when the request is let in, by it or by another; nothing is pinned, so nothing can leak.
What requests that wait may have had fetched is limited, and taken from free and idle blocks only.

When its turn comes a request may wait for loads that are under way, but no longer than computing would take,
nor much longer than predicted: then what has arrived is used and the rest is computed.
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ktransformers.kvcache.blocks import BlockTable, State, Tier
from ktransformers.kvcache.index import Copy, Entry
from ktransformers.kvcache.moves import Moves
from ktransformers.kvcache.tiers import Tiers

MOST_LOADS = 256
"""Loads that the engine has in hand at once."""
_BASE_SECONDS = 0.05
_PATIENCE = 4.0
"""Times the predicted time."""
_SLOWER = (Tier.HOST, Tier.DISK)


@dataclass(eq=False, slots=True)
class _Load:
    """What one waiting sequence has had fetched."""

    blocks: int = 0
    """That it has asked for, of the budget."""
    pending: deque[Entry] = field(default_factory=deque)
    """Not on the device yet, by position."""
    until: float | None = None
    """How long it may wait; None: its turn has not come."""
    compute: float | None = None
    """Seconds that computing the same would take, if known."""


class Loads:
    """Of one engine."""

    def __init__(self, tiers: Tiers, moves: Moves, recompute: Callable[[int, int], float | None]) -> None:
        """`recompute(start, n)`: seconds to compute n tokens after `start` others; None while unknown."""
        self.waited = 0
        self.timed_out = 0
        self.declined = 0
        """Blocks that were not loaded because computing them is faster."""
        self._tiers = tiers
        self._moves = moves
        self._recompute = recompute
        self._loads: dict[BlockTable, _Load] = {}
        self._queue: deque[tuple[BlockTable, Entry, bytes, Tier]] = deque()
        self._queued = dict.fromkeys(_SLOWER, 0)
        self._entries: Counter[Entry] = Counter()
        """Those in the queue."""
        self.held = 0
        """Blocks of the budget that are spoken for."""
        self._budget = tiers.device.total // 4

    def is_asked(self, table: BlockTable, urgent: bool) -> bool:
        """Whether there is nothing to add to what this sequence has had fetched."""
        load = self._loads.get(table)
        return load is not None and (not urgent or bool(self._pending(load)))

    def prefetch(self, table: BlockTable, path: list[tuple[Entry, bytes]], size: int, urgent: bool) -> None:
        """Start loading what of `path` (the known beginning of a sequence: entry and content of each block of
        `size` tokens) is not on the device. `urgent`: it is next, and will need all of them anyway. Only for
        a sequence that has not asked (`is_asked`)."""
        load = self._loads.get(table)
        device = self._tiers.device
        room = device.total - device.used if urgent else self._budget - self.held
        run = self._run(path, size, room)
        if not run:
            return
        if load is None:
            load = self._loads[table] = _Load()
        elif load.until:
            load.until = None
        self._touch(path)
        begin = next(i for i, (entry, _) in enumerate(path) if entry is run[0][0])
        load.compute = self._recompute(begin * size, len(run) * size)
        load.blocks += len(run)
        self.held += len(run)
        for entry, content, tier in run:
            load.pending.append(entry)
            self._queue.append((table, entry, content, tier))
            self._queued[tier] += 1
            self._entries[entry] += 1

    def _touch(self, path: list[tuple[Entry, bytes]]) -> None:
        """Those on the device must not be what makes room for those that follow them."""
        shelf = self._tiers.shelves[Tier.DEVICE]
        for entry, _ in reversed(path):
            copy = entry.copies[Tier.DEVICE]
            if copy is not None and copy in shelf:
                shelf.wake(copy)
                shelf.rest(copy)

    def _run(self, path: list[tuple[Entry, bytes]], size: int, room: int) -> list[tuple[Entry, bytes, Tier]]:
        """What is to be loaded, and from where: as far as loading takes less time than computing."""
        run: list[tuple[Entry, bytes, Tier]] = []
        speed = self._moves.speed
        seconds = sum((speed[t].under_way + self._queued[t]) * speed[t].seconds for t in _SLOWER)
        worth = 0
        for i, (entry, content) in enumerate(path):
            if entry.committed(Tier.DEVICE) is not None:
                continue
            source = self._source(entry)
            if source is None or len(run) >= room:
                break
            seconds += speed[source.tier].seconds
            run.append((entry, content, source.tier))
            compute = self._recompute((i + 1 - len(run)) * size, len(run) * size)
            if compute is None or seconds < compute:
                worth = len(run)
        self.declined += len(run) - worth
        return run[:worth]

    def _source(self, entry: Entry) -> Copy | None:
        return entry.committed(Tier.HOST) or entry.committed(Tier.DISK)

    def waits(self, table: BlockTable, now: float, latency: float) -> bool:
        """Whether the sequence, whose turn it is, had better wait for its loads. `latency`: seconds that the
        engine may take to see a message."""
        load = self._loads.get(table)
        if load is None:
            return False
        pending = self._pending(load)
        if not pending:
            return False
        if load.until is None:
            self.waited += 1
            load.until = now + self._patience(load) + latency
        if now < load.until:
            return True
        if load.until > 0:
            self.timed_out += 1
            load.until = 0.0
        return False

    def _pending(self, load: _Load) -> deque[Entry]:
        pending = load.pending
        while pending and self._over(pending[0]):
            # What follows one that failed is of no use to this sequence.
            if pending.popleft().committed(Tier.DEVICE) is None:
                pending.clear()
        return pending

    def _over(self, entry: Entry) -> bool:
        """Whether its load has ended, one way or the other. What was loaded may be gone again."""
        copy = entry.copies[Tier.DEVICE]
        return copy.state is not State.WRITING if copy is not None else entry not in self._entries

    def _patience(self, load: _Load) -> float:
        pending, seconds = load.pending, 0.0
        for tier in _SLOWER:
            speed = self._moves.speed[tier]
            count = sum((source := self._source(e)) is not None and source.tier is tier for e in pending)
            seconds += max(count, speed.under_way) * speed.seconds
        patience = _BASE_SECONDS + _PATIENCE * seconds
        return patience if load.compute is None else min(patience, load.compute)

    def next_timeout(self, now: float) -> float | None:
        """When the next one that waits will wait no longer."""
        if not self._loads:
            return None
        times = (load.until for load in self._loads.values() if load.until is not None)
        return min((time for time in times if time > now), default=None)

    def drop(self, table: BlockTable) -> None:
        """The sequence waits no more: it was let in, or has ended. What is under way goes on."""
        load = self._loads.pop(table, None)
        if load is not None:
            self.held -= load.blocks

    def start(self) -> None:
        """Begin as many loads as may be under way. Not while a step is planned: it takes idle blocks."""
        most = min(MOST_LOADS, self._budget)
        while self._queue and sum(s.under_way for s in self._moves.speed.values()) < most:
            table, entry, content, tier = self._queue[0]
            source = self._source(entry)
            if table in self._loads and entry.copies[Tier.DEVICE] is None and source is not None:
                block = self._tiers.take(Tier.DEVICE, entry.owner, must=False)
                if block is None:
                    return  # what was just left may be had when the steps that read it are done
                target = self._tiers.place(entry, Tier.DEVICE, block, State.WRITING)
                self._moves.start(source, target, content)
            self._queue.popleft()
            self._queued[tier] -= 1
            self._entries[entry] -= 1
            if not self._entries[entry]:
                del self._entries[entry]
