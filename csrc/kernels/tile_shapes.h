// What the eight tile registers hold: one configuration for all products, so that none has to change it.
//
// A product of tiles is sums[16 rows][16 outputs] += inputs[16 rows][k] * weights[k][16 outputs]. Of the weights each
// row has, for each output, the four bytes or two bfloat16 that lie together along k: what a panel calls a quad or a
// pair (formats/quads.h, formats/float.h), so that panels need no layout of their own here.
#pragma once
#include <cstdint>

namespace kt {
namespace {

constexpr int kTile = 16;             // rows of inputs, and outputs, of a tile
constexpr int kTileStride = 4 * kTile;  // bytes of a row of sums, or of weights

enum Tile : int {
  kSums0, kSums1,                // 16 x 16 int32 or floats
  kPairInputs, kPairWeights,     // 32 elements of bfloat16
  kGroupInputs, kGroupWeights,   // 32 int8: a group
  kHalfInputs, kHalfWeights,     // 16 int8: half of one
  kTiles
};

// As the processor reads it (palette 1).
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

constexpr TileConfig kTileConfig = {
    .palette = 1,
    .start_row = 0,
    .reserved = {},
    .row_bytes = {64, 64, 64, 64, 32, 64, 16, 64},
    .rows = {16, 16, 16, 16, 16, 8, 16, 4},
};

}  // namespace
}  // namespace kt
