"""The disk store: append-only segment files, found through an index in memory that SQLite remembers.

A block is written once, at the end of the open segment, and never changed; a full segment is sealed by a
footer and fdatasync; space comes back by deleting whole segments, those of other models first, then those
whose blocks are worth least. The open segment is its own log: until it is sealed the index says nothing of
it, and after a crash it is read through. So nothing ever refers to bytes that may not have been written.

What a reader gets was compared byte for byte with what its name demands (layout.record_head). Damage costs
the whole segment: the medium that lost one page is not to be trusted with its neighbours.

Locks, in the order they are taken: Appender._rolling (one segment is made at a time), Books._committing (the
index), Books.lock (everything in memory, for microseconds). Blocks are read and written under none of them.
"""

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from ktransformers.kvcache.stores.appender import Appender
from ktransformers.kvcache.stores.books import Books
from ktransformers.kvcache.stores.catalog import Block, Use
from ktransformers.kvcache.stores.folder import Folder
from ktransformers.kvcache.stores.health import is_ours
from ktransformers.kvcache.stores.layout import KEY, OWNER, PAGE, checksum, parse_record, record_head
from ktransformers.kvcache.stores.opening import read_folder
from ktransformers.kvcache.stores.segments import file_name, read_all
from ktransformers.kvcache.stores.store import Buffer, Entry, Name, StoreError, StoreStats

MAX_CONTENT = 1 << 16
"""Bytes of a name's content."""


@dataclass(eq=False, slots=True)
class _Calls:
    """How many calls are under way, and whether there may be more."""

    running: int = 0
    closed: bool = False
    ended: threading.Condition = field(default_factory=threading.Condition)

    def enter(self) -> bool:
        """False: the store is closed. Else `leave` follows."""
        with self.ended:
            self.running += not self.closed
            return not self.closed

    def leave(self) -> None:
        """One call less, of those that had entered."""
        with self.ended:
            self.running -= 1
            if self.closed:
                self.ended.notify_all()

    def close(self) -> bool:
        """No more calls, and the last has ended. False when that had been asked before."""
        with self.ended:
            if self.closed:
                return False
            self.closed = True
            self.ended.wait_for(lambda: not self.running)
            return True


