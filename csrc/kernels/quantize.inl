// Input rows of a product, as the weight's format takes them.
#pragma once
#include "kernels/activations.inl"

namespace kt {
namespace {

// How many times the largest of the others a quad's largest must be.
constexpr float kFarOut = 3.0f;

inline int64_t groups_bytes(int64_t cols) { return cols / kGroup * static_cast<int64_t>(sizeof(ActivationGroup)); }

inline const FarOutList& far_out_list(const uint8_t* act, int64_t cols) {
  return *reinterpret_cast<const FarOutList*>(act + groups_bytes(cols));
}

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
    case Activation::kInt8: bytes = groups_bytes(cols); break;
    case Activation::kInt8FarOut:
      bytes = groups_bytes(cols) + static_cast<int64_t>(sizeof(FarOutList) + cols / kGroup * sizeof(FarOutQuad));
      break;
  }
  return static_cast<size_t>(ceil_div(bytes, 64) | 1) * 64;
}

size_t activation_offset(Activation kind, int64_t col) {
  switch (kind) {
    case Activation::kF32: return static_cast<size_t>(col) * 4;
    case Activation::kBF16: return static_cast<size_t>(col) * 2;
    case Activation::kInt8:
    case Activation::kInt8FarOut: return static_cast<size_t>(col / kGroup) * sizeof(ActivationGroup);
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

// The largest magnitude of a group, and that of all but the quad which has it; both rounded up by at most 2^-20.
struct Largest {
  bool finite;
  float all, rest;
  int quad;
};

inline Largest largest_of(Floats a, Floats b) {
  const int32_t numbers[2 * kLanes] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3,
                                       4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7};
  // The number of the quad in the last bits: no two are equal.
  const Ints upper = set1_int(~7);
  const Ints first = (max_of_four(magnitude(a)) & upper) | load_ints(numbers);
  const Ints second = (max_of_four(magnitude(b)) & upper) | load_ints(numbers + kLanes);
  const TwoLargest found = two_largest(first, second);
  const int32_t all = found.first | 7, rest = found.second | 7;
  Largest out{all < 0x7F800000, 0.0f, 0.0f, found.first & 7};
  __builtin_memcpy(&out.all, &all, sizeof all);
  __builtin_memcpy(&out.rest, &rest, sizeof rest);
  return out;
}

// The rest becomes 127 at most, the quad 127 * 128.
inline void quantize_far_out(const float* x, const Largest& found, ActivationGroup* out, FarOutQuad* far) {
  const float fits = found.all * 0x1p-7f;
  const float top = found.rest > fits ? found.rest : fits;
  const Floats inverse = set1(127.0f / top);
  int32_t whole[kGroup], low[kGroup];
  store_ints(whole, round_to_ints(load(x) * inverse));
  store_ints(whole + kLanes, round_to_ints(load(x + kLanes) * inverse));
  __builtin_memcpy(low, whole, sizeof low);
  for (int i = 0; i < 4; ++i) {
    const int k = 4 * found.quad + i, high = (whole[k] + 64) >> 7;
    far->high[i] = static_cast<int8_t>(high);
    low[k] = whole[k] - high * 128;
  }
  far->quad = found.quad;
  const Ints qa = load_ints(low), qb = load_ints(low + kLanes);
  store_i8(out->q, qa);
  store_i8(out->q + kLanes, qb);
  const int32_t first = hsum(qa), second = hsum(qb);
  out->scale = top / 127.0f;
  out->scaled_sum = out->scale * static_cast<float>(hsum(load_ints(whole) + load_ints(whole + kLanes)));
  out->negative_sum = -(first + second);
  out->negative_half[0] = -first;
  out->negative_half[1] = -second;
}

inline void quantize_far_out_row(const float* x, int64_t cols, uint8_t* act) {
  ActivationGroup* out = reinterpret_cast<ActivationGroup*>(act);
  FarOutList* list = reinterpret_cast<FarOutList*>(act + groups_bytes(cols));
  int32_t count = 0;
  for (int32_t g = 0; g < cols / kGroup; ++g, x += kGroup) {
    const Largest found = largest_of(load(x), load(x + kLanes));
    if (found.finite && found.all > 1e-30f && found.all > kFarOut * found.rest) {
      list->quads[count].group = g;
      quantize_far_out(x, found, out + g, &list->quads[count++]);
    } else {
      quantize_group(x, out + g);
    }
  }
  list->count = count;
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
    case Activation::kInt8FarOut: quantize_far_out_row(x, cols, act); break;
  }
}

void quantize(Activation kind, const float* x, int64_t ldx, int64_t rows, int64_t cols, uint8_t* act) {
  const size_t stride = activation_bytes(kind, cols);
  for (int64_t r = 0; r < rows; ++r) quantize_row(kind, x + r * ldx, cols, act + static_cast<size_t>(r) * stride);
}

}  // namespace
}  // namespace kt
