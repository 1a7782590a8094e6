"""Which content is known, and where its copies lie: one index for all tiers.

Entries form a tree, each hanging on the block before it. An entry stays as long as it has a copy or others
hang on it, so that each tier knows which of its copies are leaves.
"""

from dataclasses import dataclass, field

from ktransformers.kvcache.blocks import BlockId, Owner, State, Tier
from ktransformers.kvcache.hashing import Chain

TIERS = len(Tier)


@dataclass(eq=False, slots=True)
class Copy:
    """One place where the bytes of an entry are, or are about to be."""

    entry: "Entry"
    tier: Tier
    block: BlockId
    """-1 on disk, where the name says which it is."""
    state: State
    bytes: int
    moves: int = 0
    """Moves that read or write it."""
    forget: bool = False
    """The disk is to be told when it goes."""
    origin: Tier = Tier.DEVICE
    """Of a copy on the device, until it is first used: where it came from."""
    value: float = 0.0
    rested: int = 0
    """See eviction.py."""


@dataclass(eq=False, slots=True)
class Entry:
    """One block's name, what it says, and its copies by tier."""

    key: bytes
    parent: bytes | None
    """None: only what hangs on it is known."""
    content: bytes | None
    """Token ids; None: known by the disk alone, which compares them when it is loaded."""
    owner: Owner
    up: "Entry | None" = None
    depth: int = 0
    """Blocks before it, as far as is known."""
    uses: int = 0
    """Sequences that computed it or found it."""
    children: int = 0
    copies: list[Copy | None] = field(default_factory=lambda: [None] * TIERS)
    below: list[int] = field(default_factory=lambda: [0] * TIERS)
    """Children with a copy in each tier."""
    state: int = -1
    """Where the state after it is kept (states.py)."""

    def committed(self, tier: Tier) -> Copy | None:
        """The copy in this tier, if its bytes are valid."""
        copy = self.copies[tier]
        return copy if copy is not None and copy.state is State.COMMITTED else None


class PrefixIndex:
    """Name -> entry."""

    def __init__(self) -> None:
        self._entries: dict[bytes, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Entry | None:
        """By name alone: for what is not a match."""
        return self._entries.get(key)

    def match(self, chain: Chain, i: int) -> Entry | None:
        """The entry of block i of the chain.

        Parent and content are compared as well as the name: not even a collision of SHA-256 gives wrong KV.
        Where the content is not known yet, the engine compares it when it loads the block.
        """
        entry = self._entries.get(chain.keys[i])
        if entry is None or entry.parent != chain.parent(i):
            return None
        if entry.content is not None and entry.content != chain.contents[i]:
            return None
        return entry

    def enter(self, chain: Chain, i: int, owner: Owner) -> Entry | None:
        """The entry of block i of the chain, made if need be; None if another content has its name."""
        parent, content = chain.parent(i), chain.contents[i]
        entry = self.known(chain.keys[i], parent, owner)
        entry.depth = i
        if entry.content is None:
            entry.content = content
        return entry if entry.content == content and entry.parent == parent else None

    def known(self, key: bytes, parent: bytes, owner: Owner) -> Entry:
        """The entry of that name, made if need be."""
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = Entry(key, None, None, owner)
        if entry.parent is None:
            up = self._entries.get(parent)
            if up is None:
                up = self._entries[parent] = Entry(parent, None, None, owner)
            up.children += 1
            entry.parent, entry.up, entry.owner, entry.depth = parent, up, owner, up.depth + 1
        return entry

    def place(self, copy: Copy) -> None:
        """The entry has this copy from now on."""
        entry = copy.entry
        entry.copies[copy.tier] = copy
        if entry.up is not None:
            entry.up.below[copy.tier] += 1

    def remove(self, copy: Copy) -> Copy | None:
        """The entry no longer has it. Returns the parent's copy in that tier, if that is a leaf by this."""
        entry, tier, up = copy.entry, copy.tier, copy.entry.up
        entry.copies[tier] = None
        leaf = None
        if up is not None:
            up.below[tier] -= 1
            leaf = up.copies[tier] if up.below[tier] == 0 else None
        self.prune(entry)
        return leaf

    def prune(self, entry: Entry) -> None:
        """Forget the entry, and those it hangs on, as far as nothing is left of them."""
        at: Entry | None = entry
        while at is not None and not at.children and not any(at.copies):
            if self._entries.get(at.key) is not at:
                return
            del self._entries[at.key]
            at = at.up
            if at is not None:
                at.children -= 1

    def entries(self) -> list[Entry]:
        """A copy, for checks."""
        return list(self._entries.values())
