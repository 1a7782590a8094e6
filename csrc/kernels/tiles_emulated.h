// The names of tiles_amx.h in plain C++, as Intel's manual defines the instructions ("Intel 64 and IA-32 Architectures
// Software Developer's Manual", volume 2: LDTILECFG, TILELOADD, TDPBSSD, TDPBF16PS), so that the products made of them
// can be tested where there is no AMX. Where the processor would fault, so does this.
#pragma once
#include "kernels/tile_shapes.h"

namespace kt {
namespace {

struct TileState {
  TileConfig config;
  alignas(64) uint8_t data[kTiles][kTile][kTileStride];
};
thread_local TileState tile_state;

inline void fault_unless(bool allowed) {
  if (!allowed) __builtin_trap();
}

class TileScope {
 public:
  TileScope() {
    __builtin_memset(&tile_state, 0, sizeof tile_state);
    tile_state.config = kTileConfig;
  }
  ~TileScope() { __builtin_memset(&tile_state, 0, sizeof tile_state); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

template <Tile T>
inline void tile_zero() {
  fault_unless(tile_state.config.palette == 1);
  __builtin_memset(tile_state.data[T], 0, sizeof tile_state.data[T]);
}

template <Tile T>
inline void tile_load(const void* from, int64_t stride) {
  tile_zero<T>();
  for (int r = 0; r < tile_state.config.rows[T]; ++r)
    __builtin_memcpy(tile_state.data[T][r], static_cast<const uint8_t*>(from) + r * stride,
                     tile_state.config.row_bytes[T]);
}

template <Tile T>
inline void tile_store(void* to, int64_t stride) {
  fault_unless(tile_state.config.palette == 1);
  for (int r = 0; r < tile_state.config.rows[T]; ++r)
    __builtin_memcpy(static_cast<uint8_t*>(to) + r * stride, tile_state.data[T][r], tile_state.config.row_bytes[T]);
}

// Rows of the inputs and quads or pairs along k; faults if the tiles do not fit together.
struct DotShape {
  int rows, outputs, depth;
};
template <Tile Sums, Tile Inputs, Tile Weights>
inline DotShape dot_shape() {
  const TileConfig& c = tile_state.config;
  fault_unless(c.palette == 1 && Sums != Inputs && Sums != Weights && Inputs != Weights);
  fault_unless(c.rows[Sums] == c.rows[Inputs] && c.row_bytes[Sums] == c.row_bytes[Weights] &&
               c.row_bytes[Inputs] == 4 * c.rows[Weights]);
  return {c.rows[Sums], c.row_bytes[Sums] / 4, c.rows[Weights]};
}

template <class Number>
inline Number tile_at(Tile t, int row, int i) {
  Number value;
  __builtin_memcpy(&value, &tile_state.data[t][row][i * static_cast<int>(sizeof value)], sizeof value);
  return value;
}

template <Tile Sums, Tile Inputs, Tile Weights>
[[gnu::noinline]] void tile_dot_i8() {
  const DotShape s = dot_shape<Sums, Inputs, Weights>();
  for (int r = 0; r < s.rows; ++r) {
    for (int o = 0; o < s.outputs; ++o) {
      uint32_t sum = tile_at<uint32_t>(Sums, r, o);
      for (int k = 0; k < s.depth; ++k)
        for (int i = 0; i < 4; ++i)
          sum += static_cast<uint32_t>(tile_at<int8_t>(Inputs, r, 4 * k + i) * tile_at<int8_t>(Weights, k, 4 * o + i));
      __builtin_memcpy(&tile_state.data[Sums][r][4 * o], &sum, sizeof sum);
    }
  }
}

inline float without_denormal(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }

inline float bf16_at(Tile t, int row, int i) {
  const uint32_t bits = static_cast<uint32_t>(tile_at<uint16_t>(t, row, i)) << 16;
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return without_denormal(x);
}

template <Tile Sums, Tile Inputs, Tile Weights>
[[gnu::noinline]] void tile_dot_bf16() {
  const DotShape s = dot_shape<Sums, Inputs, Weights>();
  for (int r = 0; r < s.rows; ++r) {
    for (int o = 0; o < s.outputs; ++o) {
      float part[2] = {0.0f, 0.0f};
      for (int k = 0; k < s.depth; ++k)
        for (int i = 0; i < 2; ++i)
          part[i] = without_denormal(
              __builtin_fmaf(bf16_at(Inputs, r, 2 * k + i), bf16_at(Weights, k, 2 * o + i), part[i]));
      const float before = without_denormal(tile_at<float>(Sums, r, o));
      const float sum = without_denormal(before + without_denormal(part[0] + part[1]));
      __builtin_memcpy(&tile_state.data[Sums][r][4 * o], &sum, sizeof sum);
    }
  }
}

}  // namespace
}  // namespace kt
