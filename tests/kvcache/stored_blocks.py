"""Blocks whose bytes follow from their names, so that every byte that a store gives back can be checked."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ktransformers.kvcache.stores import appender
from ktransformers.kvcache.stores.disk import DiskStore
from ktransformers.kvcache.stores.store import StoreError as StoreError

REAL_RESERVE = appender.RESERVE, appender.RESERVE_BYTES
# A developer's disk may be nearly full, which is no reason for the tests to fail.
appender.RESERVE, appender.RESERVE_BYTES = 0.0, 1 << 20

SIZE = 5000
"""Bytes of a block: not whole pages."""
MODEL = b"m" * 32


@dataclass(frozen=True)
class Name:
    key: bytes
    parent: bytes
    owner: bytes
    content: bytes


def name(i: int, owner: int = 1, content_bytes: int = 64) -> Name:
    """The name of block i of a chain."""
    key, parent = (hashlib.sha256(b"%d" % n).digest() for n in (i, i - 1))
    return Name(key, parent, bytes([owner]) * 16, (key * 99)[:content_bytes])


def payload(of: Name, size: int = SIZE) -> bytes:
    """The bytes of a block."""
    return hashlib.shake_128(of.key).digest(size)


def open_store(folder: Path, model: bytes = MODEL, size: int = SIZE, cap: int = 1 << 20) -> DiskStore:
    return DiskStore.open(folder, model, size, cap)


def put(store: DiskStore, *blocks: Name) -> None:
    for block in blocks:
        assert store.put(block, payload(block, store.block_bytes)) > 0, store.stats()


def has(store: DiskStore, block: Name) -> bool:
    """Whether the store has it. A hit with a wrong byte fails."""
    buffer = bytearray(store.block_bytes)
    found = store.get_into(block, buffer)
    assert not found or buffer == payload(block, store.block_bytes), "a hit with wrong bytes"
    return found


@contextmanager
def in_memory() -> Iterator[Path]:
    """A folder in memory, if there is room: what is killed leaves the same there, and sooner."""
    shm = Path("/dev/shm")
    roomy = shm.is_dir() and shutil.disk_usage(shm).free > 256 << 20
    with tempfile.TemporaryDirectory(dir=shm if roomy else None) as name:
        yield Path(name)


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "seg").iterdir())


def crash(store: DiskStore) -> None:
    """Let go of the store's files as the kernel does for a process that was killed: nothing is written."""
    writer, store._appender._writer = store._appender._writer, None
    if writer is not None:
        os.close(writer.fd)
    store._books._index.abandon()
    store._books.folder.close()
    store._calls.closed = True


def flip(path: Path, byte: int, bit: int) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as file:
        file.seek(byte)
        old = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([old ^ 1 << bit]))
