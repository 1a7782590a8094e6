"""The bytes of a segment file.

    head       one page: SegmentHead
    slots      each `stride` bytes: a record head (whole pages) and the payload, padded to whole pages
    table      of the records, padded to whole pages      } the footer, there once the segment is sealed:
    trailer    one page, the last of the file             } saves reading the slots

Heads, table and trailer are covered by XXH3-128 checksums (Collet, xxHash: as fast as memory is read, and
128 bits leave no room for chance). A record's head holds the payload's checksum, the whole name, and where it
lies: segment and offset. So a record is right if its head equals, byte for byte, the one that its reader
expects for the payload found; see `record_head`. Integers are little-endian.

These checksums find damage, not forgery: whoever can write to the folder (0700) can run code as its owner.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import xxhash

from ktransformers.kvcache.stores.store import Buffer, Name

PAGE = 4096
"""Bytes: unit of alignment, so that reads could bypass the page cache."""
KEY, OWNER = 32, 16
"""Bytes of keys and fingerprints; of owners, segment ids and checksums."""

checksum = xxhash.xxh3_128_digest
"""Of a buffer: 16 bytes."""

_SEGMENT_MAGIC = b"ktkvseg\x01"  # the last byte is the version of the format
_RECORD_MAGIC = b"ktkvrec\x01"
_TRAILER_MAGIC = b"ktkvend\x01"
_SEGMENT = struct.Struct("<8sQ16s32sQQQ")
_RECORD = struct.Struct("<8sQQQ16s32s32s32s16s16s")
_ROW = struct.Struct("<Q32s32s16s")
_TRAILER = struct.Struct("<8sQQ16s16s")


def whole_pages(size: int) -> int:
    """`size` rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def _sealed(page: bytearray) -> bytes:
    """`page` with the checksum of all before them as its last bytes."""
    page[-OWNER:] = checksum(memoryview(page)[:-OWNER])
    return bytes(page)


@dataclass(frozen=True, slots=True)
class SegmentHead:
    """What all records of one segment have in common. Sizes in bytes."""

    seq: int
    """Also the file's name, so that files that were swapped are seen."""
    id: bytes
    """[16] random: the index and the records name it, so that they cannot be taken for another segment's."""
    fingerprint: bytes
    """[32] of the model."""
    content_bytes: int
    payload_bytes: int
    slots: int
    head_bytes: int = field(init=False)
    """Of a record's head."""
    stride: int = field(init=False)
    """Of a whole record: what one block takes."""

    def __post_init__(self) -> None:
        head_bytes = whole_pages(_RECORD.size + self.content_bytes + OWNER)
        object.__setattr__(self, "head_bytes", head_bytes)
        object.__setattr__(self, "stride", head_bytes + whole_pages(self.payload_bytes))

    @property
    def file_bytes(self) -> int:
        """Of the segment when all slots are used."""
        return PAGE + self.slots * self.stride + footer_bytes(self.slots)

    def slots_in(self, size: int) -> int:
        """About how many records a sealed segment of that size has, dead ones too; at least one."""
        return max(1, (size - 2 * PAGE) // (self.stride + _ROW.size))

    def offset(self, slot: int) -> int:
        """Where a slot begins."""
        return PAGE + slot * self.stride

    def holds(self, offset: int) -> bool:
        """Whether a slot begins there."""
        slot, rest = divmod(offset - PAGE, self.stride)
        return rest == 0 and 0 <= slot < self.slots

    def pack(self) -> bytes:
        """The first page of the file."""
        page = bytearray(PAGE)
        sizes = self.content_bytes, self.payload_bytes, self.slots
        _SEGMENT.pack_into(page, 0, _SEGMENT_MAGIC, self.seq, self.id, self.fingerprint, *sizes)
        return _sealed(page)

    @classmethod
    def parse(cls, page: bytes) -> "SegmentHead | None":
        """None: this is not such a page, or it is damaged."""
        if len(page) != PAGE:
            return None
        _, *fields = _SEGMENT.unpack_from(page)
        head = cls(*fields)
        return head if head.pack() == page else None


@dataclass(frozen=True, slots=True)
class Row:
    """A record as the footer and the index list it."""

    offset: int
    key: bytes
    parent: bytes
    owner: bytes


@dataclass(frozen=True, slots=True)
class FoundName:
    """The name that a record's head says it has."""

    key: bytes
    parent: bytes
    owner: bytes
    content: bytes


def record_head(segment: SegmentHead, offset: int, name: Name, payload_sum: bytes) -> bytes:
    """The head of the record of `name` at `offset`, whose payload has the checksum `payload_sum`."""
    page = bytearray(segment.head_bytes)
    where = segment.id, segment.fingerprint
    sizes = offset, segment.content_bytes, segment.payload_bytes
    _RECORD.pack_into(page, 0, _RECORD_MAGIC, *sizes, *where, name.key, name.parent, name.owner, payload_sum)
    page[_RECORD.size : _RECORD.size + segment.content_bytes] = name.content
    return _sealed(page)


def parse_record(segment: SegmentHead, offset: int, head: Buffer) -> tuple[FoundName, bytes] | None:
    """The name and the payload's checksum; None: no record of this segment begins there."""
    _, _, _, _, _, _, key, parent, owner, payload_sum = _RECORD.unpack_from(head)
    content = bytes(head[_RECORD.size : _RECORD.size + segment.content_bytes])
    name = FoundName(key, parent, owner, content)
    return (name, payload_sum) if record_head(segment, offset, name, payload_sum) == head else None


# ---- the footer


def footer_bytes(rows: int) -> int:
    """Size of the footer of so many records."""
    return whole_pages(rows * _ROW.size) + PAGE


def footer(segment: SegmentHead, rows: Sequence[Row]) -> bytes:
    """Table and trailer: the last bytes of a sealed segment."""
    table = bytearray(whole_pages(len(rows) * _ROW.size))
    for i, row in enumerate(rows):
        _ROW.pack_into(table, i * _ROW.size, row.offset, row.key, row.parent, row.owner)
    page = bytearray(PAGE)
    _TRAILER.pack_into(page, 0, _TRAILER_MAGIC, segment.seq, len(rows), segment.id, checksum(table))
    return bytes(table) + _sealed(page)


def rows_listed(segment: SegmentHead, page: bytes) -> int | None:
    """How many records the trailer says there are; None: `page` is not the trailer of this segment."""
    if len(page) != PAGE or checksum(page[:-OWNER]) != page[-OWNER:]:
        return None
    magic, seq, count, segment_id, _ = _TRAILER.unpack_from(page)
    right = magic == _TRAILER_MAGIC and seq == segment.seq and segment_id == segment.id
    return int(count) if right and count <= segment.slots else None


def parse_footer(segment: SegmentHead, data: bytes, count: int) -> list[Row] | None:
    """The `count` rows of a footer; None when it is damaged."""
    rows = [Row(*_ROW.unpack_from(data, i * _ROW.size)) for i in range(count)]
    return rows if footer(segment, rows) == data and all(segment.holds(row.offset) for row in rows) else None
