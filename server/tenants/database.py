"""The database of the tenants: one SQLite file (WAL) in a folder that nobody else can open.

The API process keeps one connection in a thread of its own; the command line may open another and write while
the server runs. Every act of an administrator and its line in the audit log are one transaction. A commit is
on the disk before it is answered (`synchronous=FULL`), so a key that was revoked stays revoked.
"""

import os
import resource
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from ktransformers.server.tenants.records import StoreError
from ktransformers.server.tenants.rows import encode, now
from ktransformers.server.tenants.schema import migrate

FILE = "tenants.sqlite"
BUSY_SECONDS = 5.0
_ROOM = 1 << 16
"""Bytes. A disk with less is full: so much does SQLite take at a time for its index of the log."""
_DAMAGED = "put a copy back, or move the file away to begin anew"


class Database:
    """One connection. Used by one thread at a time."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.connection = connection
        self.path = path

    @classmethod
    def open(cls, folder: Path) -> "Database":
        """Open the database in `folder`, both made if they are not there. Errors: StoreError."""
        path = folder / FILE
        try:
            _make_private(folder, path)
            connection = sqlite3.connect(
                path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        except (OSError, sqlite3.Error) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise StoreError(f"tenant store {path}: {why}; XDG_DATA_HOME says where it lies") from None
        database = cls(connection, path)
        with database.damage():
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA trusted_schema = OFF")
            (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if state != "ok":
                raise sqlite3.DatabaseError("the file is damaged")
            migrate(connection)
        return database

    @contextmanager
    def damage(self) -> Iterator[None]:
        """While it is opened: what cannot be read closes it. Raises StoreError."""
        try:
            yield
        except StoreError as error:
            self.connection.close()
            raise StoreError(f"tenant store {self.path}: {error}") from None
        except (sqlite3.Error, msgspec.MsgspecError) as error:
            self.connection.close()
            raise StoreError(explain(self.path, error)) from None

    def version(self) -> int:
        """Changes whenever another connection has committed."""
        (version,) = self.connection.execute("PRAGMA data_version").fetchone()
        return int(version)

    @contextmanager
    def act(
        self, actor: str, action: str, project: str, target: str, details: Mapping[str, object]
    ) -> Iterator[sqlite3.Connection]:
        """A transaction with its line in the audit log."""
        with self.transaction() as db:
            yield db
            db.execute(
                "INSERT INTO audit (at, actor, action, project, target, details) VALUES (?, ?, ?, ?, ?, ?)",
                (now(), actor, action, project, target, encode(details)),
            )

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """What is written within is there as a whole, or not at all."""
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield self.connection
            self.connection.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:  # some errors, as a full disk, have ended it already
                self.connection.execute("ROLLBACK")
            raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One state of the file for several queries."""
        self.connection.execute("BEGIN")
        try:
            yield self.connection
        finally:
            if self.connection.in_transaction:
                self.connection.execute("COMMIT")


def explain(path: Path, error: sqlite3.Error | msgspec.MsgspecError) -> str:
    """What is wrong with the database at `path`, and what to do, in one line. Only a file that is damaged
    is said to be: of the others nothing that was answered is lost."""
    code = getattr(error, "sqlite_errorcode", None)
    kind = None if code is None else code & 0xFF  # what is above says where it happened
    what = f"{error}; {_DAMAGED}"
    if kind == sqlite3.SQLITE_FULL or (kind == sqlite3.SQLITE_IOERR and _is_full(path.parent)):
        what = "the disk is full; make room on it and try again"
    elif kind == sqlite3.SQLITE_IOERR and (most := _size_limit(path)) is not None:
        what = f"files may have at most {most} bytes here (`ulimit -f`); raise that limit and try again"
    elif kind in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        what = f"{error}; make the file and its folder writable for this user and try again"
    elif kind in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        what = f"{error} by another process for {BUSY_SECONDS:g} s; try again when that has ended"
    elif kind in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOMEM):
        what = f"{error} ({error.sqlite_errorname}); the system's log may say why"  # type: ignore[union-attr]
    return f"tenant store {path}: {what}"


def _is_full(folder: Path) -> bool:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize < _ROOM


def _size_limit(path: Path) -> int | None:
    """What a file of this process may have, in bytes, if one of the database's is about to pass it."""
    most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    files = [path.with_name(path.name + end) for end in ("", "-wal", "-shm")]
    largest = max((file.stat().st_size for file in files if file.exists()), default=0)
    return most if most != resource.RLIM_INFINITY and largest + _ROOM > most else None


def _make_private(folder: Path, path: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = folder.stat().st_uid
    # Root acts for the owner: SQLite gives the files that it makes to the owner of the first one.
    if os.geteuid() not in (0, owner):
        raise StoreError(f"tenant store {folder}: belongs to another user")
    folder.chmod(0o700)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    path.chmod(0o600)
