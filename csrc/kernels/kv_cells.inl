// How keys and values are kept in the cache (KvFormat).
#pragma once

namespace kt {
namespace {

constexpr int kBlock = static_cast<int>(kBlockTokens);
static_assert(kBlock == kLanes, "the scores of a block are one vector");

// Element by element: the other half of a value's pair may be a row that another thread writes now.
void store_bf16_kv(const float* k, const float* v, int64_t head_dim, int64_t offset, uint16_t* keys) {
  uint16_t* values = keys + (kBlock + offset / 2 * 2) * head_dim + offset % 2;
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    uint16_t key[kLanes], value[kLanes];
    store_bf16(key, load(k + d));
    store_bf16(value, load(v + d));
    for (int i = 0; i < kLanes; i += 2)
      __builtin_memcpy(keys + (d + i) * kBlock + 2 * offset, key + i, 2 * sizeof *key);
    for (int i = 0; i < kLanes; ++i) values[2 * (d + i)] = value[i];
  }
}

// Symmetric, as rows of a product are: the largest magnitude becomes 127; nearest, ties to even. What holds an infinity
// or a NaN gets a NaN for a scale; only denormals and the like become zeros. Returns the scale.
float quantize_cells(const float* x, int64_t head_dim, int8_t* q, int64_t stride) {
  Ints most = set1_int(0);
  for (int64_t d = 0; d < head_dim; d += kLanes) most = max(most, magnitude(load(x + d)));
  const int32_t top = hmax(most);
  float largest;
  __builtin_memcpy(&largest, &top, sizeof largest);
  const bool finite = top < 0x7F800000, normal = finite && largest > 1e-36f;
  const Floats inverse = set1(normal ? 127.0f / largest : 0.0f);
  int8_t some[kLanes];
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    store_i8(some, round_to_ints(load(x + d) * inverse));
    for (int i = 0; i < kLanes; ++i) q[(d + i) * stride] = some[i];
  }
  return normal ? largest / 127.0f : finite ? 0.0f : __builtin_nanf("");
}

void store_kv(KvFormat format, const float* k, const float* v, int64_t head_dim, int64_t offset_in_block,
              uint8_t* block) {
  if (format == KvFormat::kBF16)
    return store_bf16_kv(k, v, head_dim, offset_in_block, reinterpret_cast<uint16_t*>(block));
  int8_t* keys = reinterpret_cast<int8_t*>(block);
  float* scales = reinterpret_cast<float*>(block + 2 * kBlock * head_dim) + offset_in_block;
  scales[0] = quantize_cells(k, head_dim, keys + offset_in_block, kBlock);
  scales[kBlock] = quantize_cells(v, head_dim, keys + (kBlock + offset_in_block) * head_dim, 1);
}

void store_half(const float* x, int64_t n, uint16_t* y) {
  for (int64_t i = 0; i < n; i += kLanes) store_f16(y + i, load(x + i));
}

// Scales of an int8 block's keys; its values' follow.
inline const float* scales_of(const uint8_t* block, int64_t head_dim) {
  return reinterpret_cast<const float*>(block + 2 * kBlock * head_dim);
}

constexpr int64_t kUnitBytes = 64;  // a line

template <class Units>
constexpr int64_t wide_block_bytes(int64_t head_dim) {
  return head_dim * kUnitBytes * Units::kOfPair;
}

// An int8 block in units of pairs or floats; `ahead` is what to prefetch meanwhile.
template <class Units>
inline void widen_int8(const uint8_t* block, const uint8_t* ahead, int64_t head_dim, uint8_t* wide) {
  for (int64_t d = 0; d < head_dim; d += 2, wide += Units::kOfPair * kUnitBytes, block += 2 * kBlock, ahead += 2 * kBlock) {
    __builtin_prefetch(ahead, 0, 2);
    Units::store_pairs_of(load_i8(block), load_i8(block + kBlock), wide, kUnitBytes);
  }
  const int64_t row = head_dim / kLanes * kUnitBytes;
  for (int p = 0; p < kBlock; p += 2, wide += Units::kOfPair * row, block += 2 * head_dim, ahead += 2 * head_dim)
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      __builtin_prefetch(ahead + 2 * d, 0, 2);
      Units::store_pairs_of(load_i8(block + d), load_i8(block + head_dim + d), wide + d / kLanes * kUnitBytes, row);
    }
}

// A block of pairs in units of floats.
inline void split_pairs(const uint8_t* block, const uint8_t* ahead, int64_t head_dim, uint8_t* wide) {
  for (int64_t d = 0; d < head_dim; d += 2, wide += 2 * kUnitBytes, block += kUnitBytes, ahead += kUnitBytes) {
    __builtin_prefetch(ahead, 0, 2);
    FloatUnits::split(load_ints(block), wide, kUnitBytes);
  }
  const int64_t row = head_dim / kLanes * kUnitBytes;
  for (int p = 0; p < kBlock; p += 2, wide += 2 * row, block += row, ahead += row)
    for (int64_t at = 0; at < row; at += kUnitBytes) {
      __builtin_prefetch(ahead + at, 0, 2);
      FloatUnits::split(load_ints(block + at), wide + at, row);
    }
}

}  // namespace
}  // namespace kt
