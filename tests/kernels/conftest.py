"""Every table usable here, a fresh seed for each test, and random weights in every format."""

import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from ktransformers.engine import _kernels
from ktransformers.engine.weights.dequantise import dequantise
from ktransformers.engine.weights.formats import FORMATS as SIZES

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

# Offsets of the float16 fields in a block; all other bits may be anything.
SCALE_OFFSETS = {
    "F32": (), "F16": (), "BF16": (),
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,),
    "IQ1_S": (0,), "IQ1_M": (), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,),
    "IQ3_S": (0,), "MXFP4": (), "F8_E4M3": (), "I4_32": (), "I4_128": (), "I4Z_32": (0,), "I4Z_128": (0,),
}  # fmt: skip


@dataclass(frozen=True)
class WeightFormat:
    """A format as the file has it: GGUF's, or one of Hugging Face's checkpoints put together."""

    name: str

    @property
    def number(self) -> int:
        return next(number for number, fmt in SIZES.items() if fmt.name == self.name)

    @property
    def block(self) -> int:
        """Elements of a block; columns are a multiple of it."""
        return SIZES[self.number].block

    @property
    def block_bytes(self) -> int:
        return SIZES[self.number].nbytes

    @property
    def is_float(self) -> bool:
        return self.block == 1

    def random(self, rng: np.random.Generator, rows: int, cols: int, *, extreme: bool = False) -> U8:
        """Raw rows [rows, bytes]; scales within 2^-9 .. 2^-2, or any finite float16 if `extreme`."""
        if self.is_float:
            values = rng.standard_normal((rows, cols)).astype(np.float32)
            if self.name == "BF16":
                return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
            return values.astype(np.float16 if self.name == "F16" else np.float32).view(np.uint8)
        raw = rng.integers(0, 256, (rows, cols // self.block, self.block_bytes), dtype=np.uint8)
        for offset in SCALE_OFFSETS[self.name]:
            shape = raw.shape[:2]
            if extreme:
                scale = rng.integers(0, 0x7C00, shape, dtype=np.uint16)
                scale[rng.random(shape) < 0.2] = 0
                scale |= rng.integers(0, 2, shape, dtype=np.uint16) << 15
            else:
                magnitude = np.exp2(rng.uniform(-9, -2, shape))
                scale = (magnitude * rng.choice([-1, 1], shape)).astype(np.float16).view(np.uint16)
            raw[:, :, offset] = scale & 0xFF
            raw[:, :, offset + 1] = scale >> 8
        self.other_scales(rng, raw, extreme)
        return raw.reshape(rows, -1)

    def all_ones(self, rng: np.random.Generator, rows: int, cols: int) -> U8:
        """The same with every bit set but those of float16 scales: the largest integers that there are."""
        raw = self.random(rng, rows, cols).reshape(rows, -1, self.block_bytes)
        scales = [byte for offset in SCALE_OFFSETS[self.name] for byte in (offset, offset + 1)]
        raw[:, :, np.setdiff1d(np.arange(self.block_bytes), scales)] = 0xFF
        return raw.reshape(rows, -1)

    def other_scales(self, rng: np.random.Generator, raw: U8, extreme: bool) -> None:
        """Scales that are not float16, and bytes that no file has, in blocks [rows, blocks, bytes]."""
        shape = raw.shape[:2]
        magnitude = np.exp2(rng.uniform(-60, 60, shape) if extreme else rng.uniform(-9, -2, shape))
        scale = (magnitude * rng.choice([-1, 1], shape)).astype(np.float32).view(np.uint32)
        if self.name == "IQ1_M":  # the float16 lies in the upper halves of four bytes
            half = np.exp2(rng.uniform(-9, -2, shape)).astype(np.float16).view(np.uint16)
            for i in range(4):
                raw[:, :, 49 + 2 * i] = raw[:, :, 49 + 2 * i] & 15 | (half >> (4 * i) & 15) << 4
        elif self.name == "MXFP4":
            raw[:, :, 0] = rng.integers(0, 254, shape) if extreme else rng.integers(116, 124, shape)
        elif self.name == "F8_E4M3":
            raw[:, :, :4] = scale[:, :, None].view(np.uint8)
            bits = raw[:, :, 4:]
            bits[bits & 0x7F == 0x7F] ^= 1  # no NaN
        elif self.name in ("I4_32", "I4_128"):
            raw[:, :, :2] = (scale >> 16).astype(np.uint16)[:, :, None].view(np.uint8)
        elif self.name in ("I4Z_32", "I4Z_128"):
            raw[:, :, 2] = rng.integers(0, 17, shape)

    def dequantize(self, raw: U8) -> F32:
        """What the gguf package makes of raw rows, or the definition of a format that is not GGUF's:
        [rows, cols]."""
        if self.number >= 1000:
            return dequantise(raw, self.number)
        kind = gguf.GGMLQuantizationType[self.name]
        if self.is_float and self.name != "BF16":
            return raw.view(np.float16 if self.name == "F16" else np.float32).astype(np.float32)
        return np.asarray(gguf.quants.dequantize(raw, kind), dtype=np.float32)


FORMATS = [WeightFormat(name) for name in SCALE_OFFSETS]


@pytest.fixture(params=FORMATS, ids=lambda f: f.name)
def fmt(request: pytest.FixtureRequest) -> WeightFormat:
    value = request.param
    assert isinstance(value, WeightFormat)
    return value


@pytest.fixture(scope="session")
def formats() -> dict[str, WeightFormat]:
    return {f.name: f for f in FORMATS}


@pytest.fixture(params=_kernels.isas() + _kernels.emulated_isas())
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def rng() -> Iterator[np.random.Generator]:
    """Seeded afresh, or by KT_TEST_SEED; pytest shows the line below when a test fails."""
    seed = int(os.environ.get("KT_TEST_SEED") or secrets.randbits(32))
    print(f"KT_TEST_SEED={seed}")
    yield np.random.default_rng(seed)


@pytest.fixture(scope="session")
def pool() -> _kernels.ThreadPool:
    return _kernels.ThreadPool(2)
