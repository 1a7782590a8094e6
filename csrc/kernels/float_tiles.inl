// Tiles of the float formats: F32, F16 and BF16, and F8_E4M3 with its scales.
#pragma once

namespace kt {
namespace {

// Even and odd elements have a sum each: two chains hide half of the latency for one row.
template <class F, int R>
inline void float_tile(const uint8_t* panel, int64_t ahead, const uint8_t* act, int64_t stride, int64_t cols,
                       Floats* sum) {
  Floats odd_sum[R];
  for (int r = 0; r < R; ++r) sum[r] = odd_sum[r] = set1(0.0f);
  for (int64_t k = 0; k < cols; k += 2, panel += F::kPairBytes) {
    if (ahead)
      for (int i = 0; i < F::kPairBytes; i += 64) __builtin_prefetch(panel + ahead + i);
    Floats even, odd;
    F::pair(panel, even, odd);
    for (int r = 0; r < R; ++r) {
      const float* x = reinterpret_cast<const float*>(act + r * stride) + k;
      sum[r] = fma(even, set1(x[0]), sum[r]);
      odd_sum[r] = fma(odd, set1(x[1]), odd_sum[r]);
    }
  }
  for (int r = 0; r < R; ++r) sum[r] = sum[r] + odd_sum[r];
}

#ifdef __AVX512BF16__
template <class F, int R>
inline void bf16_tile(const uint8_t* panel, int64_t ahead, const uint8_t* act, int64_t stride, int64_t cols,
                      Floats* sum) {
  unroll<R>([&](auto r) { sum[r] = set1(0.0f); });
  for (int64_t k = 0; k < cols; k += 2, panel += F::kPairBytes) {
    if (ahead) __builtin_prefetch(panel + ahead);
    const Ints weights = F::bf16_pair(panel);
    unroll<R>([&](auto r) {
      int32_t pair;
      __builtin_memcpy(&pair, act + r * stride + 2 * k, sizeof pair);
      sum[r] = dot_bf16(sum[r], weights, set1_int(pair));
    });
  }
}
#endif

// Floats as the table's dot product takes them.
template <class F, int R>
inline void any_float_tile(const uint8_t* panel, int64_t ahead, const uint8_t* act, int64_t stride, int64_t cols,
                           Floats* sum) {
  if constexpr (F::kActivation == Activation::kF32) {
    float_tile<F, R>(panel, ahead, act, stride, cols, sum);
  } else {
#ifdef __AVX512BF16__
    bf16_tile<F, R>(panel, ahead, act, stride, cols, sum);
#endif
  }
}

// Each block's sum is multiplied by the block's scale.
template <class F, int R>
inline void scaled_tile(const uint8_t* panel, int64_t ahead, const uint8_t* act, int64_t stride, int64_t cols,
                        Floats* sum) {
  constexpr int kElementBytes = F::kActivation == Activation::kF32 ? 4 : 2;  // of the activations
  for (int r = 0; r < R; ++r) sum[r] = set1(0.0f);
  for (int64_t k = 0; k < cols; k += F::kElements, panel += F::kBlockBytes) {
    Floats part[R];
    any_float_tile<F, R>(panel + F::kHeader, ahead, act + k * kElementBytes, stride, F::kElements, part);
    const Floats scale = load(reinterpret_cast<const float*>(panel));
    for (int r = 0; r < R; ++r) sum[r] = fma(part[r], scale, sum[r]);
  }
}

}  // namespace
}  // namespace kt
