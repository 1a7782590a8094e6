"""Kills and failing system calls in a disk store's life: `python crashes.py WHAT FOLDER …`.

    kills COUNT SEED   a child puts, reads and forgets until SIGKILL; COUNT times in one folder
    points             a script of calls is cut off before, in the middle of and after each system call
    errors ERRNO       each of them fails instead

After each the folder is opened again and every block is read. Prints what was counted, as JSON; a wrong byte,
an exception or a block that should be there is an exit code of 1 with a traceback. A process of its own,
because forks of one that has threads are not to be relied on.
"""

import errno
import json
import mmap
import os
import random
import shutil
import signal
import sqlite3
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import stored_blocks as blocks

CAP = 400_000  # segments of three records, eight of them


def child(work: Callable[[], None]) -> int:
    """The exit status of `work` in a process of its own; 1 for an exception."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    return os.waitpid(pid, 0)[1]


# ---- kills


def writer(folder: Path, last: mmap.mmap, number: dict[bytes, Any], ready: int, seed: int) -> None:
    """Check what is there, say so, and go on for ever. `last` is the number of the last put that returned."""
    rng = random.Random(seed)
    store = blocks.open_store(folder, cap=CAP)
    (n,) = struct.unpack("q", last[:8])
    entries = store.entries()
    for entry in entries:
        assert blocks.has(store, number[entry.key]), store.stats()
    assert n == 0 or blocks.has(store, blocks.name(n)), f"block {n} was put, and is not there"
    os.write(ready, len(entries).to_bytes(2, "little"))
    while True:
        n += 1
        blocks.put(store, blocks.name(n))
        last[:8] = struct.pack("q", n)
        what = rng.random()
        if what < 0.2:
            store.forget([blocks.name(n - rng.randrange(20, 60)).key])
        elif what < 0.3:
            store.flush()
        elif what < 0.6:
            blocks.has(store, blocks.name(n - rng.randrange(20)))


def kills(folder: Path, count: int, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    last = mmap.mmap(-1, 8)
    found = []
    number: dict[bytes, blocks.Name] = {}
    for i in range(count):
        for known in range(len(number), struct.unpack("q", last[:8])[0] + 2):
            number[blocks.name(known).key] = blocks.name(known)
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                writer(folder, last, number, theirs, seed + i)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            os._exit(1)
        os.close(theirs)
        said = os.read(ours, 2)
        os.close(ours)
        time.sleep(rng.random() * 0.008)
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        assert status == signal.SIGKILL and len(said) == 2, f"seed {seed}, kill {i}: status {status}"
        found.append(int.from_bytes(said, "little"))
    (n,) = struct.unpack("q", last[:8])
    return {"kills": count, "seed": seed, "puts": n, "checked": sum(found), "empty": found[5:].count(0)}


# ---- system calls

CALLS = [
    *("open", "mkdir", "listdir", "rename", "unlink", "fstat", "fstatvfs", "lseek", "pread", "preadv"),
    *("pwrite", "pwritev", "ftruncate", "posix_fallocate", "posix_fadvise", "fsync", "fdatasync"),
]


class Interrupted:
    """Every system call of ours, and every SQL statement, counts; `at` one of them something else happens."""

    def __init__(self, at: int, do: Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]) -> None:
        self.count, self.at, self.do = 0, at, do
        self.seen: list[str] = []
        for name in CALLS:
            setattr(os, name, self.wrap(name, getattr(os, name)))
        outer = self

        class Connection(sqlite3.Connection):
            def execute(self, *args: Any) -> Any:
                return outer.wrap("sql", super().execute)(*args)

            def executemany(self, *args: Any) -> Any:
                return outer.wrap("sql", super().executemany)(*args)

            def commit(self) -> None:
                outer.wrap("sql", super().commit)()

        connect = sqlite3.connect
        sqlite3.connect = lambda *a, **k: connect(*a, factory=Connection, **k)  # type: ignore[assignment]

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            self.seen.append(name)
            if self.count == self.at:
                return self.do(name, lambda *a: real(*a, **kwargs), args)
            return real(*args, **kwargs)

        return call


def prepared(folder: Path) -> None:
    """Blocks of another model, ours in sealed segments, one of them damaged, and in one left by a crash."""
    store = blocks.open_store(folder, b"x" * 32, cap=CAP)
    blocks.put(store, *map(blocks.name, range(1000, 1004)))
    store.close()
    store = blocks.open_store(folder, cap=CAP)
    blocks.put(store, *map(blocks.name, range(14)))
    store.close()
    store = blocks.open_store(folder, cap=CAP)
    blocks.put(store, blocks.name(14))
    blocks.crash(store)
    blocks.flip(blocks.segments(folder)[3], 9000, 3)  # the payload of block 3


def life(folder: Path, done: Callable[[int], None]) -> None:
    """Everything that a store does, in a few calls. `done` is told what was put, or forgotten (-n)."""
    store = blocks.open_store(folder, cap=CAP)
    for i in (3, 6, 7, 14):
        blocks.has(store, blocks.name(i))
    for i in range(20, 33):
        name = blocks.name(i)
        if store.put(name, blocks.payload(name)):
            done(i)
        if i == 24:
            store.forget([blocks.name(n).key for n in (20, 22)])
            done(-20)
            done(-22)
            store.flush()
        blocks.has(store, name)
    for entry in store.entries():
        assert entry.size == 12288
    store.lost()
    store.close()


def check(folder: Path, put: set[int]) -> tuple[int, int]:
    """Open what is left, twice; every block that it lists has the right bytes. (listed, of those in `put`)"""
    numbers = {blocks.name(i).key: i for i in [*range(40), *range(1000, 1004)]}
    listed = []
    for _ in range(2):
        store = blocks.open_store(folder, cap=CAP)
        for entry in store.entries():
            # Of the damaged segment the store learns when it reads that block, or a neighbour of it.
            ok = blocks.has(store, blocks.name(numbers[entry.key]))
            assert ok or numbers[entry.key] in (3, 4, 5), numbers[entry.key]
        listed.append([numbers[entry.key] for entry in store.entries()])
        assert store.stats().state == "on"
        store.close()
    assert listed[0] == listed[1]
    return len(listed[0]), len(put & set(listed[0]))


def before(name: str, real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    os._exit(9)


def after(name: str, real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    try:
        real(*args)
    finally:
        os._exit(9)


def half(name: str, real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    if name == "pwritev":
        fd, buffers, offset = args
        data = b"".join(buffers)
        real(fd, [data[: len(data) // 2]], offset)
    os._exit(9)


def fail_with(number: int) -> Callable[..., Any]:
    def fail(name: str, real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if name == "sql":
            raise sqlite3.OperationalError(os.strerror(number))
        raise OSError(number, os.strerror(number))

    return fail


def cut(folder: Path, at: int, do: Callable[..., Any]) -> tuple[int, set[int], list[str]]:
    """One life in a copy of what was prepared, interrupted at a call: exit status, blocks put, calls seen."""
    live, shared = folder / "live", mmap.mmap(-1, 1 << 14)
    if live.exists():
        shutil.rmtree(live)
    shutil.copytree(folder / "start", live)

    def work() -> None:
        calls = Interrupted(at, do)

        def done(i: int) -> None:
            shared[abs(i)] = i > 0

        try:
            life(live, done)
        except blocks.StoreError:
            os._exit(7)  # it could not be opened: the server runs without it
        text = " ".join(calls.seen).encode()
        shared[64 : 64 + len(text)] = text

    status = child(work)
    put = {i for i in range(64) if shared[i]}
    return os.waitstatus_to_exitcode(status), put, shared[64:].rstrip(b"\0").decode().split()


def everywhere(folder: Path, kinds: dict[str, Callable[..., Any]], statuses: set[int]) -> dict[str, Any]:
    prepared(folder / "start")
    status, put, calls = cut(folder, -1, before)
    assert status == 0 and len(put) == 11, (status, put)
    whole = check(folder / "live", put)
    counted: Counter[str] = Counter()
    for kind, do in kinds.items():
        for at, name in enumerate(calls, 1):
            if kind == "half" and name != "pwritev":
                continue
            status, put, _ = cut(folder, at, do)
            assert status in statuses, f"{kind} call {at}, {name}: status {status}"
            try:
                check(folder / "live", put)
            except BaseException:
                print(f"{kind} call {at}, {name}", file=sys.stderr)
                raise
            counted[f"{kind} {name}"] += 1
            counted[f"status {status}"] += 1
    return {"calls": len(calls), "whole": whole, **counted}


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "kills":
        said = kills(folder / "kv", int(sys.argv[3]), int(sys.argv[4]))
    elif what == "points":
        said = everywhere(folder, {"before": before, "half": half, "after": after}, {9})
    else:
        number: int = getattr(errno, sys.argv[3])
        said = everywhere(folder, {"failing": fail_with(number)}, {0, 7})
    print(json.dumps(said))


if __name__ == "__main__":
    main()
