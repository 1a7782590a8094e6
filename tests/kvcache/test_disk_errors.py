"""K7: a medium that is full, read-only, broken or gone costs hits, and nothing else."""

import errno
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ktransformers.kvcache.stores import appender, health
from ktransformers.kvcache.stores.store import StoreError


@pytest.fixture
def store(stored, tmp_path):
    store = stored.open_store(tmp_path / "kv")
    stored.put(store, *map(stored.name, range(20)))
    yield store
    store.close()


@pytest.fixture
def clock(monkeypatch):
    """Seconds that can be let pass."""

    class Clock:
        now = 1000.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(health.time, "monotonic", clock.monotonic)
    return clock


class Failing:
    """System calls of one name raise `number` while `on`."""

    def __init__(self, monkeypatch, name: str, number: int) -> None:
        self.on, self.count = True, 0
        real = getattr(os, name)

        def call(*args, **kwargs):
            if self.on:
                self.count += 1
                raise OSError(number, os.strerror(number))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)


def put(stored, store, i: int) -> bool:
    return store.put(stored.name(i), stored.payload(stored.name(i), store.block_bytes)) > 0


# ---- no space


@pytest.fixture
def small_filesystem(tmp_path) -> Iterator[Path]:
    """A tmpfs of 64 MiB; mounting needs root."""
    folder = tmp_path / "tmpfs"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m,mode=0700", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_small_filesystem_with_a_cap_far_above_it(stored, small_filesystem, reserve) -> None:
    """The store keeps to what there is, less the reserve, and goes on."""
    store = stored.open_store(small_filesystem / "kv", size=100_000, cap=48 << 20)
    for i in range(1200):
        stored.put(store, stored.name(i))
        if i % 100 == 0:
            free = shutil.disk_usage(small_filesystem).free
            assert free > 6 << 20, free
    stats = store.stats()
    assert stats.state == "on" and stats.reclaimed > 5 and stats.refused_puts == 0
    assert len(store.entries()) + len(store.lost()) == 1200
    assert all(stored.has(store, stored.name(i)) for i in range(1150, 1200))
    store.close()


def test_others_fill_the_filesystem(stored, small_filesystem, clock, reserve) -> None:
    """Segments go until the reserve is there again; then nothing is stored for a minute."""
    store = stored.open_store(small_filesystem / "kv", size=100_000, cap=40 << 20)
    stored.put(store, *map(stored.name, range(200)))
    with pytest.raises(OSError), (small_filesystem / "big").open("wb") as file:
        for _ in range(100):
            file.write(bytes(1 << 20))
    for i in range(200, 400):
        put(stored, store, i)
    known = {entry.key for entry in store.entries()}
    assert len(known) + len(store.lost()) + store.stats().refused_puts == 400
    assert all(stored.has(store, stored.name(i)) == (stored.name(i).key in known) for i in range(400))
    (small_filesystem / "big").unlink()
    clock.now += health.PAUSE + 1
    assert put(stored, store, 500) and stored.has(store, stored.name(500))
    assert store.stats().state == "on"
    store.close()
    store = stored.open_store(small_filesystem / "kv", size=100_000, cap=40 << 20)
    assert stored.has(store, stored.name(500))
    store.close()


def test_a_read_only_filesystem(stored, small_filesystem) -> None:
    stored.open_store(small_filesystem / "kv").close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_filesystem)], check=True)
    with pytest.raises(StoreError, match="kv: Read-only file system"):
        stored.open_store(small_filesystem / "kv")


def test_the_filesystem_becomes_read_only(stored, store, monkeypatch, clock, tmp_path) -> None:
    """As the kernel does to one that it finds damaged: whatever writes fails."""
    real = os.open

    def read_only(path, flags, *args, **kwargs):
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *args, **kwargs)

    with monkeypatch.context() as patch:
        for name in ("pwritev", "posix_fallocate", "ftruncate", "fdatasync", "unlink", "rename"):
            Failing(patch, name, errno.EROFS)
        patch.setattr(os, "open", read_only)
        for i in range(50, 80):
            assert not put(stored, store, i)
            clock.now += 20
        # The open segment is full of writes that failed, and could not be sealed.
        assert all(stored.has(store, stored.name(i)) for i in range(20))
        assert store.lost() == []
        store.forget([stored.name(i).key for i in range(9)])
        store.flush()
    clock.now += 61
    assert put(stored, store, 50)


def test_no_space_makes_room_once_and_tries_again(stored, store, monkeypatch) -> None:
    real, calls = os.posix_fallocate, []

    def fallocate(fd: int, start: int, size: int) -> None:
        calls.append(size)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "full")
        real(fd, start, size)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    for i in range(50, 60):
        assert put(stored, store, i)
    stats = store.stats()
    assert (stats.reclaimed, stats.state, len(calls)) == (1, "on", 2)


def test_a_full_disk_is_tried_again_after_a_minute(stored, store, monkeypatch, clock) -> None:
    failing = Failing(monkeypatch, "posix_fallocate", errno.ENOSPC)
    assert put(stored, store, 50)  # the open segment has space
    results = [put(stored, store, i) for i in range(51, 80)]
    assert results[-1] is False and failing.count == 2
    assert store.stats().state == "read-only" and "No space left" in store.stats().reason
    assert stored.has(store, stored.name(50))
    failing.on = False
    clock.now += health.PAUSE - 1
    assert not put(stored, store, 90)
    clock.now += 2
    assert put(stored, store, 90) and store.stats().state == "on" and store.stats().reason == ""


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EFBIG])
def test_what_cannot_be_written_can_be_read(stored, store, monkeypatch, number, clock) -> None:
    Failing(monkeypatch, "pwritev", number)
    assert not put(stored, store, 50)
    assert store.stats().state == "read-only" and store.stats().refused_puts == 1
    assert all(stored.has(store, stored.name(i)) for i in range(20))


