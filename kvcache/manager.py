"""The KV cache as the scheduler sees it: block ids and names, never bytes.

Every block of the device is in one of three states, and total = used + cached + free at all times (`check`):
    used     held by one or more sequences or moves (visible in the index or not)
    cached   held by none, visible in the index, evicted when blocks run out (eviction.py says which)
    free     holds nothing
A block becomes visible only by `commit`, which is for tokens whose step is done, or when the engine says that
it has been loaded: never while it may still be written, and never after it was given to somebody else.

Below the device there may be a host pool and a disk; the same holds for their copies (`tiers.py`).
"""

import hashlib
from collections.abc import Callable, Iterable
from weakref import WeakValueDictionary

from ktransformers.kvcache.blocks import BlockId, BlockTable, Owner, State, Tier
from ktransformers.kvcache.hashing import Chain, root_key
from ktransformers.kvcache.index import Copy, Entry
from ktransformers.kvcache.loads import Loads
from ktransformers.kvcache.moves import Moves, Transfer
from ktransformers.kvcache.tiers import Tiers

PUBLIC_SCOPE = b"public"
"""Everybody finds what was computed in this scope. No tenant's: those are digests of 32 bytes."""
_MOST_OWNERS = 16_384


def owner_id(tenant: str) -> bytes:
    """[16] what the engine and the disk call a tenant."""
    return hashlib.sha256(b"kvowner" + tenant.encode()).digest()[:16]


