"""What a sequence holds of the pool."""

from dataclasses import dataclass, field

from ktransformers.kvcache.hashing import Chain

BlockId = int


@dataclass(eq=False)
class BlockTable:
    """The blocks of one sequence by position: block i holds tokens [i * n, (i + 1) * n), n = block_tokens.

    Half-open intervals of `blocks`, each ending where the next begins:
        [0, hits)           found in the index, shared with others; never written by this sequence
        [hits, committed)   computed by this sequence and visible in the index, unless somebody else was first
        [committed, end)    being written, visible to nobody
    """

    chain: Chain
    blocks: list[BlockId] = field(default_factory=list)
    hits: int = 0
    committed: int = 0
