"""What lies in a folder when a store is opened, whatever happened to it since it was closed."""

import logging
import os
import time
from dataclasses import dataclass

from ktransformers.kvcache.stores.catalog import Catalog, Segment, Spare, Use
from ktransformers.kvcache.stores.folder import BAD, INDEX, Folder
from ktransformers.kvcache.stores.index import ERRORS, Changes, DiskIndex, is_damage
from ktransformers.kvcache.stores.layout import Row, SegmentHead
from ktransformers.kvcache.stores.segments import file_name, number_of, read_footer, read_head, scan, seal
from ktransformers.kvcache.stores.store import StoreError

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Contents:
    """What was found, with nothing left to be done but to commit."""

    index: DiskIndex
    catalog: Catalog
    next_seq: int


def read_folder(folder: Folder, fingerprint: bytes, block_bytes: int) -> Contents:
    """Find all blocks of one model. Errors: StoreError."""
    try:
        try:
            return _Opening(folder, fingerprint, block_bytes).run()
        except ERRORS as error:
            if not is_damage(error):
                raise
            _log.warning("disk tier: the index is made anew from the segments: %s", error)
            folder.set_index_aside()
            return _Opening(folder, fingerprint, block_bytes).run()
    except ERRORS as error:
        raise StoreError(f"{folder.path / INDEX}: {error}") from None
    except OSError as error:
        raise StoreError(f"{folder.path}: {error.strerror or error}") from None


class _Opening:
    def __init__(self, folder: Folder, fingerprint: bytes, block_bytes: int) -> None:
        self._folder = folder
        self._fingerprint, self._block_bytes = fingerprint, block_bytes
        self._catalog = Catalog()
        self._changes = Changes()
        self._now = time.time()
        folder.prepare_index()
        self._index = DiskIndex.open(folder.path / INDEX)

    def run(self) -> Contents:
        """Errors: index.ERRORS, OSError; the index is closed then."""
        try:
            known, models = self._index.segments(), self._index.models()
            indexed: set[int] = set()
            last = 0
            for name in self._folder.segment_names():
                seq = number_of(name)
                if name.endswith(BAD):
                    self._folder.remove_segment(name)
                elif seq is not None:
                    last = seq
                    self._look_at(name, seq, known, models, indexed)
            self._catalog.newest = last
            self._read_index(indexed)
            self._changes.dropped += sorted(known.keys() - self._kept(known))
            self._index.begin(self._fingerprint, self._now)
            self._index.apply(self._changes)
        except BaseException:
            self._index.abandon()
            raise
        return Contents(self._index, self._catalog, last + 1)

    def _kept(self, known: dict[int, bytes]) -> set[int]:
        """Numbers of the segments whose rows may stay in the index."""
        others = {spare.seq for spare in self._catalog.spares if spare.last_opened}
        return (self._catalog.segments.keys() | others) & known.keys()

    def _look_at(
        self, name: str, seq: int, known: dict[int, bytes], models: dict[bytes, float], indexed: set[int]
    ) -> None:
        """Enter one segment; what cannot be read is a spare file."""
        size = 0
        try:
            fd = self._folder.open_segment(name, write=True)
            try:
                size = os.fstat(fd).st_size
                head = read_head(fd, seq)
                if head is None:
                    self._folder.remove_segment(name)
                elif head.fingerprint != self._fingerprint or head.payload_bytes != self._block_bytes:
                    last = models.get(head.fingerprint, 1.0)
                    self._catalog.set_aside(Spare(seq, name, size, last))
                elif known.get(seq) == head.id:
                    indexed.add(seq)
                    self._catalog.open_segment(Segment(head, size, True))
                else:
                    self._recover(fd, name, head, size)
            finally:
                os.close(fd)
        except OSError as error:
            _log.warning("disk tier: %s: %s", name, error.strerror or error)
            self._catalog.set_aside(Spare(seq, name, size, 0.0))

    def _recover(self, fd: int, name: str, head: SegmentHead, size: int) -> None:
        """A segment that the index lacks: by its footer, or by reading it all and sealing what is whole."""
        rows = read_footer(fd, head)
        if rows is None:
            rows = scan(fd, head)
            size = seal(fd, head, rows) if rows else size
        if not rows:
            self._folder.remove_segment(name)
            return
        segment = Segment(head, size, True)
        self._catalog.open_segment(segment)
        for row in rows:
            self._catalog.add(segment, row, Use(0, self._now, head.seq))
        live = [(block.row, block.use) for block in segment.blocks.values()]
        self._changes.sealed.append((head, live))

    def _read_index(self, indexed: set[int]) -> None:
        """Enter the blocks of the segments that the index is right about; remove those that have none."""
        for seq, row, use in self._index.blocks(self._fingerprint):
            segment = self._catalog.segments.get(seq)
            if segment is not None and seq in indexed and _lies_in(segment, row):
                self._catalog.add(segment, row, use)
        for seq in indexed:
            segment = self._catalog.segments[seq]
            if not segment.blocks:
                self._catalog.close_segment(segment)
                self._folder.remove_segment(file_name(seq))


def _lies_in(segment: Segment, row: Row) -> bool:
    return segment.head.holds(row.offset) and row.offset + segment.head.stride <= segment.size
