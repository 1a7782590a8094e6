"""Looking at a disk store from outside: what is in a folder, whether it is whole, and away with it.

For people at a terminal (`ktransformers cache`), so it goes over all models and says what it finds.
"""

import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ktransformers.kvcache.stores.folder import INDEX, LOCK, SEGMENTS, Folder, explained, open_private
from ktransformers.kvcache.stores.index import ERRORS, DiskIndex
from ktransformers.kvcache.stores.layout import Row, SegmentHead
from ktransformers.kvcache.stores.segments import (
    number_of,
    read_footer,
    read_head,
    read_record,
    scan,
)


@dataclass(slots=True)
class ModelUse:
    """What one model has in the folder."""

    fingerprint: bytes
    segments: int = 0
    size: int = 0
    """Bytes of its files."""
    block_bytes: int = 0
    blocks: int = 0
    """That the index knows: not those of the segment that is being written."""
    hits: int = 0
    owners: int = 0
    last_use: float = 0.0
    """Seconds since the epoch."""


@dataclass(slots=True)
class Survey:
    """What a look at a folder says."""

    in_use: bool
    """By a server, which goes on writing."""
    models: list[ModelUse]
    other_bytes: int
    """Of files that are no segments: index, damaged segments."""


@dataclass(slots=True)
class Verdict:
    """What reading all of it says."""

    records: int = 0
    """That are whole."""
    size: int = 0
    """Bytes that were read."""
    problems: list[str] = field(default_factory=list)
    """A line for each file that is not what it should be."""


def survey(path: Path) -> Survey:
    """Look without disturbing a server that runs. Errors: StoreError."""
    models: dict[bytes, ModelUse] = {}
    with explained(path), closing_fd(open_private(path)) as fd:
        in_use = _is_locked(fd)
        other = sum(os.stat(name, dir_fd=fd, follow_symlinks=False).st_size for name in os.listdir(fd))
        if SEGMENTS in os.listdir(fd):
            for entry in os.scandir(path / SEGMENTS):
                size = entry.stat(follow_symlinks=False).st_size
                head = _head(path, entry.name)
                if head is None:
                    other += size
                    continue
                model = models.setdefault(head.fingerprint, ModelUse(head.fingerprint))
                model.segments += 1
                model.size += size
                model.block_bytes = head.payload_bytes
        if INDEX in os.listdir(fd):
            _count_blocks(path / INDEX, models)
    return Survey(in_use, sorted(models.values(), key=lambda model: -model.size), other)


@contextmanager
def closing_fd(fd: int) -> Iterator[int]:
    """Closes it at the end."""
    try:
        yield fd
    finally:
        os.close(fd)


def _is_locked(folder: int) -> bool:
    try:
        lock = os.open(LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return False
    with closing_fd(lock):
        try:
            # Shared, so that two who look do not take each other for a server.
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _head(path: Path, name: str) -> SegmentHead | None:
    seq = number_of(name)
    if seq is None:
        return None
    try:
        fd = os.open(path / SEGMENTS / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:  # reclaimed while we look
        return None
    with closing_fd(fd):
        return read_head(fd, seq)


def _count_blocks(index: Path, models: dict[bytes, ModelUse]) -> None:
    """Enter what the index says; a damaged one says nothing."""
    try:
        with closing(sqlite3.connect(index, timeout=5.0)) as db:
            db.execute("PRAGMA query_only = ON")
            found = db.execute(
                "SELECT fingerprint, count(*), sum(hits), count(DISTINCT owner), max(last_use) "
                "FROM segment JOIN block ON block.segment = seq GROUP BY fingerprint"
            ).fetchall()
    except ERRORS:
        return
    for fingerprint, *counts in found:
        if model := models.get(fingerprint):
            model.blocks, model.hits, model.owners, model.last_use = counts


def verify(path: Path, progress: Callable[[int, int], None]) -> Verdict:
    """Read every record of every model. `progress` is told (bytes done, bytes in all). Errors: StoreError.

    Changes nothing but what opening changes; needs the lock.
    """
    verdict = Verdict()
    with explained(path), closing(Folder.open(path)) as folder:
        names = [name for name in folder.segment_names() if number_of(name) is not None]
        sizes = [_size(folder, name) for name in names]
        listed = _listed(path / INDEX, verdict)
        for name, size in zip(names, sizes, strict=True):
            _verify_segment(folder, name, listed, verdict)
            verdict.size += size
            progress(verdict.size, sum(sizes))
    return verdict


def _size(folder: Folder, name: str) -> int:
    with closing_fd(folder.open_segment(name)) as fd:
        return os.fstat(fd).st_size


def _listed(path: Path, verdict: Verdict) -> dict[int, tuple[bytes, set[Row]]]:
    """(id, rows) of the segments that the index knows."""
    if not path.exists():
        return {}
    try:
        index = DiskIndex.open(path)
        try:
            rows: dict[int, set[Row]] = {}
            for fingerprint in index.models():
                for seq, row, _ in index.blocks(fingerprint):
                    rows.setdefault(seq, set()).add(row)
            return {seq: (id_, rows.get(seq, set())) for seq, id_ in index.segments().items()}
        finally:
            index.abandon()
    except ERRORS as error:
        verdict.problems.append(f"{INDEX}: {error}; it will be made anew from the segments")
        return {}


def _verify_segment(
    folder: Folder, name: str, listed: dict[int, tuple[bytes, set[Row]]], verdict: Verdict
) -> None:
    seq = number_of(name) or 0
    with closing_fd(folder.open_segment(name)) as fd:
        head = read_head(fd, seq)
        if head is None:
            verdict.problems.append(f"{name}: its head is damaged")
            return
        rows = read_footer(fd, head)
        if rows is None:
            rows = scan(fd, head)
            verdict.records += len(rows)
            if seq in listed:
                verdict.problems.append(f"{name}: its footer is damaged; {len(rows)} records are whole")
            return
        payload = bytearray(head.payload_bytes)
        damaged = 0
        for row in rows:
            found = read_record(fd, head, row.offset, payload)
            same = found is not None and Row(row.offset, found.key, found.parent, found.owner) == row
            damaged += not same
        verdict.records += len(rows) - damaged
        if damaged:
            verdict.problems.append(f"{name}: {damaged} of {len(rows)} records are damaged")
        id_, indexed = listed.get(seq, (b"", set()))
        if id_ == head.id and (astray := len(indexed - set(rows))):
            verdict.problems.append(f"{INDEX}: {astray} rows of {name} are not what is there")


def clear(path: Path) -> int:
    """Delete all that a store made there; the bytes that segments took. Errors: StoreError, when in use."""
    with explained(path), closing(Folder.open(path)) as folder:
        freed = sum(found.size for found in survey(path).models)
        folder.clear()
        return freed
