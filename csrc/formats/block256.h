// GGUF's formats with blocks of 256 elements (k-quants) and IQ4_XS. A block becomes one header and eight groups; its
// scales stay integers times one float16, as in the file. (block32.h says what each name means.)
#pragma once

namespace kt {
namespace {

template <class PackedQuads, int FileBytes, int Header, int Bias, int Subgroups, bool HasMin>
struct Block256 {
  using Quads = PackedQuads;
  static constexpr int kElements = 256, kFileBytes = FileBytes, kGroups = 8, kHeader = Header;
  static constexpr int kBias = Bias, kSubgroups = Subgroups;
  static constexpr bool kHasMin = HasMin;
  template <int Q>
  static Bytes quad(const uint8_t* quads) {
    return Quads::template quad<Q>(quads);
  }
};

// File: scales[16] (low nibble scale, high nibble minimum), qs[64], d, dmin.
// Header: d, dmin, the 16 bytes of scales.
struct Q2_K : Block256<Quads2, 84, 320, 0, 2, true> {
  static void read(const uint8_t* block, int g, uint8_t* q) {
    const uint8_t* qs = block + 16 + 32 * (g / 4);
    for (int j = 0; j < 32; ++j) q[j] = (qs[j] >> (2 * (g % 4))) & 3;
  }
  static void write_header(const uint8_t* block, int g, int, int lane, uint8_t* header) {
    copy_f16(block + 80, lane, header);
    copy_f16(block + 82, lane, header + kF16Row);
    for (int j = 2 * g; j < 2 * g + 2; ++j) header[2 * kF16Row + j * kPanelRows + lane] = block[j];
  }
  static Scales scales(const uint8_t* header, int g) {
    const Floats d = f16_at(header), dmin = f16_at(header + kF16Row), zero = set1(0.0f);
    Scales s;
    for (int j = 0; j < 2; ++j) {
      const Ints both = load_u8(header + 2 * kF16Row + (2 * g + j) * kPanelRows);
      s.d[j] = d * to_floats(both & set1_int(15));
      s.m[j] = zero - dmin * to_floats(shift_right<4>(both));
    }
    return s;
  }
};

// File: hmask[32], qs[64], scales[12], d. Header: d, the 12 bytes of scales: sixteen of 6 bits, the low four bits of
// scale s in a nibble of byte s % 8, the high two in byte 8 + s % 4.
struct Q3_K : Block256<Quads3, 110, 256, 4, 2, false> {
  static void read(const uint8_t* block, int g, uint8_t* q) {
    const uint8_t* qs = block + 32 + 32 * (g / 4);
    for (int j = 0; j < 32; ++j) {
      q[j] = static_cast<uint8_t>(((qs[j] >> (2 * (g % 4))) & 3) | ((block[j] >> g) & 1) << 2);
    }
  }
  static void write_header(const uint8_t* block, int, int, int lane, uint8_t* header) {
    copy_f16(block + 108, lane, header);
    for (int j = 0; j < 12; ++j) header[kF16Row + j * kPanelRows + lane] = block[96 + j];
  }
  static Scales scales(const uint8_t* header, int g) {
    const Floats d = f16_at(header);
    Scales s;
    for (int j = 0; j < 2; ++j) {
      const int k = 2 * g + j;
      const uint8_t* bytes = header + kF16Row;
      const Ints low = shift_right(load_u8(bytes + (k % 8) * kPanelRows), 4 * (k / 8)) & set1_int(15);
      const Ints high = shift_right(load_u8(bytes + (8 + k % 4) * kPanelRows), 2 * (k / 4)) & set1_int(3);
      s.d[j] = d * to_floats((low | shift_left<4>(high)) - set1_int(32));
    }
    return s;
  }
};

// Scale and minimum j of the eight in the 12 bytes that Q4_K and Q5_K share, 6 bits each.
inline uint8_t scale6(const uint8_t* b, int j) {
  return static_cast<uint8_t>(j < 4 ? b[j] & 63 : (b[j + 4] & 15) | (b[j - 4] >> 6) << 4);
}
inline uint8_t min6(const uint8_t* b, int j) {
  return static_cast<uint8_t>(j < 4 ? b[j + 4] & 63 : (b[j + 4] >> 4) | (b[j] >> 6) << 4);
}

// File: d, dmin, scales[12], then the integers. Header: d, dmin, eight scales and eight minimums as bytes.
template <class PackedQuads, int FileBytes>
struct MinBlock256 : Block256<PackedQuads, FileBytes, 320, 0, 1, true> {
  static void write_header(const uint8_t* block, int g, int, int lane, uint8_t* header) {
    copy_f16(block, lane, header);
    copy_f16(block + 2, lane, header + kF16Row);
    header[2 * kF16Row + g * kPanelRows + lane] = scale6(block + 4, g);
    header[2 * kF16Row + (8 + g) * kPanelRows + lane] = min6(block + 4, g);
  }
  static Scales scales(const uint8_t* header, int g) {
    const uint8_t* bytes = header + 2 * kF16Row + g * kPanelRows;
    Scales s;
    s.d[0] = f16_at(header) * to_floats(load_u8(bytes));
    s.m[0] = set1(0.0f) - f16_at(header + kF16Row) * to_floats(load_u8(bytes + 8 * kPanelRows));
    return s;
  }
};

inline void read_k_nibbles(const uint8_t* qs, int g, uint8_t* q) {
  qs += 32 * (g / 2);
  for (int j = 0; j < 32; ++j) q[j] = (qs[j] >> (4 * (g % 2))) & 15;
}

// d, dmin, scales[12], qs[128]
struct Q4_K : MinBlock256<Quads4, 144> {
  static void read(const uint8_t* block, int g, uint8_t* q) { read_k_nibbles(block + 16, g, q); }
};

// d, dmin, scales[12], qh[32], qs[128]
struct Q5_K : MinBlock256<Quads5, 176> {
  static void read(const uint8_t* block, int g, uint8_t* q) {
    read_k_nibbles(block + 48, g, q);
    for (int j = 0; j < 32; ++j) q[j] = static_cast<uint8_t>(q[j] | ((block[16 + j] >> g) & 1) << 4);
  }
};

// File: ql[128], qh[64], int8 scales[16], d. Header: d, the 16 scales.
struct Q6_K : Block256<Quads6, 210, 320, 32, 2, false> {
  static void read(const uint8_t* block, int g, uint8_t* q) {
    const uint8_t* ql = block + 64 * (g / 4) + 32 * (g % 2);
    const uint8_t* qh = block + 128 + 32 * (g / 4);
    for (int j = 0; j < 32; ++j) {
      const int low = (ql[j] >> (4 * (g % 4 / 2))) & 15, high = (qh[j] >> (2 * (g % 4))) & 3;
      q[j] = static_cast<uint8_t>(low | high << 4);
    }
  }
  static void write_header(const uint8_t* block, int g, int, int lane, uint8_t* header) {
    copy_f16(block + 208, lane, header);
    for (int j = 2 * g; j < 2 * g + 2; ++j) header[kF16Row + j * kPanelRows + lane] = block[192 + j];
  }
  static Scales scales(const uint8_t* header, int g) {
    const Floats d = f16_at(header);
    Scales s;
    for (int j = 0; j < 2; ++j) s.d[j] = d * to_floats(load_i8(header + kF16Row + (2 * g + j) * kPanelRows));
    return s;
  }
};

// File: d, scales_h[2], scales_l[4], qs[128]; eight scales of 6 bits, 32 to be subtracted. Header: d, eight int8.
struct IQ4_XS : Block256<Quads4, 136, 192, 128, 1, false> {
  static void read(const uint8_t* block, int g, uint8_t* q) { read_nibbles(block + 8 + 16 * g, q); }
  static void write_header(const uint8_t* block, int g, int, int lane, uint8_t* header) {
    copy_f16(block, lane, header);
    const int low = (block[4 + g / 2] >> (4 * (g % 2))) & 15, high = (block[2 + g / 4] >> (2 * (g % 4))) & 3;
    header[kF16Row + g * kPanelRows + lane] = static_cast<uint8_t>((low | high << 4) - 32);
  }
  static Scales scales(const uint8_t* header, int g) {
    Scales s;
    s.d[0] = f16_at(header) * to_floats(load_i8(header + kF16Row + g * kPanelRows));
    return s;
  }
  template <int Q>
  static Bytes quad(const uint8_t* quads) {
    return lookup16(kIq4Levels, Quads4::quad<Q>(quads));
  }
};

}  // namespace
}  // namespace kt
