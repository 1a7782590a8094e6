"""Segment files: made, sealed, and read again after whatever has happened to them."""

import errno
import os
from collections.abc import Sequence
from contextlib import suppress

from ktransformers.kvcache.stores.folder import GOOD, Folder
from ktransformers.kvcache.stores.layout import (
    PAGE,
    FoundName,
    Row,
    SegmentHead,
    checksum,
    footer,
    footer_bytes,
    parse_footer,
    parse_record,
    rows_listed,
)
from ktransformers.kvcache.stores.store import Buffer


def file_name(seq: int) -> str:
    """Of the segment with that number; names sort as numbers do."""
    return f"{seq:010d}{GOOD}"


def number_of(name: str) -> int | None:
    """The inverse; None for other names."""
    stem = name.removesuffix(GOOD)
    return int(stem) if stem.isascii() and stem.isdecimal() and name == file_name(int(stem)) else None


def write_all(fd: int, buffers: Sequence[Buffer], offset: int) -> None:
    """All bytes of `buffers`, one after the other. Errors: OSError."""
    left = [memoryview(buffer) for buffer in buffers]
    while left:
        done = os.pwritev(fd, left, offset)
        if not done:
            raise OSError(errno.EIO, "nothing could be written")
        offset += done
        left = _after(left, done)


def read_all(fd: int, buffers: Sequence[bytearray | memoryview], offset: int) -> bool:
    """Fill `buffers`, one after the other; False when the file ends before. Errors: OSError."""
    left = [memoryview(buffer) for buffer in buffers]
    while left:
        done = os.preadv(fd, left, offset)
        if not done:
            return False
        offset += done
        left = _after(left, done)
    return True


def _after(buffers: list[memoryview], done: int) -> list[memoryview]:
    """What is left of them after their first `done` bytes."""
    while buffers and done >= buffers[0].nbytes:
        done -= buffers[0].nbytes
        buffers = buffers[1:]
    return [buffers[0][done:], *buffers[1:]] if done else buffers


def create(folder: Folder, head: SegmentHead) -> int:
    """A new segment with all its space, open for writing. Errors: OSError; nothing is left of it then."""
    name = file_name(head.seq)
    fd = folder.create_segment(name)
    try:
        os.posix_fallocate(fd, 0, head.file_bytes)
        write_all(fd, [head.pack()], 0)
    except BaseException:
        os.close(fd)
        folder.remove_segment(name)
        raise
    return fd


def seal(fd: int, head: SegmentHead, rows: Sequence[Row]) -> int:
    """End a segment with a footer of `rows`, and wait for the medium. The file's size. Errors: OSError."""
    end = max((row.offset for row in rows), default=PAGE - head.stride) + head.stride
    foot = footer(head, rows)
    write_all(fd, [foot], end)
    os.ftruncate(fd, end + len(foot))
    os.fdatasync(fd)
    with suppress(
        OSError
    ):  # advice: what was just written is in a tier above, leave the page cache to others
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return end + len(foot)


def read_head(fd: int, seq: int) -> SegmentHead | None:
    """None: this is not the segment `seq`, or its head is damaged. Errors: OSError."""
    head = SegmentHead.parse(os.pread(fd, PAGE, 0))
    return head if head is not None and head.seq == seq else None


def read_footer(fd: int, head: SegmentHead) -> list[Row] | None:
    """The rows of a sealed segment; None: it is not sealed, or the footer is damaged. Errors: OSError."""
    size = os.fstat(fd).st_size
    count = rows_listed(head, os.pread(fd, PAGE, max(0, size - PAGE)))
    if count is None:
        return None
    length = footer_bytes(count)
    return parse_footer(head, os.pread(fd, length, max(0, size - length)), count)


def read_record(fd: int, head: SegmentHead, offset: int, payload: bytearray) -> FoundName | None:
    """The record at `offset`, checked, with its bytes in `payload`; None: there is none. Errors: OSError."""
    page = bytearray(head.head_bytes)
    if not read_all(fd, [page], offset):
        return None
    found = parse_record(head, offset, page)
    if found is None or not read_all(fd, [payload], offset + head.head_bytes):
        return None
    name, payload_sum = found
    return name if checksum(payload) == payload_sum else None


def scan(fd: int, head: SegmentHead) -> list[Row]:
    """Every record that is whole, by reading all slots that were written to. Errors: OSError."""
    payload = bytearray(head.payload_bytes)
    rows = []
    slot = 0
    while (slot := _next_written(fd, head, slot)) < head.slots:
        offset = head.offset(slot)
        name = read_record(fd, head, offset, payload)
        if name is not None:
            rows.append(Row(offset, name.key, name.parent, name.owner))
        slot += 1
    return rows


def _next_written(fd: int, head: SegmentHead, slot: int) -> int:
    """The first slot from `slot` on that may hold anything; `slots` when there is none.

    What is only allocated counts as a hole, where the filesystem knows (others say that all is data).
    """
    try:
        data = os.lseek(fd, head.offset(slot), os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:  # no data from there on
            return head.slots
        raise
    return max(slot, (data - PAGE) // head.stride)
