"""What each weight format costs: one product alone, for one row (decode) and for many (prefill).

    python tests/bench/formats.py [THREADS]

Prints for each format its bits, the rate at which one row reads it and those at which 64 and 512 rows compute
it, with shares of Q8_0's in the same run.
"""

import sys
import time

import numpy as np

from ktransformers.engine import _kernels
from ktransformers.engine.weights.formats import FORMATS

ROWS, COLS = 8192, 8192
"""Outputs and inputs: more bytes than the caches have, in every format."""
NAMES = (
    *("Q8_0", "BF16", "F8_E4M3", "Q4_0", "Q4_K", "MXFP4", "I4_32", "I4_128", "I4Z_32", "I4Z_128"),
    *("IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"),
)


def seconds(pool: _kernels.ThreadPool, weight: _kernels.Weight, rows: int) -> float:
    """The best of as many products as take 0.3 s."""
    x = np.random.default_rng(0).standard_normal((rows, COLS)).astype(np.float32)
    _kernels.gemm(pool, weight, x)
    best, end = np.inf, time.perf_counter() + 0.3
    while time.perf_counter() < end:
        begin = time.perf_counter()
        _kernels.gemm(pool, weight, x)
        best = min(best, time.perf_counter() - begin)
    return float(best)


def main() -> None:
    pool = _kernels.ThreadPool(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
    isa = _kernels.isas()[0]
    numbers = {fmt.name: number for number, fmt in FORMATS.items()}
    rng = np.random.default_rng(1)
    first: tuple[float, ...] = ()
    print(f"{isa}, {pool.threads} threads, {ROWS} x {COLS}")
    print(f"{'format':<10}{'bits':>6}{'GB/s, 1 row':>14}{'GOPS, 64':>12}{'GOPS, 512':>12}   shares of Q8_0's")
    for name in NAMES:
        fmt = FORMATS[numbers[name]]
        nbytes = ROWS * COLS // fmt.block * fmt.nbytes
        # Neither infinities nor denormal numbers, which would be slow, wherever scales lie.
        raw = rng.integers(0x20, 0x38, nbytes, dtype=np.uint8)
        weight = _kernels.pack(pool, isa, numbers[name], ROWS, COLS, raw)
        rates = [nbytes / seconds(pool, weight, 1) / 1e9]
        rates += [2 * ROWS * COLS * n / seconds(pool, weight, n) / 1e9 for n in (64, 512)]
        first = first or tuple(rates)
        shares = " ".join(f"{rate / base:5.2f}" for rate, base in zip(rates, first, strict=True))
        columns = f"{rates[0]:>14.1f}{rates[1]:>12.0f}{rates[2]:>12.0f}"
        print(f"{name:<10}{8 * fmt.nbytes / fmt.block:>6.2f}{columns}   {shares}", flush=True)


if __name__ == "__main__":
    main()
