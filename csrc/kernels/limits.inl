// What an instruction set can do at most, for benchmarks: its dot products on registers alone, and reading memory.
#pragma once

namespace kt {
namespace {

// As many sums as the product keeps: enough that none waits for itself, few enough to stay in registers. At least six of two
// registers each: AVX-VNNI has two dot products a cycle, each of which takes five. But AVX2's needs registers in between.
constexpr int kChains = kShortSums || kTileRows > 6 ? kTileRows : 6;
constexpr int kByteOps = 2 * 4 * kLanes, kFloatOps = 2 * kLanes;

inline float peak_int8(int64_t rounds) {
  int8_t bytes[4] = {1, 2, 3, 4};
  Bytes a = broadcast4(bytes), w = a;
  Ints sums[kChains];
  for (Ints& sum : sums) sum = set1_int(0);
  for (int64_t i = 0; i < rounds; ++i)
    for (Ints& sum : sums) {
      keep(w);  // else a product of the same two operands would be computed once
      sum = dot_u7(sum, w, a);
    }
  Ints total = set1_int(0);
  for (const Ints& sum : sums) total = total + sum;
  return static_cast<float>(hsum(total));
}

inline float peak_f32(int64_t rounds) {
  const Floats a = set1(0.5f), b = set1(1.0f);
  Floats sums[kChains];
  for (Floats& sum : sums) sum = b;
  for (int64_t i = 0; i < rounds; ++i)
    for (Floats& sum : sums) sum = fma(sum, a, b);
  Floats total = b;
  for (const Floats& sum : sums) total = total + sum;
  return hsum(total);
}

// Operations done; sink as in `peak`.
inline int64_t peak_bf16([[maybe_unused]] int64_t rounds, [[maybe_unused]] float* sink) {
#ifdef __AVX512BF16__
  constexpr int kBf16Chains = 16, kBf16Ops = 2 * 2 * kLanes;  // it takes longer than the other dot products
  const Ints w = set1_int(0x3C003C00), a = w;                 // pairs of 1/128
  Floats sums[kBf16Chains];
  for (Floats& sum : sums) sum = set1(0.0f);
  for (int64_t i = 0; i < rounds; ++i)
    for (Floats& sum : sums) sum = dot_bf16(sum, w, a);
  Floats total = set1(0.0f);
  for (const Floats& sum : sums) total = total + sum;
  *sink += hsum(total);
  return rounds * kBf16Chains * kBf16Ops;
#else
  return 0;
#endif
}

int64_t peak(Activation kind, int64_t rounds, float* sink) {
  switch (kind) {
    case Activation::kInt8:
    case Activation::kInt8FarOut: *sink += peak_int8(rounds); return rounds * kChains * kByteOps;
    case Activation::kF32: *sink += peak_f32(rounds); return rounds * kChains * kFloatOps;
    case Activation::kBF16: return peak_bf16(rounds, sink);
  }
  return 0;
}

inline int32_t read(const uint8_t* data, int64_t bytes) {
  constexpr int kStreams = 4;
  constexpr int64_t kVector = 4 * kLanes;
  Ints sums[kStreams];
  for (Ints& sum : sums) sum = set1_int(0);
  for (int64_t i = 0; i + kStreams * kVector <= bytes; i += kStreams * kVector)
    for (int s = 0; s < kStreams; ++s) sums[s] = sums[s] + load_ints(data + i + s * kVector);
  return hsum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace
}  // namespace kt
