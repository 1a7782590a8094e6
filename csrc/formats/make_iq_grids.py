"""Prints iq_grids.h: the codebooks of GGUF's IQ formats, from the gguf package (MIT licence), two or three
bits for each value. `python csrc/formats/make_iq_grids.py > csrc/formats/iq_grids.h`"""

import gguf
import numpy as np

HEADER = """\
// Codebooks of GGUF's IQ formats, printed by make_iq_grids.py: an entry is the numbers of its levels, the
// first in the low bits. They are ggml's (https://github.com/ggml-org/ggml, MIT licence, Copyright The ggml
// authors).
#pragma once

namespace kt {
namespace {
"""


def main() -> None:
    print(HEADER)
    for name, cls in (
        ("Iq2Xxs", gguf.quants.IQ2_XXS),
        ("Iq2Xs", gguf.quants.IQ2_XS),
        ("Iq2S", gguf.quants.IQ2_S),
        ("Iq3Xxs", gguf.quants.IQ3_XXS),
        ("Iq3S", gguf.quants.IQ3_S),
        ("Iq1", gguf.quants.IQ1_S),
    ):
        cls.init_grid()
        levels = np.array(cls.grid_map)
        numbers = np.argmax(cls.grid.reshape(cls.grid_shape)[:, :, None] == levels, axis=2)
        bits = 2 if len(levels) < 4 else 3
        entries = (numbers << (bits * np.arange(numbers.shape[1]))).sum(axis=1)
        print(f"constexpr uint16_t k{name}Grid[{len(entries)}] = {{")
        for i in range(0, len(entries), 16):
            print("  " + " ".join(f"0x{e:04x}," for e in entries[i : i + 16]))
        print("};")
    print("\n}  // namespace\n}  // namespace kt")


if __name__ == "__main__":
    main()
