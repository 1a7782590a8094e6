"""What a disk store knows in memory: every block of one model, the segments, and what they take.

Plain bookkeeping without I/O; its owner holds a lock around each call.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from ktransformers.kvcache.stores.layout import Row, SegmentHead
from ktransformers.kvcache.stores.store import Entry

HALF_LIFE = 0.25
"""Of the store, written anew since a block was last read, halves the block's worth."""
GRACE = 10
"""One part in so many of the segments, the newest, is spared: what is new cannot have been read yet."""


@dataclass(eq=False, slots=True)
class Use:
    """What is remembered of how a block was used."""

    hits: int
    last_use: float
    """Seconds since the epoch; for people, clocks jump."""
    turn: int
    """Number of the newest segment when it was last read, or written."""


@dataclass(eq=False, slots=True)
class Block:
    """A record that can be found."""

    segment: "Segment"
    row: Row
    use: Use


@dataclass(eq=False, slots=True)
class Segment:
    """A segment of this model."""

    head: SegmentHead
    size: int
    """Of the file."""
    sealed: bool
    """Nothing is written to it any more."""
    blocks: dict[int, Block] = field(default_factory=dict)
    """By offset: those that can be found."""


@dataclass(frozen=True, slots=True)
class Spare:
    """A file of no use to this model: of another one, or damaged. The first to go when space is needed."""

    seq: int
    name: str
    size: int
    last_opened: float
    """When its model was; 0 if it is of no use to any."""


class Catalog:
    """Blocks by key, segments by number, bytes by owner, and keys that were lost since somebody asked."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, Block] = {}
        self.segments: dict[int, Segment] = {}
        self.spares: list[Spare] = []
        self.total_bytes = 0
        """Of all files."""
        self.live_bytes = 0
        """Of the blocks."""
        self.newest = 0
        """Highest number of a segment so far, of whatever model."""
        self.owner_bytes: dict[bytes, int] = {}
        self.in_transit: set[bytes] = set()
        """Keys of blocks that are written again just now; who forgets one takes it out."""
        self._lost: dict[bytes, None] = {}

    def open_segment(self, segment: Segment) -> None:
        """A file that is there from now on."""
        self.segments[segment.head.seq] = segment
        self.newest = max(self.newest, segment.head.seq)
        self.total_bytes += segment.size

    def resize(self, segment: Segment, size: int) -> None:
        """Its file has another size now."""
        self.total_bytes += size - segment.size
        segment.size = size

    def add(self, segment: Segment, row: Row, use: Use) -> None:
        """A record can be found from now on; one whose key is known already stays dead."""
        if row.key in self.blocks:
            return
        block = Block(segment, row, use)
        self.blocks[row.key] = segment.blocks[row.offset] = block
        self._lost.pop(row.key, None)
        self._count(block, segment.head.stride)

    def remove(self, block: Block) -> None:
        """A record cannot be found any more."""
        del self.blocks[block.row.key]
        del block.segment.blocks[block.row.offset]
        self._count(block, -block.segment.head.stride)

    def _count(self, block: Block, size: int) -> None:
        owner = block.row.owner
        self.live_bytes += size
        left = self.owner_bytes.get(owner, 0) + size
        if left:
            self.owner_bytes[owner] = left
        else:
            del self.owner_bytes[owner]

    def close_segment(self, segment: Segment) -> list[bytes]:
        """A file goes: none of its blocks can be found any more. Their keys."""
        keys = [block.row.key for block in segment.blocks.values()]
        for block in list(segment.blocks.values()):
            self.remove(block)
        del self.segments[segment.head.seq]
        self.total_bytes -= segment.size
        return keys

    def set_aside(self, spare: Spare) -> None:
        """A file that only takes space."""
        self.spares.append(spare)
        self.total_bytes += spare.size

    def take_spare(self) -> Spare | None:
        """The spare file that nobody has missed for longest; the caller deletes it."""
        if not self.spares:
            return None
        spare = min(self.spares, key=lambda each: (each.last_opened, each.seq))
        self.spares.remove(spare)
        self.total_bytes -= spare.size
        return spare

    def candidates(self) -> list[tuple[Segment, list[Block]]]:
        """Segments that may be reclaimed, each with its blocks; the newest only if there is no other."""
        sealed = [segment for segment in self.segments.values() if segment.sealed]
        oldest = sorted(sealed, key=lambda segment: segment.head.seq)
        old_enough = oldest[: len(oldest) - max(1, len(oldest) // GRACE)] or oldest
        return [(segment, list(segment.blocks.values())) for segment in old_enough]

    def worth(self, block: Block) -> float:
        """What losing it would cost, next to others of its size: hits, forgotten as the store turns over."""
        age = (self.newest - block.use.turn) / (HALF_LIFE * max(1, len(self.segments)))
        return (1 + block.use.hits) * math.exp2(-max(0.0, age))

    def lose(self, keys: Iterable[bytes]) -> None:
        """To be reported, if they are not put again before."""
        self._lost.update(dict.fromkeys(keys))

    def take_lost(self) -> list[bytes]:
        """What was lost since the last call."""
        lost, self._lost = list(self._lost), {}
        return lost

    def entries(self) -> list[Entry]:
        """All blocks, in the order they lie in."""
        blocks = sorted(self.blocks.values(), key=lambda b: (b.segment.head.seq, b.row.offset))
        return [
            Entry(b.row.key, b.row.parent, b.row.owner, b.segment.head.stride, b.use.hits, b.use.last_use)
            for b in blocks
        ]
