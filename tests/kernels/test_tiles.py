"""Products by tiles, as emulated: the bits of the vectors where that is promised, else in the tiles' order.

test_gemm.py has the table among all others; here are the sizes at which tiles, chunks and blocks end.
"""

import numpy as np
import numpy.typing as npt
import pytest

from ktransformers.engine import _kernels

F32 = npt.NDArray[np.float32]

ISA, BASE = "amx_emulated", "avx512_bf16"
pytestmark = pytest.mark.skipif(ISA not in _kernels.emulated_isas(), reason="needs AVX-512 BF16")
TILE_DEPTH = 32
LEAST_TILED = 8
ROWS = [LEAST_TILED - 1, LEAST_TILED, 15, 16, 63, 64, 65, 130]
OUT_ROWS = [16, 129, 150]  # more panels than one chunk takes


def inputs(rng: np.random.Generator, rows: int, cols: int) -> F32:
    x = rng.standard_normal((rows, cols)) * np.exp2(rng.integers(-4, 5, (rows, 1)))
    x[:, ::97] *= 50  # far out of their groups
    return x.astype(np.float32)


def same_bits(a: F32, b: F32, what: str) -> None:
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32), err_msg=what)


def uses_bf16(fmt) -> bool:
    return _kernels.activation(ISA, fmt.number) == "bf16"


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("out_rows", OUT_ROWS)
def test_bits_of_the_vectors(fmt, rng, pool, out_rows, precise):
    """Integers are exact and scaled in one order; floats are not tiled at all."""
    if uses_bf16(fmt):
        pytest.skip("tiles of bfloat16 have an order of their own")
    cols = 33 if fmt.is_float else max(fmt.block, 32) * (3 if fmt.block > 128 else 11)
    raw = fmt.random(rng, out_rows, cols)
    tiled, vectors = (_kernels.pack(pool, isa, fmt.number, out_rows, cols, raw) for isa in (ISA, BASE))
    for rows in ROWS:
        x = inputs(rng, rows, cols)
        same_bits(
            _kernels.gemm(pool, tiled, x, precise), _kernels.gemm(pool, vectors, x, precise), f"{rows} rows"
        )


@pytest.mark.parametrize("name", ["BF16", "F8_E4M3"])
@pytest.mark.parametrize("out_rows", OUT_ROWS)
def test_bfloat16_rows_are_alone(formats, rng, pool, name, out_rows):
    """For one row as for many, since all go by tiles."""
    fmt = formats[name]
    cols = 300 if name == "BF16" else 384
    weight = _kernels.pack(pool, ISA, fmt.number, out_rows, cols, fmt.random(rng, out_rows, cols))
    x = inputs(rng, max(ROWS), cols)
    together = _kernels.gemm(pool, weight, x)
    for rows in (1, *ROWS):
        first = int(rng.integers(0, len(x) - rows + 1))
        alone = _kernels.gemm(pool, weight, x[first : first + rows].copy())
        same_bits(alone, together[first : first + rows], f"{rows} rows")


def in_order_of_tiles(x: F32, w: F32) -> F32:
    """TDPBF16PS by the manual: of each 32 elements a chain of the even and one of the odd, then the sum of
    both. Values whose products and sums float64 holds exactly, so that each addition here rounds once."""
    sums = np.zeros((len(x), len(w)), np.float32)
    for k in range(0, x.shape[1], TILE_DEPTH):
        part = np.zeros((2, len(x), len(w)), np.float32)
        for j in range(k, min(k + TILE_DEPTH, x.shape[1])):
            product = np.outer(x[:, j].astype(np.float64), w[:, j].astype(np.float64))
            part[(j - k) % 2] = (part[(j - k) % 2] + product).astype(np.float32)
        sums += part[0] + part[1]
    return sums


def near_one(rng: np.random.Generator, rows: int, cols: int) -> F32:
    """Random bfloat16 within 0.5 .. 2, of either sign."""
    values = (rng.uniform(0.5, 2, (rows, cols)) * rng.choice([-1, 1], (rows, cols))).astype(np.float32)
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def leave_nan_behind() -> None:
    """In the stack of this thread, where products keep their tiles."""
    alone = _kernels.ThreadPool(1)
    weight = _kernels.pack(alone, ISA, 30, 128, 512, np.full(128 * 512 * 2, 0x7F, np.uint8))
    _kernels.gemm(alone, weight, np.full((64, 512), np.nan, np.float32))


@pytest.mark.parametrize("cols", [1, 2, 31, 32, 33, 257, 600])
def test_bfloat16_order_is_the_manuals(rng, cols):
    pool = _kernels.ThreadPool(1)
    w, x = near_one(rng, 37, cols), near_one(rng, 19, cols)
    raw = (w.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    weight = _kernels.pack(pool, ISA, 30, 37, cols, raw)
    leave_nan_behind()
    same_bits(_kernels.gemm(pool, weight, x), in_order_of_tiles(x, w), f"{cols} columns")


def test_denormals_count_as_zeros(pool):
    """As they do for the instruction, whatever the thread's mode is."""
    w = np.array([[1.0], [2.0**-126], [2.0**-133]], np.float32)
    raw = (w.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    weight = _kernels.pack(pool, ISA, 30, 3, 1, raw)
    x = np.array([[2.0**-130], [0.5], [2.0**100]], np.float32)
    want = np.array([[0, 0, 0], [0.5, 0, 0], [2.0**100, 2.0**-26, 0]], np.float32)
    np.testing.assert_array_equal(_kernels.gemm(pool, weight, x), want)
