// bfloat16 pairs: what attention multiplies. Results are equal on every instruction set, because the bfloat16 dot
// product of the processors that have one is two fused multiply-adds, the odd element's first. (It takes denormals for
// zero, so rounding makes them zero; sums that underflow may differ.)
#pragma once

namespace kt {
namespace {

#ifdef __AVX512BF16__

using Pair = uint32_t;  // the even element in the lower half

// 16 elements, to nearest, ties to even; a NaN stays one, a denormal becomes zero.
inline void store_bf16(uint16_t* out, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v)));
}
// Returns what it has stored, as floats.
inline Floats store_pairs(Pair* out, Floats x) {
  const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), rounded);
  return as_floats(shift_left<16>(Ints{_mm512_cvtepu16_epi32(rounded)}));
}
// acc + the products of both elements
inline Floats dot_pair(Floats acc, Ints both, const Pair& pair) {
  return dot_bf16(acc, both, set1_int(static_cast<int32_t>(pair)));
}

#else

struct Pair {
  float even, odd;
};

inline Floats round_to_bf16(Floats x) {
  const Ints bits = as_ints(x), upper = set1_int(-65536);
  const Ints even = (bits + set1_int(0x7FFF) + (shift_right<16>(bits) & set1_int(1))) & upper;
  const Floats magnitude = as_floats(bits & set1_int(INT32_MAX));
  const Floats nan = as_floats(as_ints(x + x) & upper);  // adding has made it quiet, so some of its bits are left
  const Floats rounded = select_less(magnitude, set1(__builtin_inff()), as_floats(even), nan);
  return select_less(magnitude, set1(1.17549435e-38f), set1(0.0f), rounded);
}
inline void store_bf16(uint16_t* out, Floats x) {
  int32_t rounded[kLanes];
  store_ints(rounded, as_ints(round_to_bf16(x)));
  for (int i = 0; i < kLanes; ++i) out[i] = static_cast<uint16_t>(static_cast<uint32_t>(rounded[i]) >> 16);
}
inline Floats store_pairs(Pair* out, Floats x) {
  const Floats rounded = round_to_bf16(x);
  store(&out->even, rounded);
  return rounded;
}
inline Floats dot_pair(Floats acc, Ints both, const Pair& pair) {
  acc = fma(as_floats(both & set1_int(-65536)), set1(pair.odd), acc);
  return fma(as_floats(shift_left<16>(both)), set1(pair.even), acc);
}

#endif

constexpr int64_t kPairFloats = sizeof(Pair) / sizeof(float);

// What of a pair is seen, as bits of both elements.
constexpr int32_t kEven = 0xFFFF, kOdd = -65536;

// How blocks lie in memory, in units of 64 bytes, and how unit u of 16 is multiplied with the element or elements that
// y has for it. Here 16 pairs: one unit for each pair.
struct PairUnits {
  static constexpr int kOfPair = 1;
  using Unit = Ints;
  static Unit load(const uint8_t* at) { return load_ints(at); }
  static Unit hide(Unit x, int64_t, int32_t seen) { return x & set1_int(seen); }
  static Floats add_product(Floats acc, Unit x, const Pair* y, int64_t u) { return dot_pair(acc, x, y[u]); }
  // Integers of at most eight bits, which bfloat16 holds exactly.
  static void store_pairs_of(Ints even, Ints odd, uint8_t* at, int64_t) {
    store_ints(reinterpret_cast<int32_t*>(at), shift_right<16>(as_ints(to_floats(even))) | as_ints(to_floats(odd)));
  }
};

// 16 floats, the odd elements before the even ones. Without the instruction a pair is split by two operations each time, so
// with few registers, where a unit serves few queries, those of many are split once.
constexpr bool kSplitsPairs = !kHasDotBf16 && kTileRowsFloat < 12;
struct FloatUnits {
  static constexpr int kOfPair = 2;
  using Unit = Floats;
  static Unit load(const uint8_t* at) { return kt::load(reinterpret_cast<const float*>(at)); }
  static Unit hide(Unit x, int64_t u, int32_t seen) {
    return as_floats(as_ints(x) & set1_int(u % 2 == 0 ? seen >> 31 : -(seen & 1)));
  }
  static Floats add_product(Floats acc, Unit x, const Pair* y, int64_t u) {
    return fma(x, set1(reinterpret_cast<const float*>(y)[u ^ 1]), acc);
  }
  // `apart`: bytes from the odd elements' unit to the even ones'.
  static void store_pairs_of(Ints even, Ints odd, uint8_t* at, int64_t apart) {
    store(reinterpret_cast<float*>(at), to_floats(odd));
    store(reinterpret_cast<float*>(at + apart), to_floats(even));
  }
  static void split(Ints pairs, uint8_t* at, int64_t apart) {
    store(reinterpret_cast<float*>(at), as_floats(pairs & set1_int(kOdd)));
    store(reinterpret_cast<float*>(at + apart), as_floats(shift_left<16>(pairs)));
  }
};

}  // namespace
}  // namespace kt
