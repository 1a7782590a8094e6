// Formats of Hugging Face's checkpoints. Their integers, scales and zero points lie in tensors of their own there; the
// loader (engine/weights/quantised.py) puts them together to the blocks below. And MXFP4, which GGUF has, too.
// (block32.h says what each name of an integer format means.)
#pragma once

namespace kt {
namespace {

// Element 2j in the low half of byte j, 2j + 1 in the high one.
inline void read_nibble_pairs(const uint8_t* qs, uint8_t* q) {
  for (int j = 0; j < 16; ++j) {
    q[2 * j] = qs[j] & 15;
    q[2 * j + 1] = qs[j] >> 4;
  }
}

// The levels of e2m1, twice, with 128 added.
alignas(16) constexpr uint8_t kE2m1Levels[16] = {128, 129, 130, 131, 132, 134, 136, 140,
                                                 128, 127, 126, 125, 124, 122, 120, 116};

// File: e8m0 scale, qs[16] in GGUF's order. Header: the scales of four groups as bytes.
struct MXFP4 {
  using Quads = Quads4;
  static constexpr int kElements = 32, kFileBytes = 17, kGroups = 4, kHeader = 4 * kPanelRows;
  static constexpr int kBias = 128, kSubgroups = 1;
  static constexpr bool kHasMin = false;
  static void read(const uint8_t* block, int, uint8_t* q) { read_nibbles(block + 1, q); }
  static void write_header(const uint8_t* block, int, int i, int lane, uint8_t* header) {
    header[i * kPanelRows + lane] = block[0];
  }
  // 2^(e - 128), as twice the levels ask for, in two factors: each alone is a normal number.
  static Scales scales(const uint8_t* header, int i) {
    const Ints e = load_u8(header + i * kPanelRows), half = shift_right<1>(e), bias = set1_int(63);
    Scales s;
    s.d[0] = as_floats(shift_left<23>(half + bias)) * as_floats(shift_left<23>(e - half + bias));
    return s;
  }
  template <int Q>
  static Bytes quad(const uint8_t* quads) {
    return lookup16(kE2m1Levels, Quads4::quad<Q>(quads));
  }
};

// compressed-tensors' "pack-quantized" with four bits. File: bfloat16 scale, qs as pairs; an element is
// scale * (integer - 8). Header: the scales of two blocks, an output's in one 32-bit lane.
template <int Elements>
struct I4 {
  using Quads = Quads4;
  static constexpr int kPerBlock = Elements / 32;
  static constexpr int kElements = Elements, kFileBytes = 2 + Elements / 2, kGroups = 2 * kPerBlock;
  static constexpr int kHeader = 4 * kPanelRows, kBias = 8, kSubgroups = 1;
  static constexpr bool kHasMin = false;
  static void read(const uint8_t* block, int g, uint8_t* q) { read_nibble_pairs(block + 2 + 16 * g, q); }
  static void write_header(const uint8_t* block, int, int i, int lane, uint8_t* header) {
    __builtin_memcpy(header + 4 * lane + 2 * (i / kPerBlock), block, 2);
  }
  static Scales scales(const uint8_t* header, int i) {
    const Ints both = load_ints(header);
    Scales s;
    s.d[0] = as_floats(i < kPerBlock ? shift_left<16>(both) : both & set1_int(-65536));
    return s;
  }
  template <int Q>
  static Bytes quad(const uint8_t* quads) {
    return Quads4::quad<Q>(quads);
  }
};

// GPTQ and AWQ with four bits. File: float16 scale, zero point (0 to 16), qs as pairs; an element is scale * (integer -
// zero). Header: scales, then zero points as bytes.
template <int Elements>
struct I4Z {
  using Quads = Quads4;
  static constexpr int kElements = Elements, kFileBytes = 3 + Elements / 2, kGroups = Elements / 32;
  static constexpr int kHeader = kF16Row + kPanelRows, kBias = 0, kSubgroups = 1;
  static constexpr bool kHasMin = true;
  static void read(const uint8_t* block, int g, uint8_t* q) { read_nibble_pairs(block + 3 + 16 * g, q); }
  static void write_header(const uint8_t* block, int, int, int lane, uint8_t* header) {
    copy_f16(block, lane, header);
    header[kF16Row + lane] = block[2];
  }
  static Scales scales(const uint8_t* header, int) {
    Scales s;
    s.d[0] = f16_at(header);
    s.m[0] = set1(0.0f) - s.d[0] * to_floats(load_u8(header + kF16Row));
    return s;
  }
  template <int Q>
  static Bytes quad(const uint8_t* quads) {
    return Quads4::quad<Q>(quads);
  }
};

// DeepSeek's FP8: e4m3 with a float32 scale for each 128 elements. No integers: the product is one of floats, and the
// scale multiplies the sum of a block. File: scale, 128 bytes. Panel: for each block the scales, then the elements of 16
// outputs one after another.
struct F8_E4M3 {
  static constexpr Activation kActivation = kHasDotBf16 ? Activation::kBF16 : Activation::kF32;
  static constexpr int kElements = 128, kFileBytes = 4 + 128;
  static constexpr int kHeader = 4 * kPanelRows, kPairBytes = 2 * kPanelRows;
  static constexpr int kBlockBytes = kHeader + kElements / 2 * kPairBytes;

  // The seven bits below the sign, moved to where a float32 has them and with the difference of the biases added, are the
  // magnitude x; but for exponent 0, where there is no hidden one: 2x - 2^-6, which is less than x just there. A float32
  // whose exponent is 0, too, would need no minimum, but costs the processor 20 cycles and more in each product.
  static Floats decode(const uint8_t* p) {
    const Ints b = load_i8(p);  // the sign in all upper bits
    const Floats x = as_floats((shift_left<20>(b) & set1_int(0x7F << 20)) + set1_int(120 << 23));
    const Ints magnitude = as_ints(min(x, fma(x, set1(2.0f), set1(-0x1p-6f))));
    return as_floats(magnitude | (b & set1_int(INT32_MIN)));
  }
  static void pair(const uint8_t* p, Floats& even, Floats& odd) {
    even = decode(p);
    odd = decode(p + kPanelRows);
  }
  // The same as bfloat16, which they fit exactly: the even element in the low half of a lane.
  static Ints bf16_pair(const uint8_t* p) {
    Floats even, odd;
    pair(p, even, odd);
    return shift_right<16>(as_ints(even)) | as_ints(odd);
  }
};

}  // namespace
}  // namespace kt
