"""The KV cache as the scheduler sees it: block ids, never bytes.

Every block is in one of three states, and total = used + cached + free at all times (`check`):
    used     held by one or more sequences (visible in the index or not)
    cached   held by none, visible in the index, evicted in LRU order when blocks run out
    free     holds nothing
A block becomes visible only by `commit`, which is for tokens whose step is done: never while it may still be
written, and never after it was given to somebody else.
"""

from ktransformers.kvcache.blocks import BlockId, BlockTable
from ktransformers.kvcache.hashing import Chain, root_key
from ktransformers.kvcache.index import PrefixIndex
from ktransformers.kvcache.pool import BlockPool


class KVCache:
    """One engine's device pool and its prefix index. Lives as long as that engine: a new one starts empty."""

    def __init__(self, blocks: int, block_tokens: int, fingerprint: bytes, reuse: bool = True) -> None:
        """`fingerprint` names everything that changes KV bytes; without `reuse` nothing is ever found."""
        self.block_tokens = block_tokens
        self._fingerprint = fingerprint
        self._reuse = reuse
        self._pool = BlockPool(blocks)
        self._index = PrefixIndex()

    @property
    def total(self) -> int:
        """Blocks of the pool."""
        return self._pool.total

    @property
    def used(self) -> int:
        """Blocks held by a sequence."""
        return self._pool.used

    @property
    def cached(self) -> int:
        """Blocks kept for their content only."""
        return self._index.idle

    @property
    def available(self) -> int:
        """Blocks that can be had at once: free ones and cached ones."""
        return self._pool.free + self._index.idle

    def open(self, scope: bytes) -> BlockTable:
        """The empty table of a new sequence, which shares only with sequences of the same scope."""
        return BlockTable(Chain(root_key(self._fingerprint, scope), self.block_tokens))

    def match(self, table: BlockTable, tokens: list[int]) -> list[BlockId]:
        """Blocks that hold a beginning of `tokens`. Leaves a token at least to compute, for its logits."""
        if not self._reuse:
            return []
        blocks = (len(tokens) - 1) // self.block_tokens
        table.chain.extend(tokens, blocks)
        return self._index.longest(table.chain, blocks)

    def idle(self, blocks: list[BlockId]) -> int:
        """How many of these matched blocks no sequence holds: attaching takes that many from `available`."""
        return sum(map(self._index.is_idle, blocks))

    def attach(self, table: BlockTable, blocks: list[BlockId]) -> None:
        """The sequence of this empty table begins with `blocks`, just matched."""
        for block in blocks:
            self._index.wake(block)
            self._pool.hold(block)
        table.blocks = list(blocks)
        table.hits = table.committed = len(blocks)

    def missing(self, table: BlockTable, tokens: int) -> int:
        """Blocks that the table lacks to hold `tokens` tokens."""
        return max(0, -(-tokens // self.block_tokens) - len(table.blocks))

    def grow(self, table: BlockTable, tokens: int) -> list[BlockId]:
        """Append what is missing to hold `tokens` tokens, and return it.

        Errors: ValueError when more is missing than available; nothing has changed then.
        """
        count = self.missing(table, tokens)
        if count > self.available:
            raise ValueError(f"{count} blocks wanted, {self.available} available")
        new = [self._take() for _ in range(count)]
        table.blocks += new
        return new

    def _take(self) -> BlockId:
        if not self._pool.free:
            self._pool.give_back(self._index.evict())
        return self._pool.take()

    def commit(self, table: BlockTable, tokens: list[int], computed: int) -> None:
        """The steps that wrote the first `computed` of `tokens` are done: make their full blocks visible."""
        full = computed // self.block_tokens
        if not self._reuse or full <= table.committed:
            return
        table.chain.extend(tokens, full)
        for i in range(table.committed, full):
            # If another sequence computed the same meanwhile, its block is the known one, ours stays private.
            self._index.add(table.blocks[i], table.chain, i)
        table.committed = full

    def release(self, table: BlockTable) -> None:
        """The sequence leaves. What is visible stays until evicted, the end of the sequence first."""
        for block in reversed(table.blocks):
            if self._pool.drop(block):
                if block in self._index:
                    self._index.rest(block)
                else:
                    self._pool.give_back(block)
        table.blocks = []
        table.hits = table.committed = 0

    def discard(self, table: BlockTable) -> None:
        """The sequence leaves and its KV is not to be trusted: nobody finds any of its blocks again."""
        for block in table.blocks:
            if block in self._index:
                self._index.forget(block)
        self.release(table)

    def check(self, tables: list[BlockTable]) -> None:
        """Errors: AssertionError when the blocks are not those of `tables`, the idle and the free ones."""
        held = [0] * self.total
        for table in tables:
            for block in table.blocks:
                held[block] += 1
        free, idle = self._pool.free_blocks(), self._index.idle_blocks()
        unheld = sorted(free + idle)
        problems = {
            "reference counts": held != self._pool.refs,
            "blocks in use": self.used != sum(n > 0 for n in held),
            "free and cached blocks": unheld != [b for b in range(self.total) if held[b] == 0],
            "cached blocks that are not known": not all(b in self._index for b in idle),
            "free blocks that are known": any(b in self._index for b in free),
        }
        if wrong := [name for name, bad in problems.items() if bad]:
            raise AssertionError(f"KV blocks are not conserved: {', '.join(wrong)}")
