"""Which copy of a tier goes first when its room is needed: whose, and of those which.

Whose: of the tenants with something to give, the one that has most by what it is entitled to (`Owner`). What
one does not use the others borrow; who wants it back takes from those above their share, never from one
below, so flooding a cache costs whoever does it, and nobody else.

Which: leaves first, for a block is worthless without those before it. Of the leaves the one of least value,

    value = clock + weight(uses) * cost(depth)          (GreedyDual-Size-Frequency; all blocks have one size)

where the clock is the value of what went last, so that what was useful once does not stay for ever, and cost
grows with the tokens before it, which attention reads. Among equals the one that has rested longest goes.
"""

import heapq
from collections.abc import Iterator

from ktransformers.kvcache.blocks import Owner, Tier
from ktransformers.kvcache.index import Copy

_MILLI = 1000
_MOST_USES = 4
"""More say nothing new, and would keep what is no longer asked for."""
_CONTEXT_BLOCKS = 1024
"""Blocks of context that double what a token costs. Order of magnitude: it decides between leaves only."""


def _entitled(owner: Owner, tier: Tier) -> float:
    """Its quota in bytes, or its weight."""
    return owner.quota[tier] or max(owner.weight, 1 / _MILLI)


class _Account:
    """One owner's part of a tier."""

    __slots__ = ("asked", "entitled", "leaves", "owner", "used")

    def __init__(self, owner: Owner, tier: Tier) -> None:
        self.owner = owner
        self.entitled = _entitled(owner, tier)
        self.used = 0
        """Bytes of all its copies."""
        self.leaves: list[tuple[float, int, Copy]] = []
        """A heap; items that hold no longer are dropped when they come up."""
        self.asked = -1.0
        """What it stands in the heap of accounts with; -1: it does not."""

    @property
    def standing(self) -> float:
        """Used by quota, or by weight: comparable within its heap."""
        return self.used / self.entitled


