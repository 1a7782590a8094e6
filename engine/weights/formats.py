"""How weights are stored: every format that a tensor may have, by its number.

Numbers below 1000 are GGUF's tensor types, those from 1000 on are ours, for checkpoints in Hugging Face's
layout: their elements, scales and zero points lie in tensors of their own and are put together to blocks
(weights.quantised), so that here, too, a row is a run of blocks.
"""

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt


class Format(NamedTuple):
    """How elements are stored: `block` consecutive elements of a row take `nbytes` bytes."""

    name: str
    block: int
    nbytes: int


F32: Final = 0
F16: Final = 1
BF16: Final = 30
MXFP4: Final = 39
F8_E4M3: Final = 1000
"""float32 scale, 128 bytes: DeepSeek's FP8."""
I4_32: Final = 1001
I4_128: Final = 1002
"""bfloat16 scale, nibbles (the even element in the low half); scale * (nibble - 8): compressed-tensors."""
I4Z_32: Final = 1003
I4Z_128: Final = 1004
"""float16 scale, zero point as a byte, nibbles; scale * (nibble - zero): GPTQ and AWQ."""

GGUF_FORMATS: Final[dict[int, Format]] = {
    0: Format("F32", 1, 4),
    1: Format("F16", 1, 2),
    2: Format("Q4_0", 32, 18),
    3: Format("Q4_1", 32, 20),
    6: Format("Q5_0", 32, 22),
    7: Format("Q5_1", 32, 24),
    8: Format("Q8_0", 32, 34),
    9: Format("Q8_1", 32, 40),
    10: Format("Q2_K", 256, 84),
    11: Format("Q3_K", 256, 110),
    12: Format("Q4_K", 256, 144),
    13: Format("Q5_K", 256, 176),
    14: Format("Q6_K", 256, 210),
    15: Format("Q8_K", 256, 292),
    16: Format("IQ2_XXS", 256, 66),
    17: Format("IQ2_XS", 256, 74),
    18: Format("IQ3_XXS", 256, 98),
    19: Format("IQ1_S", 256, 50),
    20: Format("IQ4_NL", 32, 18),
    21: Format("IQ3_S", 256, 110),
    22: Format("IQ2_S", 256, 82),
    23: Format("IQ4_XS", 256, 136),
    24: Format("I8", 1, 1),
    25: Format("I16", 1, 2),
    26: Format("I32", 1, 4),
    27: Format("I64", 1, 8),
    28: Format("F64", 1, 8),
    29: Format("IQ1_M", 256, 56),
    30: Format("BF16", 1, 2),
    34: Format("TQ1_0", 256, 54),
    35: Format("TQ2_0", 256, 66),
    39: Format("MXFP4", 32, 17),
}
"""Every tensor type of GGUF whose size is known."""

FORMATS: Final[dict[int, Format]] = {
    **GGUF_FORMATS,
    F8_E4M3: Format("F8_E4M3", 128, 132),
    I4_32: Format("I4_32", 32, 18),
    I4_128: Format("I4_128", 128, 66),
    I4Z_32: Format("I4Z_32", 32, 19),
    I4Z_128: Format("I4Z_128", 128, 67),
}
"""Every format. Executors compute with fewer."""


def as_floats(raw: npt.NDArray[np.uint8], number: int) -> npt.NDArray[np.float32] | None:
    """Elements of F32, F16 or BF16 in float32, copied; None for any other format."""
    if number == F32:
        return np.frombuffer(raw.tobytes(), "<f4")
    if number == F16:
        return np.frombuffer(raw.tobytes(), "<f2").astype(np.float32)
    if number == BF16:
        return (np.frombuffer(raw.tobytes(), "<u2").astype(np.uint32) << 16).view(np.float32)
    return None
