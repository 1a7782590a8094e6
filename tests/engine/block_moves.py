"""Moves as tests of the engine ask for them, and the sizes of its tiers in them."""

from ktransformers.engine.protocol import (
    BlockName,
    Move,
    Tier,
)

BLOCKS, HOST_BLOCKS, BLOCK_TOKENS = 16, 8, 16


def name(i: int) -> BlockName:
    return BlockName(bytes([i]) * 32, bytes(32), bytes(16), bytes([i]) * 4 * BLOCK_TOKENS)


def move(
    number: int, source: Tier, source_block: int, target: Tier, target_block: int, key: int | None = None
) -> Move:
    named = None if key is None else name(key)
    return Move(
        id=number,
        source=source,
        source_block=source_block,
        target=target,
        target_block=target_block,
        name=named,
    )
