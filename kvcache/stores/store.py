"""What a store of blocks is: bytes by name, on another medium than the one that kernels read.

A store is a cache. It may refuse to keep a block, and it may lose one at any time (space, errors, damage);
what it gives back is what was put under exactly that name, or nothing.
"""

from dataclasses import dataclass, field
from typing import Literal, Protocol

Buffer = bytes | bytearray | memoryview
State = Literal["on", "read-only", "off"]


class Name(Protocol):
    """What a block holds (engine.protocol.BlockName is one). Compared whole, understood by nobody here."""

    @property
    def key(self) -> bytes:
        """[32], what the block is found by."""

    @property
    def parent(self) -> bytes:
        """[32] the key of the block before, or the root."""

    @property
    def owner(self) -> bytes:
        """[16] who may have it; bytes are counted by owner."""

    @property
    def content(self) -> bytes:
        """The token ids as u32le."""


class StoreError(Exception):
    """A store cannot be opened; the message is one line that says why and what to do."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A block that the store has."""

    key: bytes
    parent: bytes
    owner: bytes
    size: int
    """Bytes that it takes in the store, with its head and padding."""
    hits: int
    last_use: float
    """Seconds since the epoch: when it was put, or last read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStats:
    """Counters are since the store was opened; sizes are as they are now."""

    state: State
    """read-only: nothing is stored for a minute, then it is tried again. off: for good, all is lost."""
    reason: str
    """Why it is not on; one line for the log."""
    blocks: int
    live_bytes: int
    """Of the blocks of this fingerprint."""
    total_bytes: int
    """That the store takes: live, dead, and of other fingerprints."""
    cap: int
    puts: int = 0
    refused_puts: int = 0
    """Not stored: no space, an error, read-only or off."""
    hits: int = 0
    misses: int = 0
    mismatches: int = 0
    """Misses because what was read is not what was asked for or not what was written."""
    quarantined: int = 0
    """Segments that were taken out because of a mismatch."""
    reclaimed: int = 0
    """Files deleted to make room: segments of this and other models, and damaged ones."""
    io_errors: int = 0
    owner_bytes: dict[bytes, int] = field(default_factory=dict)
    """Live bytes by owner, of this fingerprint."""


class BlockStore(Protocol):
    """Bytes of blocks of one model, by name.

    Threads: every method may be called from any thread at any time. put and get_into do their I/O and
    checksums outside the store's locks and without the interpreter's, so that a few threads overlap; all
    other methods take microseconds, but for flush and close, which write.

    Nothing raises for what the medium does: errors are misses, refused puts and a state. ValueError is for
    callers that break the contract (a wrong size).
    """

    block_bytes: int
    """Size of every buffer."""

    def entries(self) -> list[Entry]:
        """Every block that could be read now, parents before children where both were put in that order."""

    def put(self, name: Name, buffer: Buffer) -> int:
        """Keep a copy of `buffer` (block_bytes, contiguous, not changed meanwhile).

        Returns the bytes that it takes there; 0: it was not stored. It can be read by others once this has
        returned, not before. A block that is there already is not written again. `buffer` is not referred to
        after the return.
        """

    def get_into(self, name: Name, buffer: bytearray | memoryview) -> bool:
        """Fill `buffer` (block_bytes, contiguous, writable) with what was put under this name.

        False: there is nothing, or it was not what it should be (which the store then gives up); the buffer
        may have been written to, and holds nothing of use. True: every byte and the whole name were checked.
        """

    def forget(self, keys: list[bytes]) -> None:
        """Give these blocks up; those that are not there are ignored. They are not reported by `lost`.

        Their space is free when the rest of their segment goes, too. After a crash what was forgotten since
        the last flush may be there again.
        """

    def lost(self) -> list[bytes]:
        """Keys of blocks that the store has given up by itself since the last call (space, damage, errors).

        Each is absent when this returns, unless it is being put at that moment: a put takes its key off the
        list. So whoever reports puts and losses together lets the losses count last.
        """

    def flush(self) -> None:
        """Write down what has changed: to be called within a second or so of it; cheap when nothing has."""

    def stats(self) -> StoreStats:
        """How it is."""

    def close(self) -> None:
        """Seal and commit. Calls that are under way end first; later ones are misses. May take a second."""
