// GGUF's formats with blocks of 32: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL.
//
// What every integer format says of itself (k-quants too):
//   kElements, kFileBytes  a block in the file
//   Quads                  the packing of its integers (quads.h)
//   kGroups, kHeader       the groups of 32 that share one header in the panel, and its bytes; then come their quads
//   kBias                  an element is d * (integer - kBias) + m
//   kSubgroups             1, or 2: each half of a group has its own d and m
//   kHasMin                whether there is an m
//   read(block, g, q)      the integers of group g of a block in the file
//   write_header(block, g, i, lane, header)   that group's scales to place i of the header, for one output
//   scales(header, i)      d and m of 16 outputs
//   quad<Q>(quads)         eight bits for each element (at most 7 significant ones unless kBias is 128)
#pragma once

namespace kt {
namespace {

struct Scales {
  Floats d[2], m[2];
};

inline void copy_f16(const uint8_t* src, int lane, uint8_t* dst) { __builtin_memcpy(dst + 2 * lane, src, 2); }
inline Floats f16_at(const uint8_t* p) { return load_f16(reinterpret_cast<const uint16_t*>(p)); }
constexpr int kF16Row = 2 * kPanelRows;

// Eight elements at a time in a 64-bit word: compilers make single bytes of loops this short.
constexpr uint64_t kEachByte = 0x0101010101010101;

inline void read_nibbles(const uint8_t* qs, uint8_t* q) {
  for (int j = 0; j < 16; j += 8) {
    uint64_t both;
    __builtin_memcpy(&both, qs + j, 8);
    const uint64_t low = both & (kEachByte * 15), high = (both >> 4) & (kEachByte * 15);
    __builtin_memcpy(q + j, &low, 8);
    __builtin_memcpy(q + j + 16, &high, 8);
  }
}

inline void add_fifth_bits(const uint8_t* qh, uint8_t* q) {
  for (int j = 0; j < 4; ++j) {
    // Bit i of the byte alone in byte i; adding 127 carries any that is set to the top.
    const uint64_t apart = (qh[j] * kEachByte) & 0x8040201008040201;
    uint64_t word;
    __builtin_memcpy(&word, q + 8 * j, 8);
    word |= ((apart + kEachByte * 127) >> 3) & (kEachByte * 16);
    __builtin_memcpy(q + 8 * j, &word, 8);
  }
}

// One float16 scale for each block. Two groups share a header, so that it is a whole cache line.
template <class PackedQuads, int FileBytes, int Bias>
struct SymmetricBlock {
  using Quads = PackedQuads;
  static constexpr int kElements = 32, kFileBytes = FileBytes, kGroups = 2, kHeader = 2 * kF16Row;
  static constexpr int kBias = Bias, kSubgroups = 1;
  static constexpr bool kHasMin = false;
  static void write_header(const uint8_t* block, int, int i, int lane, uint8_t* header) {
    copy_f16(block, lane, header + i * kF16Row);
  }
  static Scales scales(const uint8_t* header, int i) {
    Scales s;
    s.d[0] = f16_at(header + i * kF16Row);
    return s;
  }
  template <int Q>
  static Bytes quad(const uint8_t* quads) {
    return Quads::template quad<Q>(quads);
  }
};

// A scale and a minimum, both float16.
template <class PackedQuads, int FileBytes>
struct MinBlock {
  using Quads = PackedQuads;
  static constexpr int kElements = 32, kFileBytes = FileBytes, kGroups = 1, kHeader = 2 * kF16Row;
  static constexpr int kBias = 0, kSubgroups = 1;
  static constexpr bool kHasMin = true;
  static void write_header(const uint8_t* block, int, int, int lane, uint8_t* header) {
    copy_f16(block, lane, header);
    copy_f16(block + 2, lane, header + kF16Row);
  }
  static Scales scales(const uint8_t* header, int) {
    Scales s;
    s.d[0] = f16_at(header);
    s.m[0] = f16_at(header + kF16Row);
    return s;
  }
  template <int Q>
  static Bytes quad(const uint8_t* quads) {
    return Quads::template quad<Q>(quads);
  }
};

// d, qs[16]
struct Q4_0 : SymmetricBlock<Quads4, 18, 8> {
  static void read(const uint8_t* block, int, uint8_t* q) { read_nibbles(block + 2, q); }
};

// d, m, qs[16]
struct Q4_1 : MinBlock<Quads4, 20> {
  static void read(const uint8_t* block, int, uint8_t* q) { read_nibbles(block + 4, q); }
};

// d, qh[4], qs[16]
struct Q5_0 : SymmetricBlock<Quads5, 22, 16> {
  static void read(const uint8_t* block, int, uint8_t* q) {
    read_nibbles(block + 6, q);
    add_fifth_bits(block + 2, q);
  }
};

// d, m, qh[4], qs[16]
struct Q5_1 : MinBlock<Quads5, 24> {
  static void read(const uint8_t* block, int, uint8_t* q) {
    read_nibbles(block + 8, q);
    add_fifth_bits(block + 4, q);
  }
};

// d, int8 qs[32]
struct Q8_0 : SymmetricBlock<Quads8, 34, 128> {
  static void read(const uint8_t* block, int, uint8_t* q) {
    for (int j = 0; j < 32; ++j) q[j] = block[2 + j] ^ 0x80;
  }
};

// The 16 levels of IQ4, with 128 added.
alignas(16) constexpr uint8_t kIq4Levels[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                                129, 141, 153, 166, 181, 197, 217, 241};

// d, qs[16]
struct IQ4_NL : SymmetricBlock<Quads4, 18, 128> {
  static void read(const uint8_t* block, int, uint8_t* q) { read_nibbles(block + 2, q); }
  template <int Q>
  static Bytes quad(const uint8_t* quads) {
    return lookup16(kIq4Levels, Quads4::quad<Q>(quads));
  }
};

}  // namespace
}  // namespace kt
