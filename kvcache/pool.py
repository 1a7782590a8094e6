"""The blocks of one tier: which are free, and how many sequences hold each of the others."""

from ktransformers.kvcache.blocks import BlockId


class BlockPool:
    """Ids 0 .. total - 1. All operations O(1).

    A block is free, or held by `refs` sequences, or held by none and kept for its content (by the index).
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.refs = [0] * total
        self.used = 0
        """Blocks with refs > 0."""
        # A stack: the block freed last is the one whose lines are still in some cache. Low ids come first.
        self._free = list(range(total - 1, -1, -1))

    @property
    def free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    def take(self) -> BlockId:
        """A free block, now held once. Errors: IndexError when there is none."""
        block = self._free.pop()
        self.hold(block)
        return block

    def hold(self, block: BlockId) -> None:
        """One more sequence holds `block`, which is not free."""
        if self.refs[block] == 0:
            self.used += 1
        self.refs[block] += 1

    def drop(self, block: BlockId) -> bool:
        """One sequence less; True when it was the last: the block is now to be kept or given back."""
        if self.refs[block] <= 0:
            raise ValueError(f"block {block} is dropped more often than it was held")
        self.refs[block] -= 1
        if self.refs[block]:
            return False
        self.used -= 1
        return True

    def give_back(self, block: BlockId) -> None:
        """A block that nobody holds becomes free."""
        self._free.append(block)

    def free_blocks(self) -> list[BlockId]:
        """A copy, for checks."""
        return list(self._free)
