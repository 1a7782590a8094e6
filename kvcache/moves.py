"""Copies of blocks on their way from one tier to another, and what is worth sending down.

A move holds its source, so that it keeps its bytes, and its target, which nobody finds before the engine has
said that the bytes are there. They are done beside the steps, so a move may write only where no step that is
not done reads or writes (see `BlockPool`).

Sent down are, as there is room: to the host whatever comes to rest on the device; to disk what was asked for
a second time, and the beginning of a conversation that nobody has gone on with for a while; and to both, as
soon as it is computed, all of a tenant that is in the habit of coming back (`Owner.returns`). What others
generate and never read again is not worth a write.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from ktransformers.kvcache.blocks import State, Tier
from ktransformers.kvcache.index import Copy, Entry
from ktransformers.kvcache.tiers import Tiers

IDLE_SECONDS = 30.0
"""A conversation that has not gone on for so long is written to disk as far as its last prompt."""
MOST_STORES = 64
"""Moves down to one tier that the engine has in hand at once; they hold blocks. Of each tier by itself: what
waits for a slow disk must not keep what goes to the host until it is evicted."""
_MOST_PENDING = 65_536
_SECONDS_WEIGHT = 1 / 16


@dataclass(eq=False, slots=True)
class Transfer:
    """One move. `content` is the block's token ids, which the disk stores and compares."""

    id: int
    source: Copy
    target: Copy
    content: bytes
    sent: float = 0.0
    """When the engine was told."""

    @property
    def entry(self) -> Entry:
        """What is moved."""
        return self.source.entry


@dataclass
class Traffic:
    """What has gone one way between two tiers."""

    moves: int = 0
    failed: int = 0
    bytes: int = 0
    seconds: float = 0.0
    """Of the copying, summed."""


class Speed:
    """What loading a block from one tier takes."""

    def __init__(self, guess: float) -> None:
        self.seconds = guess
        """Of one copy, averaged over the last few."""
        self.under_way = 0
        """Loads that have not been answered."""

    def finished(self, seconds: float) -> None:
        """One has ended, which took so long."""
        self.under_way -= 1
        self.seconds += (seconds - self.seconds) * _SECONDS_WEIGHT


class Moves:
    """All moves of one engine."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self._last = 0
        self._under_way: dict[int, Transfer] = {}
        self._outgoing: list[Transfer] = []
        self._down: dict[Tier, deque[Entry]] = {Tier.HOST: deque(), Tier.DISK: deque()}
        self._queued: dict[Tier, set[Entry]] = {Tier.HOST: set(), Tier.DISK: set()}
        self._stores = {Tier.HOST: 0, Tier.DISK: 0}
        self._resting: deque[tuple[float, bytes]] = deque()
        self.traffic = {(a, b): Traffic() for a in Tier for b in Tier if a is not b}
        # First guesses: 300 KB at 2 GB/s, and a disk's seek.
        self.speed = {Tier.HOST: Speed(0.0002), Tier.DISK: Speed(0.001)}
        """Of loads, by where they come from."""

    @property
    def under_way(self) -> Iterable[Transfer]:
        """Moves that have not been answered."""
        return self._under_way.values()

    def oldest_sent(self) -> float | None:
        """When the engine was told of the oldest move that it has not answered."""
        oldest = next(iter(self._under_way.values()), None)
        return None if oldest is None or not oldest.sent else oldest.sent

    # ---- begin and end

    def start(self, source: Copy, target: Copy, content: bytes) -> None:
        """Both are held from now on; the target is WRITING and held by the caller, who hands that over."""
        self._tiers.hold(source)
        target.moves += 1
        self._last += 1
        transfer = Transfer(self._last, source, target, content)
        self._under_way[transfer.id] = transfer
        self._outgoing.append(transfer)
        if target.tier is Tier.DEVICE:
            self.speed[source.tier].under_way += 1
        else:
            self._stores[target.tier] += 1

    def finish(self, move: int, ok: bool, size: int, seconds: float) -> None:
        """The engine has answered. An id that is not known is nobody's any more."""
        transfer = self._under_way.pop(move, None)
        if transfer is None:
            return
        source, target = transfer.source, transfer.target
        traffic = self.traffic[source.tier, target.tier]
        traffic.moves += 1
        traffic.failed += not ok
        traffic.bytes += size if ok else 0
        traffic.seconds += seconds
        if target.tier is Tier.DEVICE:
            self.speed[source.tier].finished(seconds)
        else:
            self._stores[target.tier] -= 1
        if ok and target.state is State.WRITING:
            self._arrived(transfer, size)
        elif target.state is State.WRITING:
            target.state = State.DELETING
            if target.tier is Tier.DEVICE and source.state is State.COMMITTED:
                # It could not be read: it is not there, or not what it should be.
                self._tiers.give_up(source)
        self._tiers.unhold(target)
        self._tiers.unhold(source)

    def _arrived(self, transfer: Transfer, size: int) -> None:
        target, entry = transfer.target, transfer.entry
        target.state = State.COMMITTED
        target.origin = transfer.source.tier
        if entry.content is None:
            entry.content = transfer.content
        if target.tier is Tier.DISK and size:
            self._tiers.shelves[Tier.DISK].resize(target, size)

    # ---- down

    def wanted(self, entry: Entry, tier: Tier) -> None:
        """The entry is worth having there, when there is room for the copying."""
        if not self._tiers.shelves[tier].capacity or entry.copies[tier] is not None:
            return
        if entry not in self._queued[tier] and len(self._queued[tier]) < _MOST_PENDING:
            self._queued[tier].add(entry)
            self._down[tier].append(entry)

    def rests(self, key: bytes, now: float) -> None:
        """A conversation may have ended with the block of this name, the last full one of its prompt."""
        if self._tiers.shelves[Tier.DISK].capacity and len(self._resting) < _MOST_PENDING:
            self._resting.append((now + IDLE_SECONDS, key))

    def send(self, now: float) -> list[Transfer]:
        """The moves to be told to the engine now; as many go down as may."""
        self._wake_resting(now)
        for tier, queue in self._down.items():
            most = min(MOST_STORES, self._tiers.device.total // 8)
            while queue and self._stores[tier] < most:
                entry = queue.popleft()
                self._queued[tier].discard(entry)
                self._store(entry, tier)
        sent, self._outgoing = self._outgoing, []
        for transfer in sent:
            transfer.sent = now
        return sent

    def _wake_resting(self, now: float) -> None:
        while self._resting and self._resting[0][0] <= now:
            _, key = self._resting.popleft()
            path: list[Entry] = []
            entry = self._tiers.index.get(key)
            while entry is not None and entry.copies[Tier.DISK] is None and entry.parent is not None:
                path.append(entry)
                entry = entry.up
            for each in reversed(path):
                self.wanted(each, Tier.DISK)

    def _store(self, entry: Entry, tier: Tier) -> None:
        host = entry.committed(Tier.HOST) if tier is Tier.DISK else None
        source = host or entry.committed(Tier.DEVICE)
        if source is None or entry.content is None or entry.copies[tier] is not None:
            return  # evicted meanwhile, or there by now
        tiers = self._tiers
        if tier is Tier.DISK:
            if entry.key in tiers.forgotten or not tiers.make_room_on_disk(entry.owner, tiers.block_bytes):
                return
            target = tiers.place(entry, tier, -1, State.WRITING)
        else:
            block = tiers.take(tier, entry.owner, must=False)
            if block is None:
                return
            target = tiers.place(entry, tier, block, State.WRITING)
        self.start(source, target, entry.content)
