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
inline void store_pairs(Pair* out, Floats x) { store_bf16(reinterpret_cast<uint16_t*>(out), x); }
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
inline void store_pairs(Pair* out, Floats x) { store(&out->even, round_to_bf16(x)); }
inline Floats dot_pair(Floats acc, Ints both, const Pair& pair) {
  acc = fma(as_floats(both & set1_int(-65536)), set1(pair.odd), acc);
  return fma(as_floats(shift_left<16>(both)), set1(pair.even), acc);
}

#endif

constexpr int64_t kPairFloats = sizeof(Pair) / sizeof(float);

// Integers of at most eight bits, which bfloat16 holds exactly.
inline Ints pairs_of_ints(Ints even, Ints odd) {
  return shift_right<16>(as_ints(to_floats(even))) | as_ints(to_floats(odd));
}

}  // namespace
}  // namespace kt
