"""What this machine can do at most, measured: the bounds that predictions and benchmarks are held against."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from ktransformers.engine import _kernels, machine

Dot = Literal["int8", "bf16", "f32"]
"""Which dot product an op spends its arithmetic in."""
DOTS: Final[tuple[Dot, ...]] = ("int8", "bf16", "f32")

_SMALLEST_READ: Final = 256 * 2**20
_CACHES: Final = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Limits:
    """The speed of one kernel table on one number of threads."""

    isa: str
    threads: int
    reads: Mapping[int, float]
    """Bytes per second read from memory, by the number of threads that read; `threads` is one of them."""
    peaks: Mapping[Dot, float]
    """Operations per second on all threads, a multiplication and an addition being two; 0 where the table has
    no such dot product."""

    @property
    def bandwidth(self) -> float:
        """Bytes per second that all threads read together."""
        return self.reads[self.threads]

    def seconds(self, nbytes: float, flops: float, dot: Dot) -> float:
        """The least that reading and computing take when they overlap: the roofline."""
        return max(nbytes / self.bandwidth, flops / self.peaks[dot])


def measure(
    threads: int | None, *, isa: str | None = None, seconds: float = 0.2, scaling: bool = False
) -> Limits:
    """Measure the table `isa` (None: the best one) on `threads` (None: one for each CPU), about `seconds` for
    each figure.

    `scaling` also measures reading with fewer threads: powers of two. MemoryError.
    """
    isa, threads = isa or _kernels.isas()[0], threads or machine.cpus()
    pool = _kernels.ThreadPool(threads)
    size = read_bytes()
    reads = {}
    for count in thread_counts(threads) if scaling else (threads,):
        readers = pool if count == threads else _kernels.ThreadPool(count)
        reads[count] = _kernels.measure_read(readers, isa, size, seconds)
    peaks: dict[Dot, float] = {dot: _kernels.measure_peak(pool, isa, dot, seconds) for dot in DOTS}
    return Limits(isa=isa, threads=threads, reads=reads, peaks=peaks)


def thread_counts(threads: int) -> Iterator[int]:
    """1, 2, 4 and so on, and `threads` last."""
    count = 1
    while count < threads:
        yield count
        count *= 2
    yield threads


def read_bytes() -> int:
    """Bytes to read from, so that no cache holds them: four times the largest, if there is memory for it."""
    sizes = [path.read_text().strip() for path in _CACHES.glob("index*/size")]
    largest = max((int(s.removesuffix("K")) * 1024 for s in sizes if s.endswith("K")), default=0)
    return min(max(_SMALLEST_READ, 4 * largest), max(machine.available_memory() // 4, 2**20))
