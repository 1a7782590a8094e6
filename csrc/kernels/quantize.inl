// Input rows of a product, as the weight's format takes them.
#pragma once

namespace kt {
namespace {

// 32 elements of an int8 row: x is about scale * q. The sums pay for the biases and minimums of weights; the
// integer ones are negative because an accumulator starts at -bias * sum.
struct ActivationGroup {
  float scale;
  float scaled_sum;          // scale * sum of q
  int32_t negative_sum;      // -(sum of q)
  int32_t negative_half[2];  // the same of the first 16 and of the others
  int8_t q[kGroup];
};
static_assert(sizeof(ActivationGroup) == 52);

Activation activation(Format format) {
  Activation result = Activation::kInt8;
  with_format(format, [&](auto f) {
    using F = decltype(f);
    if constexpr (kIsFloat<F> || kIsScaledFloat<F>) result = F::kActivation;
  });
  return result;
}

// An odd number of cache lines, so that the rows of a tile, read side by side, spread over the sets of the cache.
size_t activation_bytes(Activation kind, int64_t cols) {
  const int64_t even = ceil_div(cols, 2) * 2;
  int64_t bytes = 0;
  switch (kind) {
    case Activation::kF32: bytes = even * 4; break;
    case Activation::kBF16: bytes = even * 2; break;
    case Activation::kInt8: bytes = cols / kGroup * static_cast<int64_t>(sizeof(ActivationGroup)); break;
  }
  return static_cast<size_t>(ceil_div(bytes, 64) | 1) * 64;
}

size_t activation_offset(Activation kind, int64_t col) {
  switch (kind) {
    case Activation::kF32: return static_cast<size_t>(col) * 4;
    case Activation::kBF16: return static_cast<size_t>(col) * 2;
    case Activation::kInt8: return static_cast<size_t>(col / kGroup) * sizeof(ActivationGroup);
  }
  return 0;
}

inline Ints magnitude(Floats x) { return as_ints(x) & set1_int(INT32_MAX); }

// Symmetric: the largest magnitude becomes 127; nearest, ties to even. A group with an infinity or a NaN gets a NaN
// scale, so that the fault shows in every output; one of only denormals and the like becomes zeros.
inline void quantize_group(const float* x, ActivationGroup* out) {
  const Floats a = load(x), b = load(x + kLanes);
  // As integers magnitudes are ordered like the floats, with NaN on top.
  const int32_t top = hmax(max(magnitude(a), magnitude(b)));
  float largest;
  __builtin_memcpy(&largest, &top, sizeof largest);
  const bool finite = top < 0x7F800000;
  const bool normal = finite && largest > 1e-36f;
  const Floats inverse = set1(normal ? 127.0f / largest : 0.0f);
  const float scale = normal ? largest / 127.0f : finite ? 0.0f : __builtin_nanf("");
  const Ints qa = round_to_ints(a * inverse), qb = round_to_ints(b * inverse);
  store_i8(out->q, qa);
  store_i8(out->q + kLanes, qb);
  const int32_t first = hsum(qa), second = hsum(qb), sum = first + second;
  out->scale = scale;
  out->scaled_sum = scale * static_cast<float>(sum);
  out->negative_sum = -sum;
  out->negative_half[0] = -first;
  out->negative_half[1] = -second;
}

// To nearest, ties to even; a NaN stays one.
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

void quantize_row(Activation kind, const float* x, int64_t cols, uint8_t* act) {
  switch (kind) {
    case Activation::kF32: {
      float* out = reinterpret_cast<float*>(act);
      for (int64_t k = 0; k < cols; ++k) out[k] = x[k];
      if (cols % 2) out[cols] = 0.0f;
      break;
    }
    case Activation::kBF16: {
      uint16_t* out = reinterpret_cast<uint16_t*>(act);
      for (int64_t k = 0; k < cols; ++k) out[k] = to_bf16(x[k]);
      if (cols % 2) out[cols] = 0;
      break;
    }
    case Activation::kInt8: {
      ActivationGroup* out = reinterpret_cast<ActivationGroup*>(act);
      for (int64_t g = 0; g < cols / kGroup; ++g) quantize_group(x + g * kGroup, out + g);
      break;
    }
  }
}

void quantize(Activation kind, const float* x, int64_t ldx, int64_t rows, int64_t cols, uint8_t* act) {
  const size_t stride = activation_bytes(kind, cols);
  for (int64_t r = 0; r < rows; ++r) quantize_row(kind, x + r * ldx, cols, act + static_cast<size_t>(r) * stride);
}

}  // namespace
}  // namespace kt
