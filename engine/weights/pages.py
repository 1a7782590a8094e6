"""Pages of mapped files, and how to let them go.

What is read through a mapping counts as memory of the process for as long as nobody else wants it: a model
that is repacked while it is read would show, and in a tight control group need, twice its size.
"""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]


def mapped(data: U8) -> bool:
    """Whether `data` is a view of a mapped file."""
    return _mapping(data) is not None


def will_need(data: U8) -> None:
    """Have the kernel read the pages under `data`, if they are of a mapped file, without waiting for it: a
    fault at a time, a disk is read at a fraction of its speed."""
    _advise(data, mmap.MADV_WILLNEED)


def release(data: U8) -> None:
    """Give back the whole pages under `data`, if they are of a mapped file: touched again, they are read."""
    _advise(data, mmap.MADV_DONTNEED)


@contextmanager
def reading(data: U8) -> Iterator[U8]:
    """Have the kernel read `data`, all of which will be used now, and give its pages back after that."""
    will_need(data)
    try:
        yield data
    finally:
        release(data)


def _advise(data: U8, advice: int) -> None:
    mapping = _mapping(data)
    if mapping is None:
        return
    begin = data.ctypes.data - np.frombuffer(mapping, np.uint8).ctypes.data
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (begin + data.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        mapping.madvise(advice, first, last - first)


def _mapping(data: object) -> mmap.mmap | None:
    """The mapping that an array is a view of. Only one that cannot be written to: giving back other pages
    would lose what they hold."""
    while isinstance(data, np.ndarray | memoryview):
        if isinstance(data, np.ndarray) and data.flags.writeable:
            return None
        data = data.base if isinstance(data, np.ndarray) else data.obj
    return data if isinstance(data, mmap.mmap) else None
