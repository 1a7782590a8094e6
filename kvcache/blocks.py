"""Places that hold KV, and what a sequence holds of the device pool."""

from dataclasses import dataclass, field
from enum import Enum, IntEnum

from ktransformers.kvcache.hashing import Chain

BlockId = int

_LATELY = 8192
"""Blocks after which what an owner asked for before counts half."""


class Tier(IntEnum):
    """Where a copy of a block lies, the fastest first. The names, in lower case, are the engine's."""

    DEVICE = 0
    HOST = 1
    DISK = 2


class State(Enum):
    """Of one copy of a block's bytes; one that is ABSENT has no record.

    ABSENT -> WRITING -> COMMITTED -> DELETING -> ABSENT, and from WRITING back to ABSENT when the move fails.
    """

    WRITING = "writing"
    """A move writes it, and holds it until it is done. Nobody finds it."""
    COMMITTED = "committed"
    """Its bytes are valid: the only state that a match sees."""
    DELETING = "deleting"
    """Given up while somebody still holds it. Nobody finds it; the last to let go frees it."""


@dataclass(eq=False)
class Owner:
    """Whose blocks are counted together: a tenant. `quota` is guaranteed in each tier, in bytes; where it is
    0, a share by weight of what is not guaranteed to others."""

    id: bytes
    """[16], a digest: all that the engine and the disk learn of a tenant."""
    weight: float = 1.0
    quota: tuple[int, int, int] = (0, 0, 0)
    asked: int = 0
    """Blocks of its prompts, lately."""
    found: int = 0
    """Those of them that were known."""

    def asks(self, blocks: int, found: int) -> None:
        """It comes with a prompt of so many blocks."""
        self.asked += blocks
        self.found += found
        if self.asked > _LATELY:
            self.asked //= 2
            self.found //= 2

    @property
    def returns(self) -> bool:
        """Whether it is in the habit of coming back to what it had computed: an eighth of its prompts is
        known. To write a block and read it again costs a CPU about a thirtieth of computing it."""
        return self.found * 8 > self.asked


@dataclass(eq=False)
class BlockTable:
    """The blocks of one sequence by position: block i holds tokens [i * n, (i + 1) * n), n = block_tokens.

    Half-open intervals of `blocks`, each ending where the next begins:
        [0, hits)           found in the index, shared with others; never written by this sequence
        [hits, committed)   computed by this sequence and visible in the index, unless somebody else was first
        [committed, end)    being written, visible to nobody
    """

    chain: Chain
    owner: Owner
    public: Chain | None = None
    """The same tokens' names in the scope that everybody reads."""
    blocks: list[BlockId] = field(default_factory=list)
    hits: int = 0
    committed: int = 0
    state: int = -1
    """Where the state after its hits was kept when it was attached."""
    kept: int = 0
    """Blocks before the last state that it kept itself."""
