"""Row kernels: equal on every table bit for bit, and to their definitions in float64, at the extremes too."""

import numpy as np
import numpy.typing as npt
import pytest

from ktransformers.engine import _kernels

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

SIZES = [1, 15, 16, 17, 63, 64, 65, 576, 1000]
OPS = ["add", "silu_mul", "gelu_tanh_mul", "rms_norm", "softcap"]
EXTREMES = np.array(
    [0, 1e-45, 1e-38, 1e-20, 0.6249999, 0.625, 1, 8, 20, 87.3, 88.8, 103.9, 105, 1e4, 1e20, 3.4e38, np.inf],
    np.float32,
)
EXTREMES = np.concatenate([EXTREMES, -EXTREMES])


def silu(x: F64) -> F64:
    with np.errstate(over="ignore"):
        return np.where(x == -np.inf, -0.0, x / (1 + np.exp(-np.maximum(x, -700))))


def gelu_tanh(x: F64) -> F64:
    u = np.sqrt(2 / np.pi) * (x + 0.044715 * np.clip(x, -1e50, 1e50) ** 3)
    return np.where(x == -np.inf, -0.0, x / (1 + np.exp(-2 * np.clip(u, -350, 350))))


def test_equal_to_the_reference_bit_for_bit(isa, rng):
    for op in OPS:
        for n in SIZES:
            a = (rng.standard_normal(n) * np.exp2(rng.integers(-20, 8, n))).astype(np.float32)
            b = rng.standard_normal(n).astype(np.float32) + np.float32(3)
            y = _kernels.elementwise(isa, op, a, b)
            expected = _kernels.elementwise("reference", op, a, b)
            np.testing.assert_array_equal(y.view(np.uint32), expected.view(np.uint32), err_msg=f"{op} of {n}")


@pytest.mark.parametrize(("op", "definition"), [("silu_mul", silu), ("gelu_tanh_mul", gelu_tanh)])
def test_activations_are_accurate(isa, rng, op, definition):
    a = np.concatenate([EXTREMES, rng.uniform(-12, 12, 20000).astype(np.float32)])
    y = _kernels.elementwise(isa, op, a, np.ones_like(a))
    expected = definition(a.astype(np.float64))
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(y[~finite], expected[~finite].astype(np.float32))
    # Below 1e-36 the denominator overflows and the result is zero; elsewhere the rounding of the exponent,
    # |x| 2^-24, comes on top of a few ulp.
    error = np.abs(y[finite] - expected[finite])
    argument = np.minimum(np.abs(a[finite].astype(np.float64)), 200) + 1
    argument = np.where(op == "gelu_tanh_mul", argument**3, argument)
    assert (error <= np.abs(expected[finite]) * 3e-7 * argument + 1e-36).all()


def test_softcap_is_accurate(isa, rng):
    for cap in (1.0, 30.0, 50.0):
        a = np.concatenate([EXTREMES, rng.uniform(-4 * cap, 4 * cap, 20000).astype(np.float32)])
        y = _kernels.elementwise(isa, "softcap", a, np.full_like(a, cap))
        expected = cap * np.tanh(a.astype(np.float64) / cap)
        assert (np.abs(y - expected) <= np.abs(expected) * 4e-7 + 1e-43).all()


def test_rms_norm_is_accurate(isa, rng):
    for n in SIZES:
        a = (rng.standard_normal(n) * 10 ** rng.uniform(-3, 3)).astype(np.float32)
        weight = rng.standard_normal(n).astype(np.float32)
        wide = a.astype(np.float64)
        expected = wide / np.sqrt((wide**2).mean() + 1e-6) * weight
        y = _kernels.elementwise(isa, "rms_norm", a, weight)
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("op", OPS)
def test_nan_stays_nan_and_none_is_invented(isa, rng, op):
    a = rng.standard_normal(40).astype(np.float32)
    b = np.ones_like(a)
    assert not np.isnan(_kernels.elementwise(isa, op, a, b)).any()
    a[5] = np.nan
    y = _kernels.elementwise(isa, op, a, b)
    assert np.isnan(y[5])
    assert op == "rms_norm" or not np.isnan(np.delete(y, 5)).any()
