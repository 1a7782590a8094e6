"""The folder of a disk store: private to one user, locked by one process.

    LOCK            flock; who holds it owns everything else
    META.json       version of the format
    index.sqlite    see index.py
    seg/N.kvs       see layout.py; N.bad is one that was taken out

Files are opened relative to the folder, never through a link, and readable by their owner only.
"""

import fcntl
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ktransformers.kvcache.stores.store import StoreError

FORMAT = 1
INDEX = "index.sqlite"
LOCK = "LOCK"
META = "META.json"
SEGMENTS = "seg"
GOOD, BAD = ".kvs", ".bad"
_META_MAX = 4096

_OURS = frozenset(
    {LOCK, META, META + ".new", SEGMENTS, INDEX, INDEX + "-wal", INDEX + "-shm", INDEX + ".bad"}
)
# NONBLOCK: should a name be a FIFO, opening it must not wait for ever. It changes nothing for files.
_SAFE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class Folder:
    """An open folder; `close` gives up the lock. Methods but for `open` raise OSError when they cannot."""

    def __init__(self, path: Path, fd: int, segments_fd: int, lock_fd: int) -> None:
        self.path = path
        self._fd, self._segments_fd, self._lock_fd = fd, segments_fd, lock_fd

    @classmethod
    def open(cls, path: Path) -> "Folder":
        """Make the folder if need be, and lock it. Errors: StoreError."""
        with explained(path):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            return cls._open(path)

    @classmethod
    def _open(cls, path: Path) -> "Folder":
        fd = open_private(path)
        lock_fd = segments_fd = -1
        try:
            lock_fd = _lock(path, fd)
            _check_format(path, fd)
            if SEGMENTS not in os.listdir(fd):
                os.mkdir(SEGMENTS, 0o700, dir_fd=fd)
            segments_fd = os.open(SEGMENTS, os.O_RDONLY | os.O_DIRECTORY | _SAFE, dir_fd=fd)
        except BaseException:
            for opened in (segments_fd, lock_fd, fd):
                if opened >= 0:
                    os.close(opened)
            raise
        return cls(path, fd, segments_fd, lock_fd)

    def close(self) -> None:
        """Give up the lock. Nothing else may be called afterwards."""
        for fd in (self._segments_fd, self._fd, self._lock_fd):
            os.close(fd)

    # ---- segments, by file name

    def segment_names(self) -> list[str]:
        """All regular files among the segments, in order."""
        with os.scandir(self._segments_fd) as entries:
            return sorted(entry.name for entry in entries if entry.is_file(follow_symlinks=False))

    def create_segment(self, name: str) -> int:
        """A new empty file, opened for reading and writing."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _SAFE
        return os.open(name, flags, 0o600, dir_fd=self._segments_fd)

    def open_segment(self, name: str, write: bool = False) -> int:
        """An existing regular file."""
        fd = os.open(name, (os.O_RDWR if write else os.O_RDONLY) | _SAFE, dir_fd=self._segments_fd)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        raise OSError(f"{name} is not a file")

    def remove_segment(self, name: str) -> None:
        """Unlink it; whoever has it open can go on reading."""
        os.unlink(name, dir_fd=self._segments_fd)

    def rename_segment(self, name: str, new: str) -> None:
        """Replaces `new`."""
        os.rename(name, new, src_dir_fd=self._segments_fd, dst_dir_fd=self._segments_fd)

    def free_bytes(self) -> tuple[int, int]:
        """(what we could still write, size) of the filesystem."""
        found = os.fstatvfs(self._segments_fd)
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize

    def exists(self) -> bool:
        """False once somebody has deleted the folder under us."""
        return os.fstat(self._segments_fd).st_nlink > 0

    # ---- the index

    def prepare_index(self) -> None:
        """The index's file exists afterwards, is a file and ours alone (SQLite would follow a link)."""
        os.close(os.open(INDEX, os.O_RDWR | os.O_CREAT | _SAFE, 0o600, dir_fd=self._fd))

    def set_index_aside(self) -> None:
        """Away with a damaged index: it stays as index.sqlite.bad until the next one."""
        for name in (INDEX + "-wal", INDEX + "-shm"):
            self._unlink(name)
        os.rename(INDEX, INDEX + ".bad", src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def clear(self) -> None:
        """Remove everything that a store made, but for the lock."""
        for name in self.segment_names():
            if name.endswith((GOOD, BAD)):
                self.remove_segment(name)
        for name in _OURS - {LOCK, SEGMENTS}:
            self._unlink(name)

    def _unlink(self, name: str) -> None:
        if name in os.listdir(self._fd):
            os.unlink(name, dir_fd=self._fd)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """OSError becomes a StoreError that names the folder."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror or error}") from None


def open_private(path: Path) -> int:
    """The folder itself, if it is ours and nobody else can write to it; then nobody else can read it, either.

    Errors: StoreError, OSError.
    """
    if path.is_symlink():
        raise StoreError(f"{path} is a link: name the folder that it leads to")
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if found.st_uid != os.geteuid():
            raise StoreError(f"{path} belongs to another user: name a folder of your own")
        if found.st_mode & 0o022:
            raise StoreError(f"{path} can be written by others: chmod go-w {path}")
        if found.st_mode & 0o077:
            os.fchmod(fd, 0o700)
        if strangers := sorted(set(os.listdir(fd)) - _OURS):
            raise StoreError(f"{path} holds other things ({strangers[0]}): name a folder for the cache alone")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _lock(path: Path, fd: int) -> int:
    lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | _SAFE, 0o600, dir_fd=fd)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 20, 0).decode(errors="replace").strip()
        os.close(lock)
        raise StoreError(f"{path} is in use by process {holder or '?'}") from None
    except OSError:
        os.close(lock)
        raise
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _check_format(path: Path, fd: int) -> None:
    """Refuse what a later version wrote before anything of it is touched; say what we write."""
    meta = _read_meta(fd)
    if meta is None:
        _write_meta(fd)
    elif meta.get("format") != FORMAT:
        found = meta.get("format")
        raise StoreError(f"{path} has format {found!r}, this version knows {FORMAT}: clear or rename it")


def _read_meta(fd: int) -> dict[str, Any] | None:
    """None when there is none, or none that can be read: segments say their version, too."""
    try:
        file = os.open(META, os.O_RDONLY | _SAFE, dir_fd=fd)
    except FileNotFoundError:
        return None
    with open(file, "rb") as stream:
        try:
            meta = json.loads(stream.read(_META_MAX))
        except ValueError:
            return None
    return meta if isinstance(meta, dict) else None


def _write_meta(fd: int) -> None:
    new = META + ".new"
    file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _SAFE, 0o600, dir_fd=fd)
    with open(file, "wb") as stream:
        stream.write(json.dumps({"format": FORMAT}).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.rename(new, META, src_dir_fd=fd, dst_dir_fd=fd)
    os.fsync(fd)
