"""All copies of all blocks: the one place where they come, are held, are given up and go.

In a tier with blocks (device, host) a block is held as often as its pool says, by sequences and by moves; on
disk, by moves. What nobody holds and everybody may find lies on the tier's shelf until its room is needed.
"""

from ktransformers.kvcache.blocks import BlockId, Owner, State, Tier
from ktransformers.kvcache.eviction import Shelf
from ktransformers.kvcache.index import Copy, Entry, PrefixIndex
from ktransformers.kvcache.pool import BlockPool
from ktransformers.kvcache.states import KeptStates


class Tiers:
    """Device pool, host pool and disk of one engine."""

    def __init__(
        self, blocks: int, host_blocks: int, disk_bytes: int, block_bytes: int, states: int = 0
    ) -> None:
        self.index = PrefixIndex()
        self.states = KeptStates(states)
        self.block_bytes = block_bytes
        self.device = BlockPool(blocks)
        """The pool that sequences compute in."""
        self.pools = (self.device, BlockPool(host_blocks))
        sizes = (blocks * block_bytes, host_blocks * block_bytes, disk_bytes)
        self.shelves = tuple(Shelf(tier, size) for tier, size in zip(Tier, sizes, strict=True))
        self._on_device: list[Copy | None] = [None] * blocks
        self._copy_in: tuple[list[Copy | None], ...] = (self._on_device, [None] * host_blocks)
        self.forgotten: list[bytes] = []
        """Names that the disk is to be told to forget."""

    def copy_in(self, block: BlockId) -> Copy | None:
        """What that block of the device is known for."""
        return self._on_device[block]

    # ---- copies come

    def place(self, entry: Entry, tier: Tier, block: BlockId, state: State, size: int = 0) -> Copy:
        """The entry has a copy there from now on. The block is held by whoever writes it."""
        copy = Copy(entry, tier, block, state, size or self.block_bytes)
        if tier is not Tier.DISK:
            self._copy_in[tier][block] = copy
        self.index.place(copy)
        self.shelves[tier].add(copy)
        if tier is Tier.DISK and state is State.COMMITTED:
            self.shelves[tier].rest(copy)
        return copy

    def take(self, tier: Tier, owner: Owner, must: bool) -> BlockId | None:
        """A block of that tier, held by the caller, made free if need be.

        `must` is for what sequences compute. Else None when only others' copies could go that have no more
        than their share, or (on the device) when steps that are not done may still touch all free blocks.
        """
        pool = self.pools[tier]
        if not pool.free and not self._evict(tier, owner, must):
            return None
        if must:
            return pool.take()
        settled = pool.settled()
        return pool.take_settled(settled[0]) if settled else None

    def take_settled(self, owner: Owner, count: int) -> list[BlockId] | None:
        """So many blocks of the device for an urgent step, which steps that are not done have nothing to do
        with; None when there are not as many, or only by evicting more than that."""
        pool = self.device
        for _ in range(count + 1):
            settled = pool.settled(count)
            if len(settled) == count:
                return [pool.take_settled(block) for block in settled]
            if not self._evict(Tier.DEVICE, owner, must=True):
                return None
        return None

    def _evict(self, tier: Tier, owner: Owner, must: bool) -> bool:
        shelf = self.shelves[tier]
        victim = shelf.victim(owner, must)
        if victim is None:
            return False
        shelf.evicted += 1
        self.give_up(victim)
        return True

    def make_room_on_disk(self, owner: Owner, size: int) -> bool:
        """Whether so many bytes may be written there for that owner; others' names are forgotten for it."""
        shelf = self.shelves[Tier.DISK]
        while shelf.used + size > shelf.capacity:
            victim = shelf.victim(owner, must=False)
            if victim is None:
                return False
            shelf.evicted += 1
            self.give_up(victim)
        return True

    # ---- and are held

    def wake(self, block: BlockId) -> None:
        """A sequence holds this block of the device, whose copy it has found."""
        copy = self.copy_in(block)
        if copy is not None:
            self.shelves[Tier.DEVICE].wake(copy)
        self.device.hold(block)

    def let_go(self, block: BlockId) -> None:
        """A sequence lets go of this block of the device."""
        if self.device.drop(block):
            copy = self._on_device[block]
            if copy is None:
                self.device.give_back(block)
            else:
                self._unheld(copy)

    def hold(self, copy: Copy) -> None:
        """A move reads it."""
        self.shelves[copy.tier].wake(copy)
        copy.moves += 1
        if copy.tier is not Tier.DISK:
            self.pools[copy.tier].hold(copy.block)

    def unhold(self, copy: Copy) -> None:
        """A move that read or wrote it is done."""
        copy.moves -= 1
        if copy.tier is Tier.DISK:
            if not copy.moves:
                self._unheld(copy)
        elif self.pools[copy.tier].drop(copy.block):
            self._unheld(copy)

    def _unheld(self, copy: Copy) -> None:
        if copy.state is State.COMMITTED:
            self.shelves[copy.tier].rest(copy)
        else:
            self._remove(copy)

    # ---- and go

    def give_up(self, copy: Copy, told: bool = True) -> None:
        """Nobody finds it any more; its room is free as soon as nobody holds it. Of what is on disk, the disk
        is told then, unless it was the disk that said so."""
        copy.state = State.DELETING
        copy.forget = told
        held = copy.moves if copy.tier is Tier.DISK else self.pools[copy.tier].refs[copy.block]
        if not held:
            self._remove(copy)

    def _remove(self, copy: Copy) -> None:
        shelf = self.shelves[copy.tier]
        shelf.remove(copy)
        if copy.entry.state >= 0 and copy.tier is Tier.DEVICE:
            self.states.drop(copy.entry)
        leaf = self.index.remove(copy)
        if leaf is not None:
            shelf.leaf(leaf)
        if copy.tier is Tier.DISK:
            if copy.forget:
                self.forgotten.append(copy.entry.key)
        else:
            self._copy_in[copy.tier][copy.block] = None
            self.pools[copy.tier].give_back(copy.block)

    def check(self, held: list[int]) -> None:
        """`held`: how many sequences hold each block of the device.

        Errors: AssertionError when blocks are not conserved in a tier, or a copy is not where it should be.
        """
        problems = []
        for tier in (Tier.DEVICE, Tier.HOST):
            by_sequences = held if tier is Tier.DEVICE else [0] * self.pools[tier].total
            problems += self._wrong_blocks(tier, by_sequences)
        for tier, shelf in zip(Tier, self.shelves, strict=True):
            copies = [c for e in self.index.entries() if (c := e.copies[tier]) is not None]
            if shelf.used != sum(c.bytes for c in copies):
                problems.append(f"bytes in tier {tier.name}")
            if any(c.state is not State.COMMITTED for c in shelf):
                problems.append(f"what may be evicted from tier {tier.name}")
            if tier is Tier.DISK and set(shelf) != {c for c in copies if not c.moves}:
                problems.append("names on disk")
        problems += self.states.check(self.index.entries())
        if problems:
            raise AssertionError(f"KV blocks are not conserved: {', '.join(problems)}")

    def _wrong_blocks(self, tier: Tier, held: list[int]) -> list[str]:
        pool, shelf, copies = self.pools[tier], self.shelves[tier], self._copy_in[tier]
        refs = [n + (c.moves if c is not None else 0) for n, c in zip(held, copies, strict=True)]
        unheld = sorted(pool.free_blocks() + [c.block for c in shelf])
        known = {c for e in self.index.entries() if (c := e.copies[tier]) is not None}
        problems = {
            "reference counts": refs != pool.refs,
            "blocks in use": pool.used != sum(n > 0 for n in refs),
            "free and cached blocks": unheld != [b for b in range(pool.total) if refs[b] == 0],
            "free blocks that are known": any(copies[b] is not None for b in pool.free_blocks()),
            "copies and entries": known != {c for c in copies if c is not None},
            "writers": any(c.state is State.WRITING and c.moves != 1 for c in known),
        }
        return [f"{name} of tier {tier.name}" for name, wrong in problems.items() if wrong]