# ---- errors of the medium


def test_three_errors_within_a_minute_are_the_end(stored, store, monkeypatch, clock) -> None:
    failing = Failing(monkeypatch, "preadv", errno.EIO)
    assert not stored.has(store, stored.name(0))
    assert store.lost() == [stored.name(0).key]
    assert not stored.has(store, stored.name(0)) and failing.count == 1  # it is not tried again
    clock.now += health.PAUSE + 1
    assert not stored.has(store, stored.name(1)) and not stored.has(store, stored.name(2))
    assert store.stats().state == "on"
    assert not stored.has(store, stored.name(3))
    stats = store.stats()
    assert stats.state == "off" and "Input/output error" in stats.reason and stats.io_errors == 4
    assert not store.entries() and len(store.lost()) == 19
    failing.on = False
    assert not stored.has(store, stored.name(4)) and not put(stored, store, 4)
    clock.now += 10 * health.PAUSE
    assert store.stats().state == "off"


def test_a_limit_of_ours_is_a_miss_and_no_more(stored, store, monkeypatch) -> None:
    real = os.open

    def no_descriptors(path, flags, *args, **kwargs):
        if str(path).endswith(".kvs"):
            raise OSError(errno.EMFILE, "too many open files")
        return real(path, flags, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", no_descriptors)
        for i in range(20):
            assert not stored.has(store, stored.name(i))
    assert store.stats().state == "on" and store.lost() == []
    assert all(stored.has(store, stored.name(i)) for i in range(20))


@pytest.mark.parametrize("call", ["fdatasync", "ftruncate", "pwritev"])
def test_a_segment_that_cannot_be_sealed_is_recovered_later(
    stored, store, monkeypatch, call, tmp_path
) -> None:
    """What the kernel could not write would be a mismatch, should it have gone."""
    stored.put(store, *map(stored.name, range(30, 36)))
    name = stored.name(36)
    if call == "pwritev":  # of the footer, not of the last block
        monkeypatch.setattr(appender, "seal", lambda *args: (_ for _ in ()).throw(OSError(errno.EIO, "EIO")))
    else:
        Failing(monkeypatch, call, errno.EIO)
    stored.put(store, name)  # the third segment ends
    assert store.stats().io_errors == 1 and store.lost() == [] and store.stats().state == "on"
    monkeypatch.undo()
    stored.put(store, stored.name(37))
    store.forget([stored.name(30).key])
    assert all(stored.has(store, stored.name(i)) for i in (*range(20), *range(31, 38)))
    store.close()
    again = stored.open_store(tmp_path / "kv")
    assert all(stored.has(again, stored.name(i)) for i in (*range(20), *range(31, 38)))
    again.close()


def test_a_short_write_is_continued(stored, store, monkeypatch) -> None:
    real = os.pwritev
    monkeypatch.setattr(
        os, "pwritev", lambda fd, buffers, offset: real(fd, [bytes(buffers[0][:777])], offset)
    )
    stored.put(store, stored.name(50))
    monkeypatch.setattr(os, "pwritev", real)
    assert stored.has(store, stored.name(50))


def test_short_reads_are_continued(stored, store, monkeypatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:777]], offset))
    assert stored.has(store, stored.name(5))


# ---- deletions


def test_the_folder_is_deleted_while_running(stored, store, tmp_path) -> None:
    shutil.rmtree(tmp_path / "kv")
    assert not stored.has(store, stored.name(3))
    stats = store.stats()
    assert stats.state == "off" and stats.reason == "the folder was deleted"
    assert len(store.lost()) == 20 and not put(stored, store, 50)
    store.flush()


def test_the_folder_is_deleted_and_only_written_to(stored, store, tmp_path) -> None:
    shutil.rmtree(tmp_path / "kv")
    assert not all(put(stored, store, i) for i in range(50, 70))
    assert store.stats().state == "off" and not store.entries()


def test_a_segment_is_deleted_while_running(stored, store, tmp_path) -> None:
    stored.segments(tmp_path / "kv")[0].unlink()
    assert not stored.has(store, stored.name(3))
    assert set(store.lost()) == {stored.name(i).key for i in range(9)}
    assert stored.has(store, stored.name(10)) and put(stored, store, 50)
    assert store.stats().state == "on"


def test_deleted_segments_are_reclaimed_without_a_word(stored, store, tmp_path) -> None:
    for path in stored.segments(tmp_path / "kv"):
        path.unlink()
    stored.put(store, *map(stored.name, range(50, 150)))
    stats = store.stats()
    assert stats.reclaimed > 2 and stats.io_errors == 0 and stats.state == "on"


# ---- the index


def test_an_index_that_cannot_be_written(stored, store, monkeypatch, tmp_path) -> None:
    """What it lacks is found in the segments."""

    def full(changes: object) -> None:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error

    monkeypatch.setattr(store._books._index, "apply", full)
    store.forget([stored.name(1).key])
    store.flush()
    assert store.stats().state == "read-only"
    assert stored.has(store, stored.name(2))
    store.close()
    again = stored.open_store(tmp_path / "kv")
    assert all(stored.has(again, stored.name(i)) for i in range(20) if i != 1)
    again.close()


def test_an_index_that_is_damaged_while_running(stored, store, tmp_path) -> None:
    index = tmp_path / "kv/index.sqlite"
    store._books._index._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    index.write_bytes(b"?" * index.stat().st_size)
    for i in range(30, 60):
        assert put(stored, store, i)
        store.flush()
    assert store.stats().state == "on"
    store.close()
    again = stored.open_store(tmp_path / "kv")
    assert all(stored.has(again, stored.name(i)) for i in [*range(20), *range(30, 60)])
    again.close()
