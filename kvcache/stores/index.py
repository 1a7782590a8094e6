"""The index of a disk store in SQLite: which block lies where in the sealed segments.

It saves reading footers at start, and remembers hits; nothing depends on it. What it says is compared with
the segments' heads at start and with each record when it is read, and whatever it lacks is found in the
segments. So no commit waits for the disk (WAL, synchronous=NORMAL), and a damaged index is thrown away.
"""

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ktransformers.kvcache.stores.catalog import Use
from ktransformers.kvcache.stores.layout import KEY, OWNER, Row, SegmentHead

_APPLICATION = 0x6B746B76  # "ktkv"
_VERSION = 1
_SCHEMA = """
CREATE TABLE model (
    fingerprint BLOB PRIMARY KEY,
    opened REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE segment (
    seq INTEGER PRIMARY KEY,
    id BLOB NOT NULL,
    fingerprint BLOB NOT NULL
) STRICT;
CREATE TABLE block (
    segment INTEGER NOT NULL,
    offset INTEGER NOT NULL,
    key BLOB NOT NULL,
    parent BLOB NOT NULL,
    owner BLOB NOT NULL,
    hits INTEGER NOT NULL,
    last_use REAL NOT NULL,
    turn INTEGER NOT NULL,
    PRIMARY KEY (segment, offset)
) STRICT, WITHOUT ROWID;
CREATE TABLE closed (yes INTEGER NOT NULL) STRICT;
INSERT INTO closed VALUES (1);
"""

ERRORS = (sqlite3.Error, UnicodeDecodeError)
"""What methods raise: a damaged schema can turn up in an error's text, which is then no UTF-8."""
_NOT_DAMAGE = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
    }
)

Place = tuple[int, int]
"""(segment, offset)"""


@dataclass(slots=True)
class Changes:
    """What one transaction will write, in this order."""

    sealed: list[tuple[SegmentHead, list[tuple[Row, Use]]]] = field(default_factory=list)
    """Each with its live rows."""
    used: dict[Place, Use] = field(default_factory=dict)
    forgotten: list[Place] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    """Segments."""

    def __bool__(self) -> bool:
        return bool(self.sealed or self.used or self.forgotten or self.dropped)


def is_damage(error: Exception) -> bool:
    """Whether one of ERRORS speaks of the file's content rather than of the system."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF not in _NOT_DAMAGE


class DiskIndex:
    """One connection, used by one thread at a time. Every method raises ERRORS for what goes wrong."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    @classmethod
    def open(cls, path: Path) -> "DiskIndex":
        """Open it, made if the file is empty. Damage is also what somebody else made."""
        db = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
        try:
            _prepare(db)
        except BaseException:
            db.close()
            raise
        return cls(db)

    def segments(self) -> dict[int, bytes]:
        """Id by number of every segment that it knows."""
        found = self._db.execute("SELECT seq, id FROM segment")
        return {seq: segment_id for seq, segment_id in found if _are((seq, segment_id), int, bytes)}

    def blocks(self, fingerprint: bytes) -> Iterator[tuple[int, Row, Use]]:
        """(segment, row, use) of the blocks of one model, in the order they were written."""
        found = self._db.execute(
            "SELECT block.segment, offset, key, parent, owner, hits, last_use, turn FROM segment "
            "JOIN block ON block.segment = seq WHERE fingerprint = ? ORDER BY seq, offset",
            (fingerprint,),
        )
        for segment, offset, key, parent, owner, *use in found:
            row = segment, offset, key, parent, owner, *use
            right = _are(row, int, int, bytes, bytes, bytes, int, float, int)
            if not right or (len(key), len(parent), len(owner)) != (KEY, KEY, OWNER):
                raise sqlite3.DatabaseError("a row of the index is damaged")
            yield segment, Row(offset, key, parent, owner), Use(*use)

    def models(self) -> dict[bytes, float]:
        """When each model was last opened, by fingerprint."""
        found = self._db.execute("SELECT fingerprint, opened FROM model")
        return {model: opened for model, opened in found if _are((model, opened), bytes, float)}

    def begin(self, fingerprint: bytes, now: float) -> None:
        """A model is opened: from here to `close` the index counts as not closed properly."""
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO model VALUES (?, ?)", (fingerprint, now))
            self._db.execute("UPDATE closed SET yes = 0")

    def apply(self, changes: Changes) -> None:
        """Write all of it, or nothing."""
        db = self._db
        with self._transaction():
            for head, rows in changes.sealed:
                self._forget_segment(head.seq)
                segment = head.seq, head.id, head.fingerprint
                db.execute("INSERT INTO segment VALUES (?, ?, ?)", segment)
                db.executemany(
                    "INSERT INTO block VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    ((head.seq, r.offset, r.key, r.parent, r.owner, *_columns(use)) for r, use in rows),
                )
            db.executemany(
                "UPDATE block SET hits = ?, last_use = ?, turn = ? WHERE segment = ? AND offset = ?",
                ((*_columns(use), *place) for place, use in changes.used.items()),
            )
            db.executemany("DELETE FROM block WHERE segment = ? AND offset = ?", changes.forgotten)
            self._forget_segments(changes.dropped)

    def close(self) -> None:
        """Mark it closed, and leave one file."""
        try:
            self._db.execute("UPDATE closed SET yes = 1")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            self._db.close()

    def abandon(self) -> None:
        """Close without a mark: it will be checked when it is opened again."""
        self._db.close()

    def _forget_segments(self, segments: Iterable[int]) -> None:
        for seq in segments:
            self._forget_segment(seq)

    def _forget_segment(self, seq: int) -> None:
        self._db.execute("DELETE FROM block WHERE segment = ?", (seq,))
        self._db.execute("DELETE FROM segment WHERE seq = ?", (seq,))

    def _transaction(self) -> sqlite3.Connection:
        """A context: commits at its end, rolls back on an error."""
        self._db.execute("BEGIN IMMEDIATE")
        return self._db


def _columns(use: Use) -> tuple[int, float, int]:
    return use.hits, use.last_use, use.turn


def _are(row: tuple[object, ...], *types: type) -> bool:
    """Whether SQLite gave back what was put in: of a damaged page it may be anything."""
    return [type(value) for value in row] == list(types)


def _prepare(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute("PRAGMA trusted_schema = OFF")
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if (application, version, tables) == (0, 0, 0):
        # One transaction: who is killed here leaves an empty file or a whole schema.
        pragmas = f"PRAGMA application_id = {_APPLICATION}; PRAGMA user_version = {_VERSION};"
        db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} {pragmas} COMMIT;")
    elif (application, version) != (_APPLICATION, _VERSION):
        raise sqlite3.DatabaseError("not an index of this version")
    if db.execute("SELECT yes FROM closed").fetchall() != [(1,)]:
        (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
