"""What the disk store costs: CPU and time of put and get for each block, beside a copy and a checksum alone.

    PYTHONPATH=build/ns python tests/bench/disk_store.py [--folder DIR] [--block-bytes N] [--blocks N]

Puts and gets take turns with a copy (memcpy of a block, from and to memory that no cache holds) and with the
checksum, by rounds; each figure is the median of them. `cpu` is the thread's own time, with the kernel's
copying to or from the page cache in it, `rate` is by the clock, `of copy` its share of the copy's. Stores of
several sizes are then opened: after they were closed, after a crash, and without the index.
"""

import argparse
import hashlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from rich.console import Console
from rich.table import Table

from ktransformers.kvcache.stores.disk import DiskStore
from ktransformers.kvcache.stores.layout import checksum

DEFAULT_MODEL_BLOCK = 368_640


def name(i: int) -> SimpleNamespace:
    key = hashlib.sha256(b"%d" % i).digest()
    return SimpleNamespace(key=key, parent=key, owner=bytes(16), content=bytes(64))


def timed(do: Callable[[int], object], count: int) -> tuple[float, float]:
    """(CPU seconds, seconds) of one call, over `count`."""
    cpu, wall = time.thread_time(), time.perf_counter()
    for i in range(count):
        do(i)
    return (time.thread_time() - cpu) / count, (time.perf_counter() - wall) / count


def rates(folder: Path, size: int, count: int, rounds: int, console: Console) -> None:
    store = DiskStore.open(folder, bytes(32), size, 8 * count * (size + 8192))
    # Larger together than the last cache, as KV pools are.
    source = np.random.default_rng(0).integers(0, 256, (count, size), dtype=np.uint8)
    target = np.zeros_like(source)
    rows: dict[str, list[tuple[float, float]]] = {}
    for r in range(rounds):
        names = [name(r * count + i) for i in range(count)]
        steps: dict[str, Callable[[int], object]] = {
            "copy": lambda i: np.copyto(target[i], source[i]),
            "checksum": lambda i: checksum(source[i]),
            "put": lambda i, names=names: store.put(names[i], source[i]),
            "get": lambda i, names=names: store.get_into(names[i], target[i]),
        }
        for what, do in steps.items():
            rows.setdefault(what, []).append(timed(do, count))
        store.forget([each.key for each in names])
    store.close()
    table = Table("", "cpu µs", "rate MB/s", "of copy", title=f"blocks of {size:,} bytes in {folder.parent}")
    copy = statistics.median(wall for _, wall in rows["copy"])
    for what, found in rows.items():
        cpu, wall = (statistics.median(each[k] for each in found) for k in (0, 1))
        table.add_row(what, f"{cpu * 1e6:.1f}", f"{size / wall / 1e6:,.0f}", f"{copy / wall:.2f}")
    console.print(table)


def put_one(folder: Path, size: int, cap: int, i: int) -> None:
    DiskStore.open(folder, bytes(32), size, cap).put(name(i), bytes(size))


def crash(do: Callable[[], object]) -> None:
    """Do it in a process that is gone afterwards."""
    if (pid := os.fork()) == 0:
        do()
        os._exit(0)
    os.waitpid(pid, 0)


def openings(folder: Path, size: int, counts: list[int], console: Console) -> None:
    """Time to open depends on the number of blocks, not on their bytes: those here are small."""
    table = Table(
        "blocks", "segments", "closed", "crashed", "no index", title="seconds (of CPU) until a store is open"
    )
    cap = 16 << 30
    done = 0
    data = bytes(size)
    for count in counts:
        store = DiskStore.open(folder, bytes(32), size, cap)
        for i in range(done, count):
            if not store.put(name(i), data):
                raise RuntimeError(str(store.stats()))
        done = count
        store.close()
        segments = len(list((folder / "seg").iterdir()))
        found = []
        for what in ("closed", "crashed", "no index"):
            if what == "crashed":
                crash(partial(put_one, folder, size, cap, done))
                done += 1
            elif what == "no index":
                for path in folder.glob("index.sqlite*"):
                    path.unlink()
            begin, cpu = time.perf_counter(), time.thread_time()
            store = DiskStore.open(folder, bytes(32), size, cap)
            found.append(f"{time.perf_counter() - begin:.3f} ({time.thread_time() - cpu:.3f})")
            if len(store.entries()) != done:
                raise RuntimeError(f"{what}: {len(store.entries())} of {done} blocks")
            store.close()
        table.add_row(f"{count:,}", str(segments), *found)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where to make the store [a temporary folder]")
    parser.add_argument("--block-bytes", type=int, default=DEFAULT_MODEL_BLOCK)
    parser.add_argument("--blocks", type=int, default=200, help="of one round")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    console = Console()
    folder = Path(tempfile.mkdtemp(prefix="disk-store-", dir=options.folder))
    try:
        rates(folder / "kv", options.block_bytes, options.blocks, options.rounds, console)
        openings(folder / "opening", 4096, [2_000, 8_000, 32_000], console)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
