"""The writing side of a disk store: the open segment, sealing it, and room for the next one."""

import os
import threading
import time
from dataclasses import dataclass, replace

from ktransformers.kvcache.stores.books import Books
from ktransformers.kvcache.stores.catalog import Block, Segment, Use
from ktransformers.kvcache.stores.health import no_space
from ktransformers.kvcache.stores.layout import (
    PAGE,
    FoundName,
    Row,
    SegmentHead,
    checksum,
    footer_bytes,
    record_head,
)
from ktransformers.kvcache.stores.segments import create, file_name, read_record, seal, write_all
from ktransformers.kvcache.stores.store import Name

SMALLEST, LARGEST = 64 << 20, 256 << 20
"""Bytes of a segment: a 64th of what the store may take, between these; of a small store an eighth."""
CARRIED = 10
"""The best blocks of what is reclaimed are written again, up to one part in so many of the next segment."""
RESERVE, RESERVE_BYTES, SMALL_RESERVE = 0.05, 2 << 30, 0.10
"""Left free of the filesystem: the first part, or those bytes if they are more and at most the second."""


@dataclass(eq=False, slots=True)
class _Writer:
    """The open segment, or one that is full while its last records are being written."""

    segment: Segment
    fd: int
    next: int = 0
    """Slot."""
    in_flight: int = 0
    full: bool = False

    def take(self) -> int:
        """The offset of a slot, which is the caller's to write."""
        offset = self.segment.head.offset(self.next)
        self.next += 1
        self.in_flight += 1
        self.full = self.next == self.segment.head.slots
        return offset


@dataclass(frozen=True, slots=True)
class _Carried:
    """A block between the segment that held it and the one that will."""

    name: FoundName
    payload: bytearray
    use: Use


def reserve(filesystem: int) -> int:
    """Bytes of a filesystem of that size that are left to others."""
    return max(int(filesystem * RESERVE), min(RESERVE_BYTES, int(filesystem * SMALL_RESERVE)))


