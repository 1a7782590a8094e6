// Weights in fewer bits: floats to the blocks of GGUF's Q8_0 and Q4_0, as their definitions say.
#pragma once

namespace kt {
namespace {

// The element of a group with the largest magnitude, the first of equals; a NaN counts as larger than all.
inline float largest_element(const float* x) {
  const int32_t top = hmax(max(magnitude(load(x)), magnitude(load(x + kLanes))));
  for (int i = 0; i < kGroup; ++i) {
    int32_t bits;
    __builtin_memcpy(&bits, x + i, sizeof bits);
    if ((bits & INT32_MAX) == top) return x[i];
  }
  return 0.0f;
}

struct RequantizedGroup {
  uint16_t scale;  // float16
  int8_t q[kGroup];
};

// The nearest integers from `low` to `high` for a scale; adds to sums. False when the scale is not finite in float16.
inline bool requantize_group(const float* x, float scale, float low, float high, RequantizedGroup* out, double* sums) {
  uint16_t halves[kLanes];
  store_f16(halves, set1(scale));
  const Floats wide = load_f16(halves);
  float lanes[kLanes];
  store(lanes, wide);
  if (!(lanes[0] - lanes[0] == 0.0f)) return false;
  out->scale = halves[0];
  const Floats inverse = set1(lanes[0] == 0.0f ? 0.0f : 1.0f / lanes[0]);
  Floats error = set1(0.0f), size = set1(0.0f);
  for (int i = 0; i < kGroup; i += kLanes) {
    const Floats before = load(x + i);
    const Ints q = round_to_ints(min(max(before * inverse, set1(low)), set1(high)));
    store_i8(out->q + i, q);
    const Floats lost = before - to_floats(q) * wide;
    error = fma(lost, lost, error);
    size = fma(before, before, size);
  }
  sums[0] += static_cast<double>(hsum(error));
  sums[1] += static_cast<double>(hsum(size));
  return true;
}

bool requantize(Format format, const float* x, int64_t n, uint8_t* blocks, double* sums) {
  RequantizedGroup group;
  for (int64_t g = 0; g < n / kGroup; ++g, x += kGroup) {
    const float largest = largest_element(x);
    if (format == Format::kQ8_0) {
      if (!requantize_group(x, __builtin_fabsf(largest) / 127.0f, -127.0f, 127.0f, &group, sums))
        return false;
      __builtin_memcpy(blocks, &group.scale, 2);
      __builtin_memcpy(blocks + 2, group.q, kGroup);
      blocks += 2 + kGroup;
    } else {
      if (!requantize_group(x, largest / -8.0f, -8.0f, 7.0f, &group, sums)) return false;
      __builtin_memcpy(blocks, &group.scale, 2);
      for (int i = 0; i < kGroup / 2; ++i)
        blocks[2 + i] = static_cast<uint8_t>((group.q[i] + 8) | (group.q[i + kGroup / 2] + 8) << 4);
      blocks += 2 + kGroup / 2;
    }
  }
  return true;
}

}  // namespace
}  // namespace kt