class Shelf:
    """The copies of one tier that could be given up: nobody holds them and their bytes are valid."""

    def __init__(self, tier: Tier, capacity: int) -> None:
        """`capacity` in bytes."""
        self.tier = tier
        self.capacity = capacity
        self.used = 0
        self.evicted = 0
        self._idle: dict[Copy, None] = {}
        self._accounts: dict[bytes, _Account] = {}
        self._clock = 0.0
        self._rested = 0
        self._weights = 0
        """In thousandths, of the owners that have no quota of their own."""
        self._quotas = 0
        # Two orders that need no rescaling when owners come and go: by weight, and by quota.
        self._by_weight: list[tuple[float, bytes]] = []
        self._by_quota: list[tuple[float, bytes]] = []

    def __len__(self) -> int:
        return len(self._idle)

    def __contains__(self, copy: Copy) -> bool:
        return copy in self._idle

    def __iter__(self) -> Iterator[Copy]:
        return iter(list(self._idle))

    def of(self, owner: Owner) -> int:
        """Bytes that it has here."""
        account = self._accounts.get(owner.id)
        return account.used if account is not None else 0

    # ---- what is here

    def add(self, copy: Copy) -> None:
        """A copy is here, or about to be."""
        owner = copy.entry.owner
        account = self._accounts.get(owner.id)
        if account is None:
            account = self._accounts[owner.id] = _Account(owner, self.tier)
            self._count(owner, 1)
        account.used += copy.bytes
        self.used += copy.bytes
        self._ask(account)

    def remove(self, copy: Copy) -> None:
        """It is not here any more. Nobody holds it."""
        self._idle.pop(copy, None)
        owner = copy.entry.owner
        account = self._accounts[owner.id]
        account.used -= copy.bytes
        self.used -= copy.bytes
        if account.used <= 0:
            del self._accounts[owner.id]
            self._count(owner, -1)

    def resize(self, copy: Copy, size: int) -> None:
        """It takes another number of bytes than was thought."""
        self._accounts[copy.entry.owner.id].used += size - copy.bytes
        self.used += size - copy.bytes
        copy.bytes = size

    def change(self, owner: Owner, weight: float, quota: tuple[int, int, int]) -> None:
        """It is entitled to something else from now on; to be called for each tier before `owner` changes."""
        account = self._accounts.get(owner.id)
        if account is not None:
            self._count(owner, -1)
            self._count(Owner(owner.id, weight, quota), 1)
            account.asked = -1.0

    def changed(self, owner: Owner) -> None:
        """It has changed."""
        account = self._accounts.get(owner.id)
        if account is not None:
            account.entitled = _entitled(owner, self.tier)
            self._ask(account)

    def rest(self, copy: Copy) -> None:
        """Nobody holds it any more."""
        self._rested += 1
        copy.rested = self._rested
        entry, uses = copy.entry, copy.entry.uses
        cost = 1 + entry.depth // _CONTEXT_BLOCKS  # in whole steps: within one, who has rested longest goes
        weight = 1 if uses < 1 else _MOST_USES if uses > _MOST_USES else uses
        copy.value = self._clock + weight * cost
        self._idle[copy] = None
        if not entry.below[self.tier]:
            self._shelve(copy)

    def wake(self, copy: Copy) -> None:
        """Somebody holds it (again)."""
        self._idle.pop(copy, None)

    def leaf(self, copy: Copy) -> None:
        """The last one that hung on it is gone from this tier."""
        if copy in self._idle:
            self._shelve(copy)

    # ---- what goes

    def victim(self, owner: Owner, must: bool) -> Copy | None:
        """What goes next to make room for `owner`, if anything may.

        Where it is not a `must`, nobody who has no more than its share gives for somebody else.
        """
        account = self._most()
        if account is None:
            # A leaf is held whose parent is not: somebody else computed the same.
            return next(iter(self._idle), None) if must else None
        if not must and account.owner is not owner and self._share(account) <= 1:
            own = self._accounts.get(owner.id)
            if own is None or not self._leaf_of(own):
                return None
            account = own
        copy = account.leaves[0][2]  # which was just seen to hold
        self._clock = max(self._clock, copy.value)
        return copy

    def _shelve(self, copy: Copy) -> None:
        account = self._accounts[copy.entry.owner.id]
        if len(account.leaves) > 2 * len(self._idle) + 64:
            account.leaves = [item for item in account.leaves if self._holds(item)]
            heapq.heapify(account.leaves)
        heapq.heappush(account.leaves, (copy.value, copy.rested, copy))
        self._ask(account)

    def _holds(self, item: tuple[float, int, Copy]) -> bool:
        _, rested, copy = item
        return copy.rested == rested and copy in self._idle and not copy.entry.below[self.tier]

    def _leaf_of(self, account: _Account) -> Copy | None:
        """Its leaf of least value. It stays."""
        leaves = account.leaves
        while leaves and not self._holds(leaves[0]):
            heapq.heappop(leaves)
        return leaves[0][2] if leaves else None

    # ---- who has how much

    def _count(self, owner: Owner, sign: int) -> None:
        if quota := owner.quota[self.tier]:
            self._quotas += sign * quota
        else:
            self._weights += sign * max(1, round(owner.weight * _MILLI))

    def _share(self, account: _Account) -> float:
        """Used by what it is entitled to."""
        if account.owner.quota[self.tier]:
            return account.standing
        unit = max(1.0, self.capacity - self._quotas) * _MILLI / max(1, self._weights)
        return account.standing / unit

    def _ask(self, account: _Account) -> None:
        """Have it stand in its heap with no less than it has. When it has less, that is seen at the top."""
        if account.leaves and (standing := account.used / account.entitled) > account.asked:
            account.asked = standing
            heap = self._by_quota if account.owner.quota[self.tier] else self._by_weight
            heapq.heappush(heap, (-standing, account.owner.id))

    def _most(self) -> _Account | None:
        """The account with most by what it is entitled to, of those that have a leaf to give."""
        by_weight = self._top(self._by_weight)
        by_quota = self._top(self._by_quota) if self._by_quota else None
        if by_weight is None or by_quota is None:
            return by_weight or by_quota
        return max(by_weight, by_quota, key=self._share)

    def _top(self, heap: list[tuple[float, bytes]]) -> _Account | None:
        while heap:
            asked, name = heap[0]
            account = self._accounts.get(name)
            if account is None or account.asked != -asked:
                heapq.heappop(heap)
            elif self._leaf_of(account) is None:
                heapq.heappop(heap)
                account.asked = -1.0
            elif (standing := account.used / account.entitled) < account.asked:
                account.asked = standing
                heapq.heapreplace(heap, (-standing, name))
            else:
                return account
        return None
