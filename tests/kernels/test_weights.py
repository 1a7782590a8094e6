"""Packing: every element comes back as the gguf package reads it, in the room that it should take."""

import numpy as np
import pytest

from ktransformers.engine import _kernels

PANEL = 16


def columns(fmt) -> list[int]:
    return [1, 2, 33, 256] if fmt.is_float else [fmt.block, 3 * fmt.block, 768]


@pytest.mark.parametrize("rows", [1, 15, 17, 33])
@pytest.mark.parametrize("extreme", [False, True])
def test_rows_come_back_exactly(fmt, isa, rng, pool, rows, extreme):
    for cols in columns(fmt):
        raw = fmt.random(rng, rows, cols, extreme=extreme)
        weight = _kernels.pack(pool, isa, fmt.number, rows, cols, raw)
        with np.errstate(all="ignore"):
            expected = fmt.dequantize(raw)
        for i in range(rows):
            np.testing.assert_array_equal(weight.row(i), expected[i], err_msg=f"row {i} of {rows} x {cols}")


def test_packed_size_is_that_of_the_file(fmt, isa, pool):
    rows, cols = 16 * PANEL, 1536
    raw = np.zeros(rows * cols // fmt.block * fmt.block_bytes, np.uint8)
    weight = _kernels.pack(pool, isa, fmt.number, rows, cols, raw)
    assert raw.nbytes <= weight.nbytes <= 1.03 * raw.nbytes
    assert (weight.rows, weight.cols, weight.format, weight.isa) == (rows, cols, fmt.number, isa)


def test_tables_share_one_layout(fmt, rng, pool):
    """What a row holds does not depend on the table that packed it."""
    raw = fmt.random(rng, 17, 768)
    rows = [
        np.stack([weight.row(i) for i in range(17)])
        for weight in (_kernels.pack(pool, isa, fmt.number, 17, 768, raw) for isa in _kernels.isas())
    ]
    for other in rows[1:]:
        np.testing.assert_array_equal(rows[0], other)
