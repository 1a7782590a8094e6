// GGUF's formats below three bits, whose elements are entries of codebooks: IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS
// and IQ3_S. A panel keeps the file's indices, signs and scales, each in rows of a byte for all outputs; a product looks
// a group of 32 up once for all rows of a tile. (The layouts of the blocks: ggml-quants.c of ggml.)
//
// What each says of itself:
//   kFileBytes          a block of 256 in the file
//   kHeader, kBytes     in the panel, for a block what its groups share, and for each group
//   write_header(block, lane, header), write_group(block, g, lane, packed)
//   scales(header, g, packed)      d of the two halves of a group
//   quad(header, g, packed, q)     elements 4q .. 4q + 3, plus kCodebookBias
#pragma once
#include "formats/iq_grids.h"

namespace kt {
namespace {

constexpr int kRow = kPanelRows;  // bytes of a row
constexpr int kCodebookBias = 64;

// Codebook entries with their levels as bytes, four to a word.
template <int Words>
struct Codebook {
  alignas(64) uint32_t words[Words];
};

template <int Entries, int PerEntry, int Bits>
constexpr Codebook<Entries * PerEntry / 4> codebook(const uint16_t (&grid)[Entries], const uint8_t (&levels)[1 << Bits]) {
  Codebook<Entries * PerEntry / 4> book{};
  for (int e = 0; e < Entries; ++e)
    for (int i = 0; i < PerEntry; ++i) {
      const uint32_t level = levels[grid[e] >> (Bits * i) & ((1 << Bits) - 1)];
      book.words[(e * PerEntry + i) / 4] |= level << (8 * (i % 4));
    }
  return book;
}

constexpr uint8_t kIq2Levels[4] = {8, 25, 43, 0};
constexpr uint8_t kIq3XxsLevels[8] = {4, 12, 20, 28, 36, 44, 52, 62};
constexpr uint8_t kIq3SLevels[8] = {1, 3, 5, 7, 9, 11, 13, 15};
constexpr uint8_t kIq1Levels[4] = {56, 64, 72, 0};  // 64 + 8 * (-1, 0, 1)
constexpr auto kIq2XxsBook = codebook<256, 8, 2>(kIq2XxsGrid, kIq2Levels);
constexpr auto kIq2XsBook = codebook<512, 8, 2>(kIq2XsGrid, kIq2Levels);
constexpr auto kIq2SBook = codebook<1024, 8, 2>(kIq2SGrid, kIq2Levels);
constexpr auto kIq3XxsBook = codebook<256, 4, 3>(kIq3XxsGrid, kIq3XxsLevels);
constexpr auto kIq3SBook = codebook<512, 4, 3>(kIq3SGrid, kIq3SLevels);
constexpr auto kIq1Book = codebook<2048, 8, 2>(kIq1Grid, kIq1Levels);

// Magnitudes of four bytes (at most 63) with the signs in the low four bits of `signs`, plus 64. No byte carries into
// the next.
inline Bytes with_signs(Ints magnitudes, Ints signs) {
  const Ints spread = signs | shift_left<7>(signs) | shift_left<14>(signs) | shift_left<21>(signs);
  const Ints ones = spread & set1_int(0x01010101);
  const Ints negative = magnitudes & (shift_left<8>(ones) - ones);
  return as_bytes((magnitudes + set1_int(0x40404040)) - (negative + negative));
}

// Signs of eight elements of which seven are stored: their number is even.
inline Ints eighth_sign(Ints seven) {
  Ints parity = seven ^ shift_right<4>(seven);
  parity = parity ^ shift_right<2>(parity);
  parity = parity ^ shift_right<1>(parity);
  return seven | shift_left<7>(parity & set1_int(1));
}

inline Ints nibble(const uint8_t* row, int which) { return shift_right(load_u8(row), 4 * which) & set1_int(15); }

// d * (0.5 + scale) * factor
inline Floats half_scale(Floats d, Ints scale, float factor) {
  return d * (set1(0.5f) + to_floats(scale)) * set1(factor);
}

struct Iq256 {
  static constexpr int kElements = 256, kGroups = 8;
};

// d, for each group four indices and a word: four times seven signs, then a scale of four bits.
struct IQ2_XXS : Iq256 {
  static constexpr int kFileBytes = 66, kHeader = kF16Row, kBytes = 8 * kRow;
  static void write_header(const uint8_t* block, int lane, uint8_t* header) { copy_f16(block, lane, header); }
  static void write_group(const uint8_t* block, int g, int lane, uint8_t* packed) {
    const uint8_t* from = block + 2 + 8 * g;
    for (int i = 0; i < 4; ++i) packed[i * kRow + lane] = from[i];
    __builtin_memcpy(packed + 4 * kRow + 4 * lane, from + 4, 4);
  }
  static Scales scales(const uint8_t* header, int, const uint8_t* packed) {
    Scales s;
    s.d[0] = s.d[1] = half_scale(f16_at(header), shift_right<28>(load_ints(packed + 4 * kRow)), 0.25f);
    return s;
  }
  static Bytes quad(const uint8_t*, int, const uint8_t* packed, int q) {
    const Ints index = load_u8(packed + q / 2 * kRow);
    const Ints seven = shift_right(load_ints(packed + 4 * kRow), 7 * (q / 2)) & set1_int(127);
    const Ints signs = shift_right(eighth_sign(seven), 4 * (q % 2));
    return with_signs(gather(kIq2XxsBook.words, shift_left<1>(index) + set1_int(q % 2)), signs & set1_int(15));
  }
};

// d, 32 words of 16 bits (an index of nine, seven signs), eight bytes with the scales of two halves.
struct IQ2_XS : Iq256 {
  static constexpr int kFileBytes = 74, kHeader = kF16Row + 8 * kRow, kBytes = 8 * kRow;
  static void write_header(const uint8_t* block, int lane, uint8_t* header) {
    copy_f16(block, lane, header);
    for (int g = 0; g < 8; ++g) header[kF16Row + g * kRow + lane] = block[66 + g];
  }
  static void write_group(const uint8_t* block, int g, int lane, uint8_t* packed) {
    for (int i = 0; i < 8; ++i) packed[i * kRow + lane] = block[2 + 8 * g + i];
  }
  static Scales scales(const uint8_t* header, int g, const uint8_t*) {
    Scales s;
    for (int j = 0; j < 2; ++j) s.d[j] = half_scale(f16_at(header), nibble(header + kF16Row + g * kRow, j), 0.25f);
    return s;
  }
  static Bytes quad(const uint8_t*, int, const uint8_t* packed, int q) {
    const Ints low = load_u8(packed + q / 2 * 2 * kRow), high = load_u8(packed + (q / 2 * 2 + 1) * kRow);
    const Ints index = low | shift_left<8>(high & set1_int(1));
    const Ints signs = shift_right(eighth_sign(shift_right<1>(high)), 4 * (q % 2)) & set1_int(15);
    return with_signs(gather(kIq2XsBook.words, shift_left<1>(index) + set1_int(q % 2)), signs);
  }
};

// d, the low bytes of 32 indices, 32 bytes of signs, eight bytes with two high bits of four indices, scales as IQ2_XS.
struct IQ2_S : Iq256 {
  static constexpr int kFileBytes = 82, kHeader = kF16Row + 16 * kRow, kBytes = 8 * kRow;
  static void write_header(const uint8_t* block, int lane, uint8_t* header) {
    copy_f16(block, lane, header);
    for (int i = 0; i < 16; ++i) header[kF16Row + i * kRow + lane] = block[66 + i];
  }
  static void write_group(const uint8_t* block, int g, int lane, uint8_t* packed) {
    for (int i = 0; i < 4; ++i) {
      packed[i * kRow + lane] = block[2 + 4 * g + i];
      packed[(4 + i) * kRow + lane] = block[34 + 4 * g + i];
    }
  }
  static Scales scales(const uint8_t* header, int g, const uint8_t*) {
    Scales s;
    for (int j = 0; j < 2; ++j)
      s.d[j] = half_scale(f16_at(header), nibble(header + kF16Row + (8 + g) * kRow, j), 0.25f);
    return s;
  }
  static Bytes quad(const uint8_t* header, int g, const uint8_t* packed, int q) {
    const Ints high = shift_right(load_u8(header + kF16Row + g * kRow), q / 2 * 2) & set1_int(3);
    const Ints index = load_u8(packed + q / 2 * kRow) | shift_left<8>(high);
    const Ints signs = nibble(packed + (4 + q / 2) * kRow, q % 2);
    return with_signs(gather(kIq2SBook.words, shift_left<1>(index) + set1_int(q % 2)), signs);
  }
};

// d, 64 indices, then for each group a word as in IQ2_XXS.
struct IQ3_XXS : Iq256 {
  static constexpr int kFileBytes = 98, kHeader = kF16Row, kBytes = 12 * kRow;
  static void write_header(const uint8_t* block, int lane, uint8_t* header) { copy_f16(block, lane, header); }
  static void write_group(const uint8_t* block, int g, int lane, uint8_t* packed) {
    for (int i = 0; i < 8; ++i) packed[i * kRow + lane] = block[2 + 8 * g + i];
    __builtin_memcpy(packed + 8 * kRow + 4 * lane, block + 66 + 4 * g, 4);
  }
  static Scales scales(const uint8_t* header, int, const uint8_t* packed) {
    Scales s;
    s.d[0] = s.d[1] = half_scale(f16_at(header), shift_right<28>(load_ints(packed + 8 * kRow)), 0.5f);
    return s;
  }
  static Bytes quad(const uint8_t*, int, const uint8_t* packed, int q) {
    const Ints seven = shift_right(load_ints(packed + 8 * kRow), 7 * (q / 2)) & set1_int(127);
    const Ints signs = shift_right(eighth_sign(seven), 4 * (q % 2)) & set1_int(15);
    return with_signs(gather(kIq3XxsBook.words, load_u8(packed + q * kRow)), signs);
  }
};

// d, the low bytes of 64 indices, eight bytes with the high bits of eight, 32 bytes of signs, four with two scales.
struct IQ3_S : Iq256 {
  static constexpr int kFileBytes = 110, kHeader = kF16Row + 12 * kRow, kBytes = 12 * kRow;
  static void write_header(const uint8_t* block, int lane, uint8_t* header) {
    copy_f16(block, lane, header);
    for (int g = 0; g < 8; ++g) header[kF16Row + g * kRow + lane] = block[66 + g];
    for (int i = 0; i < 4; ++i) header[kF16Row + (8 + i) * kRow + lane] = block[106 + i];
  }
  static void write_group(const uint8_t* block, int g, int lane, uint8_t* packed) {
    for (int i = 0; i < 8; ++i) packed[i * kRow + lane] = block[2 + 8 * g + i];
    for (int i = 0; i < 4; ++i) packed[(8 + i) * kRow + lane] = block[74 + 4 * g + i];
  }
  static Scales scales(const uint8_t* header, int g, const uint8_t*) {
    const Ints scale = nibble(header + kF16Row + (8 + g / 2) * kRow, g % 2);
    Scales s;
    s.d[0] = s.d[1] = f16_at(header) * to_floats(shift_left<1>(scale) + set1_int(1));
    return s;
  }
  static Bytes quad(const uint8_t* header, int g, const uint8_t* packed, int q) {
    const Ints high = shift_right(load_u8(header + kF16Row + g * kRow), q) & set1_int(1);
    const Ints index = load_u8(packed + q * kRow) | shift_left<8>(high);
    return with_signs(gather(kIq3SBook.words, index), nibble(packed + (8 + q / 2) * kRow, q % 2));
  }
};

// An entry's levels are -1, 0 and 1 with an eighth added or taken away: integers of eighths. `negative` is 1 where it is
// taken away.
inline Bytes with_eighth(Ints entry, Ints negative) {
  const Ints ones = set1_int(0x01010101), minus = set1_int(0) - negative;  // all ones where negative
  return as_bytes((entry + ones) - (minus & set1_int(0x02020202)));
}

// d, the low bytes of 32 indices, for each group a word of 16 bits: four times three high bits, a scale of three bits,
// the sign of the eighth.
struct IQ1_S : Iq256 {
  static constexpr int kFileBytes = 50, kHeader = kF16Row, kBytes = 6 * kRow;
  static void write_header(const uint8_t* block, int lane, uint8_t* header) { copy_f16(block, lane, header); }
  static void write_group(const uint8_t* block, int g, int lane, uint8_t* packed) {
    for (int i = 0; i < 4; ++i) packed[i * kRow + lane] = block[2 + 4 * g + i];
    for (int i = 0; i < 2; ++i) packed[(4 + i) * kRow + lane] = block[34 + 2 * g + i];
  }
  static Ints word(const uint8_t* packed) {
    return load_u8(packed + 4 * kRow) | shift_left<8>(load_u8(packed + 5 * kRow));
  }
  static Scales scales(const uint8_t* header, int, const uint8_t* packed) {
    const Ints scale = shift_right<12>(word(packed)) & set1_int(7);
    Scales s;
    s.d[0] = s.d[1] = f16_at(header) * to_floats(shift_left<1>(scale) + set1_int(1)) * set1(0.125f);
    return s;
  }
  static Bytes quad(const uint8_t*, int, const uint8_t* packed, int q) {
    const Ints high = shift_right(word(packed), 3 * (q / 2)) & set1_int(7);
    const Ints index = load_u8(packed + q / 2 * kRow) | shift_left<8>(high);
    const Ints entry = gather(kIq1Book.words, shift_left<1>(index) + set1_int(q % 2));
    return with_eighth(entry, shift_right<15>(word(packed)));
  }
};

// The low bytes of 32 indices; 16 bytes, a half for each entry: three high bits and the sign of its eighth; four words of
// 16 bits: four scales of three bits, and a quarter of d.
struct IQ1_M : Iq256 {
  static constexpr int kFileBytes = 56, kHeader = 8 * kRow, kBytes = 6 * kRow;
  static void write_header(const uint8_t* block, int lane, uint8_t* header) {
    uint16_t d = 0;
    for (int i = 0; i < 4; ++i) d = static_cast<uint16_t>(d | (block[49 + 2 * i] >> 4) << (4 * i));
    __builtin_memcpy(header + 2 * lane, &d, 2);
    // What is left of the words, 48 bits: twelve for each pair of groups, in six bytes.
    uint64_t left = 0;
    for (int i = 0; i < 4; ++i) {
      const uint64_t twelve = block[48 + 2 * i] | uint64_t{block[49 + 2 * i] & 15u} << 8;
      left |= twelve << (12 * i);
    }
    for (int i = 0; i < 6; ++i) header[kF16Row + i * kRow + lane] = static_cast<uint8_t>(left >> (8 * i));
  }
  static void write_group(const uint8_t* block, int g, int lane, uint8_t* packed) {
    for (int i = 0; i < 4; ++i) packed[i * kRow + lane] = block[4 * g + i];
    for (int i = 0; i < 2; ++i) packed[(4 + i) * kRow + lane] = block[32 + 2 * g + i];
  }
  static Scales scales(const uint8_t* header, int g, const uint8_t*) {
    Scales s;
    for (int j = 0; j < 2; ++j) {
      const int bit = 3 * (2 * g + j), byte = bit / 8;
      const uint8_t* rows = header + kF16Row;
      const Ints both = load_u8(rows + byte * kRow) | shift_left<8>(load_u8(rows + (byte < 5 ? byte + 1 : 5) * kRow));
      const Ints scale = shift_right(both, bit % 8) & set1_int(7);
      s.d[j] = f16_at(header) * to_floats(shift_left<1>(scale) + set1_int(1)) * set1(0.125f);
    }
    return s;
  }
  static Bytes quad(const uint8_t*, int, const uint8_t* packed, int q) {
    const Ints half = nibble(packed + (4 + q / 4) * kRow, q / 2 % 2);
    const Ints index = load_u8(packed + q / 2 * kRow) | shift_left<8>(half & set1_int(7));
    const Ints entry = gather(kIq1Book.words, shift_left<1>(index) + set1_int(q % 2));
    return with_eighth(entry, shift_right<3>(half));
  }
};

}  // namespace
}  // namespace kt