class KVCache:
    """One engine's blocks and where else copies of them are. Lives as long as that engine: a new one starts
    empty, but for what the disk says it has (`stored`)."""

    def __init__(
        self,
        blocks: int,
        block_tokens: int,
        fingerprint: bytes,
        reuse: bool = True,
        *,
        block_bytes: int = 1,
        host_blocks: int = 0,
        disk_bytes: int = 0,
        kept_states: int = -1,
        recompute: Callable[[int, int], float | None] = lambda start, n: None,
    ) -> None:
        """`fingerprint` names everything that changes KV bytes; without `reuse` nothing is ever found.

        `kept_states`: places for copies of states; -1: the model's sequences have none.

        `recompute(start, n)`: seconds to compute n tokens after `start` others; None while unknown.
        """
        self.block_tokens = block_tokens
        self.has_public = False
        """Whether anything was computed in the public scope."""
        self._fingerprint = fingerprint
        self._reuse = reuse
        self._stateful = kept_states >= 0
        if self._stateful and (host_blocks or disk_bytes):
            raise ValueError("states are kept on the device only, and KV is worth nothing without them")
        slower = (host_blocks, disk_bytes) if reuse else (0, 0)
        self.tiers = Tiers(blocks, *slower, block_bytes, max(kept_states, 0))
        self._pool, self._index = self.tiers.device, self.tiers.index
        self._idle = self.tiers.shelves[Tier.DEVICE]
        self.moves = Moves(self.tiers)
        self.loads = Loads(self.tiers, self.moves, recompute)
        self.tiered = any(slower)
        self.hit_tokens = dict.fromkeys(Tier, 0)
        """Prompt tokens found, by where their KV was before."""
        self._owners: dict[bytes, Owner] = {}
        self._now = 0.0

    @property
    def total(self) -> int:
        """Blocks of the device pool."""
        return self._pool.total

    @property
    def used(self) -> int:
        """Blocks held by a sequence or a move."""
        return self._pool.used

    @property
    def cached(self) -> int:
        """Blocks kept for their content only."""
        return len(self._idle)

    @property
    def available(self) -> int:
        """Blocks that can be had at once: free ones and cached ones."""
        return self._pool.free + len(self._idle)

    # ---- whose

    def owner(self, tenant: str, weight: float = 1.0, quota: tuple[int, int, int] = (0, 0, 0)) -> Owner:
        """The tenant with that name; it is entitled to this from now on."""
        owner = self._owner(owner_id(tenant))
        if (owner.weight, owner.quota) != (weight, quota):
            for shelf in self.tiers.shelves:
                shelf.change(owner, weight, quota)
            owner.weight, owner.quota = weight, quota
            for shelf in self.tiers.shelves:
                shelf.changed(owner)
        return owner

    def _owner(self, name: bytes) -> Owner:
        owner = self._owners.get(name)
        if owner is None:
            if len(self._owners) >= _MOST_OWNERS:
                # Left are those that a block or a sequence still names: a tenant is never two.
                named = WeakValueDictionary(self._owners)
                self._owners.clear()
                self._owners.update(named)
            owner = self._owners[name] = Owner(name)
        return owner

    def bytes_of(self, tenant: str) -> tuple[int, int, int]:
        """What that tenant has in each tier."""
        owner = Owner(owner_id(tenant))
        device, host, disk = (shelf.of(owner) for shelf in self.tiers.shelves)
        return device, host, disk

    # ---- sequences

    def open(self, scope: bytes, owner: Owner | None = None) -> BlockTable:
        """The empty table of a new sequence, which shares only with sequences of the same scope, and reads
        what is public."""

        def chain(of: bytes) -> Chain:
            return Chain(root_key(self._fingerprint, of), self.block_tokens)

        if scope == PUBLIC_SCOPE:
            self.has_public = True
        public = chain(PUBLIC_SCOPE) if self.has_public and scope != PUBLIC_SCOPE else None
        return BlockTable(chain(scope), owner or self.owner(""), public)

    def match(self, table: BlockTable, tokens: list[int]) -> list[BlockId]:
        """Blocks that hold a beginning of `tokens`. Leaves a token at least to compute, for its logits. Of a
        model with states the last one has a state."""
        found = []
        last = 0
        for entry, _ in self._path(table, tokens):
            copy = entry.committed(Tier.DEVICE)
            if copy is None:
                break
            found.append(copy.block)
            last = len(found) if entry.state >= 0 else last
        return found[:last] if self._stateful else found

    def may_find(self, table: BlockTable, tokens: list[int], blocks: int) -> bool:
        """Whether a match of so many blocks (one at least) or more is possible: if not, that is certain, and
        cheaper to learn than by `match`."""
        if not self._reuse or (len(tokens) - 1) // self.block_tokens < blocks:
            return False
        for chain in (table.chain, table.public):
            if chain is not None:
                if len(chain.keys) < blocks:
                    chain.extend(tokens, blocks)
                if self._index.get(chain.keys[blocks - 1]) is not None:
                    return True
        return False

    def _path(self, table: BlockTable, tokens: list[int]) -> Iterable[tuple[Entry, bytes]]:
        """The known beginning of `tokens`, whichever tier it is in: entry and content of each block."""
        if not self._reuse:
            return
        blocks = (len(tokens) - 1) // self.block_tokens
        chain, public, index = table.chain, table.public, self._index
        chain.extend(tokens, blocks)
        for i in range(blocks):
            entry = None
            if public is not None:
                public.extend(tokens, i + 1)
                entry = index.match(public, i)
                if entry is None:
                    public = None
            if entry is None:
                entry = index.match(chain, i)
            if entry is None:
                return
            yield entry, chain.contents[i]

    def idle(self, blocks: list[BlockId]) -> int:
        """How many of these matched blocks nobody holds: attaching takes that many from `available`."""
        copies = map(self.tiers.copy_in, blocks)
        return sum(copy is not None and copy in self._idle for copy in copies)

    def attach(self, table: BlockTable, blocks: list[BlockId], again: bool = False) -> None:
        """The sequence of this empty table begins with `blocks`, just matched; `again` after a preemption."""
        self.loads.drop(table)
        if not again:
            table.owner.asks(len(table.chain.keys), len(blocks))
        for block in blocks:
            self.tiers.wake(block)
            copy = self.tiers.copy_in(block)
            if copy is not None and not again:
                self._found(copy)
        table.blocks = list(blocks)
        table.hits = table.committed = table.kept = len(blocks)
        table.state = -1
        if self._stateful and blocks and (copy := self.tiers.copy_in(blocks[-1])) is not None:
            self.tiers.states.use(copy.entry)
            table.state = copy.entry.state

    def _found(self, copy: Copy) -> None:
        """A sequence begins with it."""
        self.hit_tokens[copy.origin] += self.block_tokens
        copy.origin = Tier.DEVICE
        self._used(copy.entry)

    def _used(self, entry: Entry) -> None:
        entry.uses += 1
        if entry.uses > 1:
            self.moves.wanted(entry, Tier.DISK)

    def missing(self, table: BlockTable, tokens: int) -> int:
        """Blocks that the table lacks to hold `tokens` tokens."""
        return max(0, -(-tokens // self.block_tokens) - len(table.blocks))

    def grow(self, table: BlockTable, tokens: int) -> list[BlockId]:
        """Append what is missing to hold `tokens` tokens, and return it.

        Errors: ValueError when more is missing than available; nothing has changed then.
        """
        count = self.missing(table, tokens)
        if not count:
            return []
        if count > self.available:
            raise ValueError(f"{count} blocks wanted, {self.available} available")
        new = [self._take(table.owner) for _ in range(count)]
        table.blocks += new
        return new

    def set_aside(self, table: BlockTable, found: list[BlockId], tokens: int) -> list[BlockId] | None:
        """Blocks for a sequence that is about to begin with `found`, just matched, and to have `tokens`
        tokens in an urgent step: only such that no step which is not done reads or writes. They are held, and
        to be added to the table when it has begun. None when there are not as many."""
        count = -(-tokens // self.block_tokens) - len(found)
        for block in found:
            self.tiers.wake(block)
        new = self.tiers.take_settled(table.owner, count)
        for block in reversed(found):
            self.tiers.let_go(block)
        return new

    def _take(self, owner: Owner) -> BlockId:
        block = self.tiers.take(Tier.DEVICE, owner, must=True)
        if block is None:
            raise ValueError("a block that was available is not there")
        return block

    def commit(self, table: BlockTable, tokens: list[int], computed: int) -> None:
        """The steps that wrote the first `computed` of `tokens` are done: make their full blocks visible."""
        full = computed // self.block_tokens
        if not self._reuse or full <= table.committed:
            return
        chain, owner = table.chain, table.owner
        chain.extend(tokens, full)
        wanted_below = self.tiered and owner.returns
        for i in range(table.committed, full):
            entry = self._index.enter(chain, i, owner)
            # If another sequence computed the same meanwhile, its block is the known one, ours stays private.
            if entry is not None and entry.copies[Tier.DEVICE] is None:
                self.tiers.place(entry, Tier.DEVICE, table.blocks[i], State.COMMITTED)
                self._used(entry)
                if wanted_below:
                    # While it is held: in a small pool, it may be evicted as it comes to rest.
                    self._worth_copies(entry, owner)
        table.committed = full

    # ---- states

    def keep_state(self, start: int, until: int, ends: bool) -> tuple[int, int]:
        """Where the step that computes tokens [start, until) of a prompt, which `ends` there or not, is to
        keep a state, and after how many tokens: the place is -1 when it is not. To be answered by
        `state_kept` or `state_lost`."""
        # A prompt that comes again is computed from its last token on.
        last = (until - 1 if ends else until) // self.block_tokens * self.block_tokens
        if not self._stateful or not self._reuse or last <= start:
            return -1, 0
        return self.tiers.states.take(), last

    def state_kept(self, table: BlockTable, place: int, tokens: int) -> None:
        """The step is done, and its blocks are committed: the state after so many tokens can be found."""
        blocks = tokens // self.block_tokens
        entry = self._index.match(table.chain, blocks - 1)
        if entry is None or entry.committed(Tier.DEVICE) is None:
            self.state_lost(place)
            return
        self.tiers.states.keep(place, entry)
        self._outgrow(table, blocks)

    def _outgrow(self, table: BlockTable, blocks: int) -> None:
        """One state for a prompt is enough: one that it kept on the way, and nobody found, goes."""
        if table.hits < table.kept < blocks:
            entry = self._index.match(table.chain, table.kept - 1)
            if entry is not None and entry.uses <= 1:
                self.tiers.states.drop(entry)
        table.kept = blocks

    def state_lost(self, place: int) -> None:
        """What was written there is not to be found: the sequence has left."""
        self.tiers.states.give_back(place)

    def release(self, table: BlockTable, prompt: int = 0) -> None:
        """The sequence leaves. What is visible stays until evicted, the end of the sequence first.

        `prompt`: how many tokens its prompt had, if it has come to its end: it may be a conversation's.
        """
        if self.tiered:
            self._send_down(table, prompt)
        self.loads.drop(table)
        for block in reversed(table.blocks):
            self.tiers.let_go(block)
        table.blocks = []
        table.hits = table.committed = 0

    def _send_down(self, table: BlockTable, prompt: int) -> None:
        for block in table.blocks[: table.committed]:
            # Not yet idle, but about to be, unless others hold it: then their leaving is soon enough.
            copy = self.tiers.copy_in(block)
            if copy is not None and self._pool.refs[block] == 1 + copy.moves:
                self._worth_copies(copy.entry, table.owner)
        last = min(prompt // self.block_tokens, table.committed)
        if table.hits and last:
            self.moves.rests(table.chain.keys[last - 1], self._now)

    def _worth_copies(self, entry: Entry, owner: Owner) -> None:
        if self.tiered:
            self.moves.wanted(entry, Tier.HOST)
            if owner.returns:
                self.moves.wanted(entry, Tier.DISK)

    def discard(self, table: BlockTable) -> None:
        """The sequence leaves and its KV is not to be trusted: nobody finds any of its blocks again."""
        for block in table.blocks:
            copy = self.tiers.copy_in(block)
            if copy is not None:
                self._distrust(copy.entry)
        self.release(table)

    def distrust(self, table: BlockTable, tokens: list[int]) -> None:
        """As `discard`, for a sequence that has left already."""
        for entry, _ in list(self._path(table, tokens)):
            self._distrust(entry)

    def _distrust(self, entry: Entry) -> None:
        for copy in list(entry.copies):
            if copy is not None:
                self.tiers.give_up(copy)

    # ---- tiers

    def prefetch(self, table: BlockTable, tokens: list[int], urgent: bool = False) -> None:
        """Start loading what a waiting sequence will find in slower tiers; see `loads.py`."""
        if self.tiered and not self.loads.is_asked(table, urgent):
            self.loads.prefetch(table, list(self._path(table, tokens)), self.block_tokens, urgent)

    def waits(self, table: BlockTable, tokens: list[int], now: float, latency: float) -> bool:
        """Whether a sequence whose turn it is had better wait for what is being loaded."""
        if not self.tiered:
            return False
        self.prefetch(table, tokens, urgent=True)
        return self.loads.waits(table, now, latency)

    def send(self, now: float) -> tuple[list[Transfer], list[bytes]]:
        """Moves to be started now, and names that the disk is to forget."""
        if not self.tiered:
            return [], []
        self._now = now
        self.loads.start()
        transfers = self.moves.send(now)
        forgotten, self.tiers.forgotten = self.tiers.forgotten, []
        return transfers, forgotten

    def step_planned(self, n: int) -> None:
        """Step `n` is on its way to the engine."""
        self._pool.planned = n

    def step_done(self, n: int) -> None:
        """Step `n`, and all before it, read and write no more."""
        self._pool.done = n

    def stored(self, key: bytes, parent: bytes, owner: bytes, size: int, hits: int) -> None:
        """The disk says that it has this block; those used last are to be said last."""
        if not self.tiers.shelves[Tier.DISK].capacity or key == parent:
            return
        entry = self._index.known(key, parent, self._owner(owner))
        if entry.copies[Tier.DISK] is None:
            entry.uses = max(entry.uses, hits + 1)
            self.tiers.place(entry, Tier.DISK, -1, State.COMMITTED, size)

    def lost(self, key: bytes) -> None:
        """The disk has it no more."""
        entry = self._index.get(key)
        if entry is not None and (copy := entry.copies[Tier.DISK]) is not None:
            self.tiers.give_up(copy, told=False)

    def withdraw(self, tokens: list[int]) -> None:
        """What was computed of `tokens` in the public scope is found by nobody from now on."""
        table = self.open(PUBLIC_SCOPE)
        for entry, _ in list(self._path(table, [*tokens, 0])):
            self._distrust(entry)

    def lose_disk(self) -> None:
        """The disk has been given up."""
        self.tiers.shelves[Tier.DISK].capacity = 0
        for entry in self._index.entries():
            if (copy := entry.copies[Tier.DISK]) is not None:
                self.tiers.give_up(copy, told=False)

    def check(self, tables: list[BlockTable]) -> None:
        """Errors: AssertionError when blocks are not those of `tables` and moves, the idle and the free."""
        held = [0] * self.total
        for table in tables:
            for block in table.blocks:
                held[block] += 1
        self.tiers.check(held)
