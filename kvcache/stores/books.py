"""What the parts of a disk store share: the folder, what is known of it, and how things are given up."""

import logging
import threading

from ktransformers.kvcache.stores.catalog import Block, Catalog, Segment, Spare
from ktransformers.kvcache.stores.folder import BAD, GOOD, Folder
from ktransformers.kvcache.stores.health import Health
from ktransformers.kvcache.stores.index import ERRORS, Changes, DiskIndex, is_damage
from ktransformers.kvcache.stores.segments import file_name

_log = logging.getLogger(__name__)


class Books:
    """Who touches `catalog`, `changes` or `health` holds `lock`: for microseconds, and never during I/O.

    The methods take the lock themselves, but for `give_up`.
    """

    def __init__(self, folder: Folder, index: DiskIndex, catalog: Catalog) -> None:
        self.lock = threading.Lock()
        self.folder = folder
        self.catalog = catalog
        self.changes = Changes()
        self.health = Health()
        self._index = index
        self._index_broken = False
        self._committing = threading.Lock()  # taken before `lock`

    def is_known(self, block: Block) -> bool:
        """Whether it can still be found. (Locked.)"""
        return self.catalog.blocks.get(block.row.key) is block

    def holds(self, segment: Segment) -> bool:
        """Whether it is still there. (Locked.)"""
        return self.catalog.segments.get(segment.head.seq) is segment

    def give_up(self, block: Block) -> None:
        """One block cannot be found any more. (Locked.)"""
        self.catalog.remove(block)
        if block.segment.sealed:
            place = block.segment.head.seq, block.row.offset
            self.changes.used.pop(place, None)
            self.changes.forgotten.append(place)

    def drop(self, segment: Segment, keep: frozenset[bytes] = frozenset()) -> None:
        """Delete a segment; its blocks are lost, but for those in `keep`, which are in transit then."""
        if self._take_out(segment, keep):
            self.delete(file_name(segment.head.seq))

    def quarantine(self, segment: Segment) -> None:
        """Take a damaged segment out; its file stays until space is needed or the store is opened again."""
        if not self._take_out(segment, frozenset()):
            return
        name = file_name(segment.head.seq)
        _log.warning("disk tier: segment %s is damaged and was taken out", name)
        bad = name.removesuffix(GOOD) + BAD
        try:
            self.folder.rename_segment(name, bad)
        except OSError as error:
            self.failed("renaming a segment", error)
            return
        with self.lock:
            self.catalog.set_aside(Spare(segment.head.seq, bad, segment.size, 0.0))

    def _take_out(self, segment: Segment, keep: frozenset[bytes]) -> bool:
        """False: somebody else has done it."""
        with self.lock:
            if not self.holds(segment):
                return False
            keys = set(self.catalog.close_segment(segment))
            self.catalog.lose(keys - keep)
            self.catalog.in_transit |= keys & keep
            self.changes.dropped.append(segment.head.seq)
            return True

    def delete_spare(self, spare: Spare) -> None:
        """Delete a file that was taken from the spares."""
        with self.lock:
            self.changes.dropped.append(spare.seq)
        self.delete(spare.name)

    def delete(self, name: str) -> None:
        """Remove a file that nothing refers to."""
        try:
            self.folder.remove_segment(name)
        except FileNotFoundError:
            return  # somebody else did: it is gone, which was wanted
        except OSError as error:
            self.failed("deleting a segment", error)

    def failed(self, doing: str, error: Exception) -> None:
        """Count an error of the medium; after too many the store is off."""
        with self.lock:
            self.health.failed(doing, error)
            if self.health.state == "off":
                self._lose_all()

    def turn_off(self, reason: str) -> None:
        """For good: every block is lost."""
        with self.lock:
            self.health.turn_off(reason)
            self._lose_all()

    def _lose_all(self) -> None:
        self.catalog.lose(self.catalog.in_transit)
        self.catalog.in_transit.clear()
        for segment in list(self.catalog.segments.values()):
            self.catalog.lose(self.catalog.close_segment(segment))
        self.changes = Changes()

    def commit(self) -> None:
        """Delete the segments in which nothing is left, and write to the index what has changed."""
        with self._committing:
            with self.lock:
                empty = [s for s in self.catalog.segments.values() if s.sealed and not s.blocks]
            for segment in empty:
                self.drop(segment)
            with self.lock:
                changes, self.changes = self.changes, Changes()
            if not changes or self._index_broken:
                return
            try:
                self._index.apply(changes)
            except ERRORS as error:
                # The next opening finds in the segments what the index lacks; what it has too much is a miss.
                self._index_failed("writing the index", error)

    def close(self) -> None:
        """Commit, close the index and give up the folder."""
        self.commit()
        with self.lock:
            off = self.health.state == "off"
        with self._committing:
            try:
                if off or self._index_broken:
                    self._index.abandon()
                else:
                    self._index.close()
            except ERRORS as error:
                self._index_failed("closing the index", error)
        self.folder.close()

    def _index_failed(self, doing: str, error: Exception) -> None:
        """A damaged index is no reason to stop: it is left as it is, and made anew by the next opening."""
        if is_damage(error):
            self._index_broken = True
            _log.warning("disk tier: %s: %s", doing, error)
        else:
            self.failed(doing, error)
