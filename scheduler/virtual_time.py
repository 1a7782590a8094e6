"""Virtual time: who among claimants of different weight has had least, and what a newcomer starts with.

A claimant's counter grows by what was done for it divided by its weight. The claimant with the smallest key
(counter plus what is already promised to it) is next. The level's own time V* follows the smallest key of
those that wait and never goes back; who begins to wait starts at V* at least, so that being idle earns
nothing, while a counter beyond V*, a debt, is kept. (After start-time fair queueing, Goyal et al. 1996, and
the virtual token counter, Sheng et al. 2024, whose lift looks at the waiting only.)

All counters are integers: exact, in order at any size, and the same on every machine.
"""

import heapq
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Generic, TypeVar

_MILLI = 1000
"""Weights are kept in thousandths."""
_SLACK = 64
"""Entries that may be out of date before a heap is made anew."""


class Claimant:
    """One of those that share. Costs are in micro-units, the counter in micro-units for a weight of 1."""

    __slots__ = ("_carry", "_milli", "counter", "name", "pending")

    def __init__(self, name: str) -> None:
        self.name = name
        self.counter = 0
        self.pending = 0
        """Cost of what was let in and is not done yet, as predicted."""
        self._milli = _MILLI
        self._carry = 0

    @property
    def milli(self) -> int:
        """Its weight in thousandths."""
        return self._milli

    @property
    def weight(self) -> float:
        """Its part of what there is, relative to the others'; kept in thousandths."""
        return self._milli / _MILLI

    @weight.setter
    def weight(self, weight: float) -> None:
        milli = max(1, round(weight * _MILLI))
        if milli != self._milli:
            self._milli, self._carry = milli, 0

    @property
    def key(self) -> int:
        """Its place: the smaller, the sooner. What is done of what was promised leaves it as it is, to the
        last unit, so that keys become smaller only where a promise is taken back."""
        return self.counter + (self._carry + self.pending * _MILLI) // self._milli

    def charge(self, cost: int) -> None:
        """So much was done for it. Nothing is lost to rounding."""
        if self._milli == _MILLI:
            self.counter += cost  # and there never is anything to carry
            return
        grown, self._carry = divmod(cost * _MILLI + self._carry, self._milli)
        self.counter += grown


def _no_key(_: Claimant) -> int:
    return 0


C = TypeVar("C", bound=Claimant)
_Entry = tuple[int, int, int, C]


class Heap(Generic[C]):
    """Claimants by a key that grows by itself, ties by `order`.

    An entry says how small the key is at least; what it really is, is looked up when the entry comes up. So
    only who joins, or whose key or order may have become smaller, has to be put in its place.
    """

    def __init__(self, key: Callable[[C], int]) -> None:
        self._key = key
        self._entries: list[_Entry[C]] = []
        self._of: dict[C, _Entry[C]] = {}
        """The one entry of each that holds; others stay until they come up."""
        self._serial = 0

    def __len__(self) -> int:
        return len(self._of)

    def __contains__(self, item: C) -> bool:
        return item in self._of

    def put(self, item: C, order: int = 0) -> None:
        """It is here, with its key as of now. O(log n)."""
        key = self._key(item)
        held = self._of.get(item)
        if held is not None and held[0] == key and held[1] == order:
            return
        self._serial += 1
        entry = (key, order, self._serial, item)
        self._of[item] = entry
        heapq.heappush(self._entries, entry)
        if len(self._entries) > 2 * len(self._of) + _SLACK:
            self._clear()

    def _clear(self) -> None:
        """No entry is out of date. O(n)."""
        self._entries = list(self._of.values())
        heapq.heapify(self._entries)

    def drop(self, item: C) -> None:
        """It is not here any more, if it was. O(1)."""
        self._of.pop(item, None)

    def least(self) -> C | None:
        """The one with the smallest key."""
        entries, of = self._entries, self._of
        while entries:
            entry = entries[0]
            held, order, serial, item = entry
            if of.get(item) is not entry:
                heapq.heappop(entries)
            elif (key := self._key(item)) == held:
                return item
            else:
                of[item] = grown = (key, order, serial, item)
                heapq.heapreplace(entries, grown)
        return None

    def in_order(self) -> Iterator[C]:
        """By key. The first n take O(n log n) of any number; nothing may change meanwhile."""
        # Keys grow, so those out of date would all come first.
        if len(self._entries) > len(self._of) + len(self._of) // 8:
            self._clear()
        entries, of, key_of = self._entries, self._of, self._key
        push, count = heapq.heappush, len(entries)
        frontier = [(entries[0], 0)] if entries else []
        while frontier:
            entry, at = heapq.heappop(frontier)
            held, order, serial, item = entry
            if at >= 0:
                left = 2 * at + 1
                if left < count:
                    push(frontier, (entries[left], left))
                if left + 1 < count:
                    push(frontier, (entries[left + 1], left + 1))
                if of.get(item) is not entry:
                    continue
            if (key := key_of(item)) == held:
                yield item
            else:
                # It comes up again where it belongs; what hangs on it is there already.
                push(frontier, ((key, order, serial, item), -1))


class Level(Generic[C]):
    """Those that compete with one another.

    A member is forgotten when it has nothing open and no debt. When more than `most_idle` are in debt and
    idle the smallest debts are forgiven by moving V* up to them, which no newcomer can gain from.
    """

    def __init__(self, most_idle: int, by_arrival: bool = False) -> None:
        """`by_arrival`: all keys count alike, so that the order is all that is left."""
        self.time = 0
        """V*."""
        self.members: dict[str, C] = {}
        self.ready: Heap[C] = Heap(_no_key if by_arrival else attrgetter("key"))
        """Those with something that may be let in."""
        self._idle: Heap[C] = Heap(attrgetter("counter"))
        self._most_idle = most_idle

    def add(self, member: C) -> None:
        """A new one; it owes nothing."""
        member.counter = self.time
        self.members[member.name] = member

    def lift(self, member: C) -> None:
        """It begins to wait."""
        self._idle.drop(member)
        member.counter = max(member.counter, self.time)

    def rest(self, member: C) -> None:
        """It has nothing open any more, or its counter has grown since."""
        self._idle.put(member)
        self._collect()

    def advance(self) -> None:
        """V* follows those that wait."""
        if (least := self.ready.least()) is not None and (key := least.key) > self.time:
            self.time = key
        self._collect()

    def _collect(self) -> None:
        while (first := self._idle.least()) is not None:
            if first.counter > self.time and len(self._idle) <= self._most_idle:
                return
            self.time = max(self.time, first.counter)
            self._idle.drop(first)
            del self.members[first.name]