class DiskStore:
    """A BlockStore (see there for what the methods promise) in one folder."""

    def __init__(self, books: Books, appender: Appender, block_bytes: int, cap: int) -> None:
        """Made by `open`."""
        self.block_bytes = block_bytes
        self._books, self._appender, self._cap = books, appender, cap
        self._calls = _Calls()
        self._puts = self._refused = self._hits = self._misses = 0
        self._mismatches = self._quarantined = 0

    @classmethod
    def open(cls, path: Path, fingerprint: bytes, block_bytes: int, cap: int) -> "DiskStore":
        """Open the store in the folder `path`, made if need be, for blocks of one model.

        `fingerprint`: [32] names all that changes their bytes. `cap`: bytes that the folder may take
        altogether; what is more is deleted at once. Opening reads the index; after a crash the segment that
        was open, too; without an index the footers of all segments. Errors: StoreError.
        """
        if len(fingerprint) != KEY or block_bytes < 1:
            raise ValueError(f"a fingerprint of {len(fingerprint)} bytes, blocks of {block_bytes}")
        if cap < (least := 2 * (block_bytes + 8 * PAGE)):
            raise StoreError(f"{path}: {cap} bytes hold no two blocks; the least is {least}")
        folder = Folder.open(path)
        try:
            contents = read_folder(folder, fingerprint, block_bytes)
        except BaseException:
            folder.close()
            raise
        books = Books(folder, contents.index, contents.catalog)
        appender = Appender(books, fingerprint, block_bytes, cap, contents.next_seq)
        appender.shrink()
        contents.catalog.take_lost()  # nobody knew of them
        return cls(books, appender, block_bytes, cap)

    def entries(self) -> list[Entry]:
        """See BlockStore."""
        with self._books.lock:
            return self._books.catalog.entries()

    def put(self, name: Name, buffer: Buffer) -> int:
        """See BlockStore."""
        data = self._checked(name, buffer)
        if not self._calls.enter():
            return 0
        try:
            with self._books.lock:
                block = self._books.catalog.blocks.get(name.key)
            if block is None:
                size = self._appender.append(name, data)
            elif (block.row.parent, block.row.owner) == (name.parent, name.owner):
                size = block.segment.head.stride
            else:  # it would never be found
                size = 0
            with self._books.lock:
                self._puts += size > 0
                self._refused += size == 0
            return size
        finally:
            self._calls.leave()

    def get_into(self, name: Name, buffer: bytearray | memoryview) -> bool:
        """See BlockStore."""
        data = self._checked(name, buffer)
        if not self._calls.enter():
            return False
        try:
            with self._books.lock:
                block = self._books.catalog.blocks.get(name.key)
            found = block is not None and self._read(block, name, data)
            with self._books.lock:
                self._hits += found
                self._misses += not found
            return found
        finally:
            self._calls.leave()

    def forget(self, keys: list[bytes]) -> None:
        """See BlockStore."""
        books = self._books
        with books.lock:
            for key in keys:
                books.catalog.in_transit.discard(key)
                if block := books.catalog.blocks.get(key):
                    books.give_up(block)

    def lost(self) -> list[bytes]:
        """See BlockStore."""
        with self._books.lock:
            return self._books.catalog.take_lost()

    def flush(self) -> None:
        """See BlockStore."""
        if self._calls.enter():
            try:
                self._books.commit()
            finally:
                self._calls.leave()

    def stats(self) -> StoreStats:
        """See BlockStore."""
        books = self._books
        with books.lock:
            return StoreStats(
                state=books.health.state,
                reason=books.health.reason,
                blocks=len(books.catalog.blocks),
                live_bytes=books.catalog.live_bytes,
                total_bytes=books.catalog.total_bytes,
                cap=self._cap,
                puts=self._puts,
                refused_puts=self._refused,
                hits=self._hits,
                misses=self._misses,
                mismatches=self._mismatches,
                quarantined=self._quarantined,
                reclaimed=self._appender.reclaimed,
                io_errors=books.health.errors,
                owner_bytes=dict(books.catalog.owner_bytes),
            )

    def close(self) -> None:
        """See BlockStore."""
        if self._calls.close():
            self._appender.retire()
            self._books.close()

    def _checked(self, name: Name, buffer: Buffer) -> memoryview:
        data = memoryview(buffer).cast("B")
        sizes = len(name.key), len(name.parent), len(name.owner), data.nbytes
        if sizes != (KEY, KEY, OWNER, self.block_bytes) or len(name.content) > MAX_CONTENT:
            raise ValueError(f"a block of {sizes} bytes with {len(name.content)} of content")
        return data

    # ---- reading

    def _read(self, block: Block, name: Name, data: memoryview) -> bool:
        """Fill `data` with what `name` stands for, from where the block is said to be."""
        head, offset = block.segment.head, block.row.offset
        page = bytearray(head.head_bytes)
        try:
            # Opened for each read (microseconds): no number of segments runs out of file descriptors, and a
            # file may be deleted at any time.
            fd = self._books.folder.open_segment(file_name(head.seq))
            try:
                whole = read_all(fd, [page, data], offset)
            finally:
                os.close(fd)
        except OSError as error:
            self._unreadable(block, error)
            return False
        same_length = len(name.content) == head.content_bytes
        if whole and same_length and page == record_head(head, offset, name, checksum(data)):
            self._used(block)
            return True
        self._mismatched(block, page, whole, data)
        return False

    def _used(self, block: Block) -> None:
        books = self._books
        with books.lock:
            block.use = Use(block.use.hits + 1, time.time(), books.catalog.newest)
            if block.segment.sealed and books.is_known(block):
                place = block.segment.head.seq, block.row.offset
                books.changes.used[place] = block.use

    def _unreadable(self, block: Block, error: OSError) -> None:
        books = self._books
        with books.lock:
            known = books.is_known(block)
        if not known:  # its segment was reclaimed meanwhile
            return
        if not isinstance(error, FileNotFoundError):
            books.failed("reading a block", error)
            with books.lock:
                if books.is_known(block) and not is_ours(error):
                    books.give_up(block)
                    books.catalog.lose([block.row.key])
        elif books.folder.exists():
            books.drop(block.segment)
        else:
            books.turn_off("the folder was deleted")

    def _mismatched(self, block: Block, page: bytearray, whole: bool, data: memoryview) -> None:
        """What was read is not what was asked for: if it is not what was written either, its segment goes."""
        row, head = block.row, block.segment.head
        found = parse_record(head, row.offset, page) if whole else None
        intact = False
        if found is not None:
            name, payload_sum = found
            same = (name.key, name.parent, name.owner) == (row.key, row.parent, row.owner)
            intact = same and checksum(data) == payload_sum
        with self._books.lock:
            self._mismatches += 1
            damaged = not intact and self._books.is_known(block)
            self._quarantined += damaged
        if damaged:
            self._books.quarantine(block.segment)
