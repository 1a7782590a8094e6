"""Tiers in memory: blocks by number, copied from and to.

A block is a fixed number of bytes and nothing else here: keys and values, latents or states of any shape go
through the same copies, and are always copied whole.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]


class Blocks(Protocol):
    """The device tier: an executor's KV pool."""

    @property
    def block_bytes(self) -> int: ...

    def read_block(self, block: int, into: U8) -> None:
        """Copy a block to `into` [block_bytes]. ValueError when there is no such block."""
        ...

    def write_block(self, block: int, data: U8) -> None:
        """Replace a block by `data` [block_bytes]. ValueError when there is no such block."""
        ...


class HostBlocks:
    """The host tier: plain memory. A page costs memory when its first block is written."""

    def __init__(self, blocks: int, block_bytes: int) -> None:
        """MemoryError when not even the addresses can be had."""
        self.blocks = blocks
        self.block_bytes = block_bytes
        self._memory: U8 = np.zeros((blocks, block_bytes), np.uint8)

    def view(self, block: int) -> U8:
        """The bytes themselves, to be read or written in place. ValueError when there is no such block."""
        if not 0 <= block < self.blocks:
            raise ValueError(f"block: {block} of {self.blocks}")
        view: U8 = self._memory[block]
        return view
