"""Which block holds which content, and which of those nobody is using may go first."""

from collections import OrderedDict
from dataclasses import dataclass

from ktransformers.kvcache.blocks import BlockId
from ktransformers.kvcache.hashing import Chain


@dataclass(frozen=True, slots=True)
class _Entry:
    key: bytes
    parent: bytes
    content: bytes


class PrefixIndex:
    """Name -> block, for blocks whose bytes are valid; an LRU of those that no sequence holds (`idle`)."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, BlockId] = {}
        self._entry_of: dict[BlockId, _Entry] = {}
        self._idle: OrderedDict[BlockId, None] = OrderedDict()

    @property
    def idle(self) -> int:
        """Blocks that can be evicted."""
        return len(self._idle)

    def __contains__(self, block: BlockId) -> bool:
        return block in self._entry_of

    def longest(self, chain: Chain, blocks: int) -> list[BlockId]:
        """The blocks of the longest known beginning of the chain's first `blocks` blocks.

        Parent and content are compared as well as the name: not even a collision of SHA-256 gives wrong KV.
        """
        found = []
        for i in range(blocks):
            block = self._block_of.get(chain.keys[i])
            if block is None:
                break
            entry = self._entry_of[block]
            if entry.content != chain.contents[i] or entry.parent != chain.parent(i):
                break
            found.append(block)
        return found

    def add(self, block: BlockId, chain: Chain, i: int) -> bool:
        """`block` holds block i of the chain from now on; False when another block already does."""
        key = chain.keys[i]
        if key in self._block_of:
            return False
        self._block_of[key] = block
        self._entry_of[block] = _Entry(key, chain.parent(i), chain.contents[i])
        return True

    def rest(self, block: BlockId) -> None:
        """No sequence holds `block` any more: it becomes the last to be evicted."""
        self._idle[block] = None

    def wake(self, block: BlockId) -> None:
        """A sequence holds `block` (again)."""
        self._idle.pop(block, None)

    def is_idle(self, block: BlockId) -> bool:
        """Known, and held by no sequence."""
        return block in self._idle

    def evict(self) -> BlockId:
        """Forget the block that has been idle longest. Errors: KeyError when none is idle."""
        block, _ = self._idle.popitem(last=False)
        self.forget(block)
        return block

    def forget(self, block: BlockId) -> None:
        """`block` no longer holds what it was known for."""
        del self._block_of[self._entry_of.pop(block).key]

    def idle_blocks(self) -> list[BlockId]:
        """A copy, for checks; next to be evicted first."""
        return list(self._idle)
