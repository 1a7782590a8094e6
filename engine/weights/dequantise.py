"""What the formats that are ours mean, in plain numpy: the definition that kernels are tested against."""

import numpy as np
import numpy.typing as npt

from ktransformers.engine.weights.formats import F8_E4M3, FORMATS, I4_32, I4_128

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]


def e4m3() -> F32:
    """The value of each byte: sign, 4 bits of exponent (bias 7), 3 of fraction; no infinity, NaN for 0x7F."""
    byte = np.arange(256)
    exponent, fraction = (byte >> 3 & 15).astype(np.float64), (byte & 7) / 8
    normal = np.exp2(exponent - 7) * (1 + fraction)
    values = np.where(exponent > 0, normal, 2.0**-6 * fraction) * np.where(byte < 128, 1, -1)
    values[[0x7F, 0xFF]] = np.nan
    return values.astype(np.float32)


def dequantise(raw: U8, number: int) -> F32:
    """Rows of blocks [rows, bytes] to float32 [rows, cols]; the format is one from 1000 on."""
    fmt = FORMATS[number]
    blocks = np.ascontiguousarray(raw).reshape(len(raw), -1, fmt.nbytes)
    if number == F8_E4M3:
        scale = np.ascontiguousarray(blocks[:, :, :4]).view("<f4")
        values: F32 = (e4m3()[blocks[:, :, 4:]] * scale).reshape(len(raw), -1)
        return values
    header = fmt.nbytes - fmt.block // 2
    nibbles = np.stack((blocks[:, :, header:] & 15, blocks[:, :, header:] >> 4), -1)
    q = nibbles.reshape(*blocks.shape[:2], fmt.block).astype(np.float32)
    if number in (I4_32, I4_128):
        bits = np.ascontiguousarray(blocks[:, :, :2]).view("<u2").astype(np.uint32) << 16
        scale, zero = bits.view(np.float32), np.full((1, 1, 1), 8, np.float32)
    else:
        scale = np.ascontiguousarray(blocks[:, :, :2]).view("<f2").astype(np.float32)
        zero = blocks[:, :, 2:3].astype(np.float32)
    values = ((q - zero) * scale).reshape(len(raw), -1)
    return values