def slots(cap: int, stride: int) -> int:
    """Records of one segment, in a store that may take `cap` bytes; at least one."""
    size = min(LARGEST, max(cap // 64, min(SMALLEST, cap // 8)))
    count = max(1, (size - 3 * PAGE) // stride)
    while count > 1 and PAGE + count * stride + footer_bytes(count) > size:
        count -= 1
    return count


class Appender:
    """Puts records behind one another. Any number of threads; one at a time makes the next segment."""

    def __init__(self, books: Books, fingerprint: bytes, block_bytes: int, cap: int, next_seq: int) -> None:
        self._books, self._fingerprint, self._block_bytes = books, fingerprint, block_bytes
        self._cap, self._next_seq = cap, next_seq
        self._writer: _Writer | None = None
        self._rolling = threading.Lock()  # taken before any other
        self.reclaimed = 0
        """Files deleted to make room."""

    def append(self, name: Name, data: memoryview) -> int:
        """Write a record and enter it. The bytes it takes; 0: it could not be stored."""
        claimed = self._claim(len(name.content))
        if claimed is None:
            return 0
        writer, offset = claimed
        written = False
        try:
            written = self._write(writer, offset, name, data, None)
        except OSError as error:
            self._books.failed("writing a block", error)
        finally:
            self._wrote(writer)
        return writer.segment.head.stride if written else 0

    def _write(self, writer: _Writer, offset: int, name: Name, data: memoryview, use: Use | None) -> bool:
        """Whether the block can be found now. Without `use` it is new, else in transit. Errors: OSError."""
        head = writer.segment.head
        write_all(writer.fd, [record_head(head, offset, name, checksum(data)), data], offset)
        row = Row(offset, bytes(name.key), bytes(name.parent), bytes(name.owner))
        with self._books.lock:
            if not self._books.holds(writer.segment):  # given up meanwhile, and this block with it
                return False
            catalog = self._books.catalog
            if use is None:
                use = Use(0, time.time(), catalog.newest)
            elif row.key not in catalog.in_transit:  # forgotten meanwhile
                return False
            catalog.in_transit.discard(row.key)
            catalog.add(writer.segment, row, use)
            return True

    def _wrote(self, writer: _Writer) -> None:
        """A slot is done with; the last one of a full segment ends it."""
        with self._books.lock:
            writer.in_flight -= 1
            ended = writer.full and not writer.in_flight
        if ended:
            self._end(writer)

    def _claim(self, content_bytes: int) -> tuple[_Writer, int] | None:
        """A slot of the open segment, or of a new one. None: nothing can be stored now."""
        if claimed := self._take_slot(content_bytes):
            return claimed
        with self._rolling:
            if claimed := self._take_slot(content_bytes):
                return claimed
            with self._books.lock:
                if self._books.health.state != "on":
                    return None
            self.retire()  # it is for names of another length, or was given up
            return self._roll(content_bytes)

    def _take_slot(self, content_bytes: int) -> tuple[_Writer, int] | None:
        with self._books.lock:
            writer = self._writer
            if writer is None or self._books.health.state != "on" or not self._books.holds(writer.segment):
                return None
            if writer.segment.head.content_bytes != content_bytes:
                return None
            offset = writer.take()
            if writer.full:
                self._writer = None
            return writer, offset

    def retire(self) -> None:
        """Nothing more is written to the open segment."""
        with self._books.lock:
            writer, self._writer = self._writer, None
            if writer is None:
                return
            writer.full = True
            ended = not writer.in_flight
        if ended:
            self._end(writer)

    def _end(self, writer: _Writer) -> None:
        """All that will ever be written to a segment has been: seal it, or remove it if that is nothing."""
        books, segment = self._books, writer.segment
        with books.lock:
            rows = sorted((block.row for block in segment.blocks.values()), key=lambda row: row.offset)
        size = 0
        try:
            if rows:
                size = seal(writer.fd, segment.head, rows)
        except OSError as error:
            # It can be read, or else that is noticed then; the next opening finds a segment to be recovered.
            books.failed("sealing a segment", error)
        finally:
            os.close(writer.fd)
        if not rows:
            books.drop(segment)
            return
        with books.lock:
            if not books.holds(segment):
                return
            segment.sealed = True
            if size:
                books.catalog.resize(segment, size)
                live = [(block.row, block.use) for block in segment.blocks.values()]
                books.changes.sealed.append((segment.head, live))
        books.commit()

    # ---- the next segment

    def _roll(self, content_bytes: int) -> tuple[_Writer, int] | None:
        head = SegmentHead(
            self._next_seq, os.urandom(16), self._fingerprint, content_bytes, self._block_bytes, 1
        )
        head = replace(head, slots=slots(self._cap, head.stride))
        self._next_seq += 1
        carried: list[_Carried] = []
        fd = self._create(head, carried)
        if fd is None:
            for each in carried:
                self._lose(each)
            return None
        writer = _Writer(Segment(head, head.file_bytes, sealed=False), fd)
        with self._books.lock:
            self._books.catalog.open_segment(writer.segment)
        for each in carried:
            self._carry(writer, each)
        with self._books.lock:
            offset = writer.take()
            self._writer = None if writer.full else writer
        return writer, offset

    def _carry(self, writer: _Writer, each: _Carried) -> None:
        """Write a block of a reclaimed segment again; the last slot is left to who asked for the segment."""
        kept = False
        if writer.next < writer.segment.head.slots - 1:
            try:
                offset = writer.take()
                kept = self._write(writer, offset, each.name, memoryview(each.payload), each.use)
            except OSError as error:
                self._books.failed("writing a block", error)
            finally:
                self._wrote(writer)
        if not kept:
            self._lose(each)

    def _lose(self, each: _Carried) -> None:
        with self._books.lock:
            if each.name.key in self._books.catalog.in_transit:
                self._books.catalog.in_transit.discard(each.name.key)
                self._books.catalog.lose([each.name.key])

    def _create(self, head: SegmentHead, carried: list[_Carried]) -> int | None:
        """The file of a new segment, open; others make room for it. None: no room, or an error."""
        retried = False
        while True:
            try:
                lack = self._lack(head.file_bytes)
                if not lack:
                    return create(self._books.folder, head)
            except FileNotFoundError:
                self._books.turn_off("the folder was deleted")
                return None
            except OSError as error:
                # Others fill the filesystem, too; a disk that stays full is no reason to delete all we have.
                if retried or not no_space(error) or not self.reclaim(carried, head):
                    self._books.failed("making a segment", error)
                    return None
                retried = True
                continue
            if not self.reclaim(carried, head):
                with self._books.lock:
                    self._books.health.pause(lack)
                return None

    def _lack(self, need: int) -> str:
        """Why `need` more bytes are too many; "" if they are not. Errors: OSError."""
        with self._books.lock:
            total = self._books.catalog.total_bytes
        if total + need > self._cap:
            return f"{total} of {self._cap} bytes are taken"
        free, size = self._books.folder.free_bytes()
        if free - need < reserve(size):
            return f"{free} bytes of the filesystem are free, of which {reserve(size)} are for others"
        return ""

    def shrink(self) -> None:
        """Delete what the store holds above its cap (which was higher once)."""
        while True:
            with self._books.lock:
                total = self._books.catalog.total_bytes
            if total <= self._cap or not self.reclaim([], None):
                return

    def reclaim(self, carried: list[_Carried], into: SegmentHead | None) -> bool:
        """Delete the file that is missed least; False when there is none.

        Its best blocks are added to `carried`, to be written to the segment `into`, as far as they go there.
        """
        books = self._books
        with books.lock:
            spare = books.catalog.take_spare()
            candidates = books.catalog.candidates()
        if spare is not None:
            books.delete_spare(spare)
            self.reclaimed += 1
            return True
        if not candidates:
            return False
        segment, blocks = min(candidates, key=lambda each: self._worth(*each))
        kept = []
        if into is not None and segment.head.content_bytes == into.content_bytes:
            room = min(max(1, into.slots // CARRIED), into.slots - 1) - len(carried)
            kept = self._read_best(segment, blocks, room)
        books.drop(segment, keep=frozenset(each.name.key for each in kept))
        carried += kept
        self.reclaimed += 1
        return True

    def _worth(self, segment: Segment, blocks: list[Block]) -> float:
        """What losing them would cost for each record of the segment, live or dead."""
        return sum(map(self._books.catalog.worth, blocks)) / segment.head.slots_in(segment.size)

    def _read_best(self, segment: Segment, blocks: list[Block], room: int) -> list[_Carried]:
        """At most `room` blocks of a segment: all if they are no more, else the best of those ever read."""
        if len(blocks) > room:
            hit = [block for block in blocks if block.use.hits]
            blocks = sorted(hit, key=self._books.catalog.worth, reverse=True)[:room]
        kept = []
        try:
            fd = self._books.folder.open_segment(file_name(segment.head.seq))
            try:
                for block in blocks:
                    payload = bytearray(segment.head.payload_bytes)
                    name = read_record(fd, segment.head, block.row.offset, payload)
                    if name is not None and name.key == block.row.key:
                        kept.append(_Carried(name, payload, block.use))
            finally:
                os.close(fd)
        except FileNotFoundError:
            return []  # damaged or emptied meanwhile, and so gone
        except OSError as error:
            self._books.failed("reading a block", error)
        return kept
