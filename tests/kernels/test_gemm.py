"""The product: equal to the reference table bit for bit, and to its definition in float64."""

import numpy as np
import numpy.typing as npt
import pytest

from ktransformers.engine import _kernels

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

OUT_ROWS = [1, 15, 17, 33]
ROWS = [*range(1, 18), 28, 64, 65]  # tiles of every number of rows, and several of them
GROUP = 32


def columns(fmt) -> list[int]:
    return [1, 2, 33, 256, 768] if fmt.is_float else sorted({fmt.block, 3 * fmt.block, 256, 768})


def uses_bf16_dot(fmt, isa: str) -> bool:
    return fmt.name in ("BF16", "F8_E4M3") and isa in ("avx512_bf16", "amx", "amx_emulated")


@pytest.fixture(params=[False, True], ids=["", "precise"])
def precise(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def steps_of(groups: F32, precise: bool) -> F32:
    """What becomes 127 of each group [n, groups, 32]: its largest magnitude; in a precise product that of the
    others than four neighbours which are more than three times as large, but 1/128 of theirs at least."""
    largest = np.abs(groups).max(axis=2, keepdims=True)
    if not precise:
        return largest
    quads = np.abs(groups).view(np.uint32).reshape(*groups.shape[:2], 8, 4).max(axis=3) & ~np.uint32(7)
    ordered = np.sort(quads | np.arange(8, dtype=np.uint32), axis=2) | np.uint32(7)
    first, rest = (ordered[:, :, i, None].view(np.float32) for i in (-1, -2))
    far_out = (first > 1e-30) & (first > np.float32(3) * rest)
    return np.where(far_out, np.maximum(rest, first * np.float32(2**-7)), largest)


def as_presented(fmt, isa: str, x: F32, precise: bool) -> F64:
    """The input as the product sees it: int8 with one scale for each 32, bfloat16, or as it is."""
    if uses_bf16_dot(fmt, isa):
        bits = x.view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
        return rounded.view(np.float32).astype(np.float64)
    if fmt.is_float or fmt.name == "F8_E4M3":
        return x.astype(np.float64)
    groups = x.reshape(len(x), -1, GROUP)
    largest = steps_of(groups, precise)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    q = np.rint(groups * inverse).astype(np.int32)
    scale = (largest / np.float32(127)).astype(np.float64)
    return (q * scale).reshape(x.shape)


def inputs(rng: np.random.Generator, rows: int, cols: int) -> F32:
    """Magnitudes that differ between groups, some of them zero; in half of the rows some elements far out of
    their group, in a third one in every group.
    """
    magnitude = np.exp2(rng.integers(-6, 7, (rows, cols // GROUP + 1))).repeat(GROUP, axis=1)[:, :cols]
    x = rng.standard_normal((rows, cols)) * magnitude
    x[:, ::GROUP] *= rng.random((rows, len(range(0, cols, GROUP)))) < 0.9
    far = np.exp2(rng.integers(1, 12, x.shape))
    x *= np.where(rng.random(x.shape) < rng.choice([0, 0.01], (rows, 1)), far, 1)
    one_each = np.unique(np.minimum(np.arange(0, cols, GROUP) + rng.integers(0, GROUP), cols - 1))
    x[np.ix_(rng.random(rows) < 0.33, one_each)] *= 1000
    x[rng.random(rows) < 0.1] = 0
    return x.astype(np.float32)


def same_bits(a: F32, b: F32, what: str) -> None:
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32), err_msg=what)


def weight_of(fmt, isa: str, raw, rows: int, cols: int, threads: int = 1) -> _kernels.Weight:
    return _kernels.pack(_kernels.ThreadPool(threads), isa, fmt.number, rows, cols, raw)


@pytest.mark.parametrize("out_rows", OUT_ROWS)
def test_close_to_its_definition(fmt, isa, rng, pool, out_rows, precise):
    for cols in columns(fmt):
        raw = fmt.random(rng, out_rows, cols)
        x = inputs(rng, 17, cols)
        y = _kernels.gemm(pool, weight_of(fmt, isa, raw, out_rows, cols), x, precise)
        w = fmt.dequantize(raw).astype(np.float64)
        seen = as_presented(fmt, isa, x, precise)
        expected = seen @ w.T
        # Rounding grows with what is summed: a weight's q d and its minimum apart, even if they cancel.
        bound = 2e-6 * (np.abs(seen) @ np.abs(w).T + np.abs(seen).sum(1, keepdims=True) * 4)
        assert y.shape == (17, out_rows)
        assert (np.abs(y - expected) <= bound + 1e-30).all(), f"{cols} columns: {np.abs(y - expected).max()}"


@pytest.mark.parametrize("out_rows", OUT_ROWS)
def test_equal_to_the_reference_bit_for_bit(fmt, isa, rng, pool, out_rows, precise):
    if uses_bf16_dot(fmt, isa):
        pytest.skip("the bfloat16 dot product rounds as the processor does")
    for cols in columns(fmt):
        raw = fmt.random(rng, out_rows, cols)
        weight = weight_of(fmt, isa, raw, out_rows, cols)
        reference = weight_of(fmt, "reference", raw, out_rows, cols)
        for rows in (1, 7, 17):
            x = inputs(rng, rows, cols)
            y = _kernels.gemm(pool, weight, x, precise)
            same_bits(y, _kernels.gemm(pool, reference, x, precise), f"{rows} x {cols}")


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_sums_hold_the_largest_integers(formats, isa, rng, pool, name):
    """Where products are summed in 16 bits, as many of them as fit in the worst case and no more."""
    cols, out_rows, rows = 768, 33, 100
    raw = formats[name].all_ones(rng, out_rows, cols)
    x = np.ones((rows, cols), np.float32)  # 127 each, and -127
    x[1::2] = -1
    weight, reference = (weight_of(formats[name], table, raw, out_rows, cols) for table in (isa, "reference"))
    expected = _kernels.gemm(pool, reference, x[:2].copy(), False)
    same_bits(_kernels.gemm(pool, weight, x[:2].copy(), False), expected, "two rows")
    same_bits(_kernels.gemm(pool, weight, x, False), np.tile(expected, (rows // 2, 1)), f"{rows} rows")


def test_a_row_does_not_depend_on_its_neighbours(fmt, isa, rng, pool, precise):
    cols, out_rows = 768, 33
    weight = weight_of(fmt, isa, fmt.random(rng, out_rows, cols), out_rows, cols)
    x = inputs(rng, max(ROWS), cols)
    together = _kernels.gemm(pool, weight, x, precise)
    for rows in ROWS:
        first = int(rng.integers(0, len(x) - rows + 1))
        y = _kernels.gemm(pool, weight, x[first : first + rows].copy(), precise)
        same_bits(y, together[first : first + rows], f"{rows} rows")


def test_many_rows_whose_weights_are_unpacked_once_are_equal_to_few(fmt, isa, rng, pool, precise):
    """Several blocks along k, chunks of rows, panels that make no whole tile, a padded one, rows over."""
    cols, out_rows, rows = 1536, 100, 131
    weight = weight_of(fmt, isa, fmt.random(rng, out_rows, cols), out_rows, cols)
    x = inputs(rng, rows, cols)
    together = _kernels.gemm(pool, weight, x, precise)
    for first in range(0, rows, 20):
        few = _kernels.gemm(pool, weight, x[first : first + 20].copy(), precise)
        same_bits(few, together[first : first + 20], f"rows from {first}")


def test_a_long_batch_is_cut_without_a_trace(isa, rng, pool, precise):
    """More rows than one chunk holds."""
    cols, out_rows, rows = 1024, 65, 1100
    raw = rng.integers(0, 0x3C, (out_rows, cols // 32 * 20), dtype=np.uint8)  # Q4_1
    weight = _kernels.pack(pool, isa, 3, out_rows, cols, raw)
    x = inputs(rng, rows, cols)
    y = _kernels.gemm(pool, weight, x, precise)
    for row in rng.choice(rows, 8, replace=False):
        same_bits(_kernels.gemm(pool, weight, x[row : row + 1].copy(), precise)[0], y[row], f"row {row}")


@pytest.mark.parametrize("factor", [4, 100, 3e4, 1e30])
def test_what_stands_far_out_does_not_coarsen_the_others(isa, rng, pool, factor):
    """One element as many times as large as the others: they keep 127 steps, or steps of 1/16256 of it."""
    x = rng.uniform(-1, 1, (4, 256)).astype(np.float32)
    x[np.arange(4), rng.integers(0, 256, 4)] = factor
    raw = np.zeros((256, 8, 34), np.uint8)  # Q8_0: the unit matrix
    raw[:, :, 1] = 0x3C
    raw[np.arange(256), np.arange(256) // 32, 2 + np.arange(256) % 32] = 1
    y = _kernels.gemm(pool, _kernels.pack(pool, isa, 8, 256, 256, raw.reshape(-1)), x, precise=True)
    assert (np.abs(y - x) <= max(0.51 / 127, 0.51 * factor / 16256)).all()


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_any_split_of_the_panels_is_the_same(fmt, isa, rng, threads, precise):
    cols, out_rows = 256, 100
    raw = fmt.random(rng, out_rows, cols)
    x = inputs(rng, 5, cols)
    alone = _kernels.gemm(_kernels.ThreadPool(1), weight_of(fmt, isa, raw, out_rows, cols), x, precise)
    weight = weight_of(fmt, isa, raw, out_rows, cols, threads)
    split = _kernels.gemm(_kernels.ThreadPool(threads), weight, x, precise)
    same_bits(split, alone, f"{threads} threads")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_fault_in_the_input_shows_in_its_row_only(fmt, isa, rng, pool, value, precise):
    cols = 256
    raw = fmt.random(rng, 17, cols)
    x = inputs(rng, 4, cols)
    clean = _kernels.gemm(pool, weight_of(fmt, isa, raw, 17, cols), x, precise)
    x[2, 77] = value
    y = _kernels.gemm(pool, weight_of(fmt, isa, raw, 17, cols), x, precise)
    assert not np.isfinite(y[2]).any()
    np.testing.assert_array_equal(np.delete(y, 2, 0), np.delete(clean, 2, 0))


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-37, 1e-30, 1e30, 3e38])
def test_inputs_of_any_size_stay_finite(isa, rng, pool, size, precise):
    """Groups below 1e-36 count as zeros; the largest floats are no special case."""
    x = (rng.uniform(-1, 1, (3, 256)) * size).astype(np.float32)
    x[2, np.arange(256) % GROUP > 0] *= 0.1
    raw = np.zeros((17, 8, 34), np.uint8)
    raw[:, :, 1] = 0x0C  # float16 2^-12
    raw[:, :, 2:] = rng.integers(0, 256, (17, 8, 32))
    weight = _kernels.pack(pool, isa, 8, 17, 256, raw.reshape(-1))
    y = _kernels.gemm(pool, weight, x, precise)
    w = np.stack([weight.row(i) for i in range(17)]).astype(np.float64)
    error = np.abs(y - x.astype(np.float64) @ w.T)
    assert np.isfinite(y).all()
    assert (error <= 0.02 * size * np.abs(w).sum(1) + 1e-36 * np.abs(w).sum(1)).all()
