"""The blocks of one tier: which are free, and how many hold each of the others."""

from collections import OrderedDict
from itertools import islice

from ktransformers.kvcache.blocks import BlockId

_LOOK = 16
"""Free blocks that are looked at beyond those that are wanted."""


class BlockPool:
    """Ids 0 .. total - 1. All operations O(1).

    A block is free, or held by `refs` sequences and moves, or held by none and kept for its content (by the
    index). Of each block it is known which step was the last to be planned when it was let go (`drop`):
    steps until then may still read or write it, so that what does not run in order with the steps (a move, an
    urgent step) may write to it only when those are done: then it is settled.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.refs = [0] * total
        self.used = 0
        """Blocks with refs > 0."""
        self.planned = 0
        """The last step that was planned."""
        self.done = 0
        """The last step that is done, and all before it."""
        self._dropped_at = [0] * total
        # Taken from the end: the block freed last is the one whose lines are still in some cache. And low ids
        # come first.
        self._free = OrderedDict.fromkeys(range(total - 1, -1, -1))

    @property
    def free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    def settled(self, count: int = 1) -> list[BlockId]:
        """As many as `count` settled free blocks, of those that have been free longest."""
        oldest = islice(self._free, count + _LOOK)
        return [block for block in oldest if self._dropped_at[block] <= self.done][:count]

    def take(self) -> BlockId:
        """A free block, now held once, for the steps. Errors: KeyError when there is none."""
        block, _ = self._free.popitem()
        self.used += 1
        self.refs[block] = 1
        return block

    def take_settled(self, block: BlockId) -> BlockId:
        """One of `settled`, now held once. Errors: KeyError when it is not free."""
        del self._free[block]
        self.hold(block)
        return block

    def hold(self, block: BlockId) -> None:
        """One more holds `block`, which is not free."""
        if self.refs[block] == 0:
            self.used += 1
        self.refs[block] += 1

    def drop(self, block: BlockId) -> bool:
        """One less; True when it was the last: the block is now to be kept or given back."""
        if self.refs[block] <= 0:
            raise ValueError(f"block {block} is dropped more often than it was held")
        self.refs[block] -= 1
        if self.refs[block]:
            return False
        self.used -= 1
        self._dropped_at[block] = self.planned
        return True

    def give_back(self, block: BlockId) -> None:
        """A block that nobody holds becomes free."""
        self._free[block] = None

    def free_blocks(self) -> list[BlockId]:
        """A copy, for checks."""
        return list(self._free)
