// y = x w^T, written once over the formats and the vector vocabulary.
//
// A tile is a panel of 16 outputs, or a few, by a few rows, whose activations are broadcast from memory. Each output has its
// own chain of sums in the order of k, the same whatever the number of rows and the kind of tile, and all but dot_bf16
// is equal on every instruction set.
#pragma once
#include <utility>

// In this order: each uses what is above it.
#include "kernels/product.inl"
#include "kernels/group_product.inl"
#include "kernels/stream_tiles.inl"
#include "kernels/block_tiles.inl"
#include "kernels/float_tiles.inl"

namespace kt {
namespace {

// Activations of this many bytes stay in the second-level cache while all panels pass over them.
constexpr int64_t kChunkBytes = 384 * 1024;

template <class F>
constexpr bool kIsBf16Dot = false;
template <class F>
  requires(kIsFloat<F> || kIsScaledFloat<F>)
constexpr bool kIsBf16Dot<F> = F::kActivation == Activation::kBF16;

template <class F>
constexpr int kMaxTile = kIsFloat<F> || kIsScaledFloat<F> ? kTileRowsFloat : kTileRows;

template <class F, int R>
[[gnu::noinline]] void tile(const Product& p, int64_t panel, int64_t row, int64_t ahead) {
  Floats sum[R];
  const uint8_t* weights = p.packed + panel * p.panel_bytes;
  const uint8_t* act = p.act + row * p.stride;
  if constexpr (kIsScaledFloat<F>) {
    scaled_tile<F, R>(weights, ahead, act, p.stride, p.cols, sum);
  } else if constexpr (!kIsFloat<F>) {
    integer_tile<F, R>(weights, ahead, act, p.stride, p.cols, sum);
  } else {
    any_float_tile<F, R>(weights, ahead, act, p.stride, p.cols, sum);
  }
  unroll<R>([&](auto r) { finish_outputs(p, panel, row + r, sum[r]); });
}

// Rows [row, end) of a panel in the largest tiles that fit.
template <class F, int R>
inline void tiles(const Product& p, int64_t panel, int64_t row, int64_t end, int64_t ahead) {
  for (; end - row >= R; row += R) {
    tile<F, R>(p, panel, row, ahead);
    ahead = 0;  // what is read now: there is nothing to fetch
  }
  if constexpr (R > 1) tiles<F, fewer_rows(R)>(p, panel, row, end, ahead);
}

// The same of floats by the dot product of bfloat16. Rows have one sum each, which goes on after six cycles of two products, so
// a tile of a few rows takes as long as one of 12: the last one has up to four more instead. (In tiles of 20 or 24 addresses
// cost more than what is saved.)
constexpr int kLastRows = 16;
template <class F, int... R>
inline void bf16_tiles(const Product& p, int64_t panel, int64_t row, int64_t end, int64_t ahead,
                       std::integer_sequence<int, R...>) {
  constexpr void (*kLast[])(const Product&, int64_t, int64_t, int64_t) = {tile<F, R + 1>...};
  for (; end - row > kLastRows; row += kMaxTile<F>, ahead = 0) tile<F, kMaxTile<F>>(p, panel, row, ahead);
  kLast[end - row - 1](p, panel, row, ahead);
}

// Panels [begin, end) of rows [row, stop), in tiles that go along k once.
template <class F>
inline void stream(const Product& p, int64_t begin, int64_t end, int64_t row, int64_t stop) {
  for (int64_t panel = begin; panel < end; ++panel) {
    if constexpr (kIsCodebook<F>) {
      codebook_tiles<kTileRows>(p, unpack_groups<F>, panel, row, stop, kAhead);
    } else if constexpr (kIsBf16Dot<F>) {
      bf16_tiles<F>(p, panel, row, stop, kAhead, std::make_integer_sequence<int, kLastRows>());
    } else {
      tiles<F, kMaxTile<F>>(p, panel, row, stop, kAhead);
    }
  }
}

// The rows of activations that are gone through with all panels.
template <class F>
int64_t rows_at_a_time(const Product& p) {
  constexpr int64_t kTile = kMaxTile<F>;
  const int64_t fit = kChunkBytes / p.stride / kTile * kTile;
  return fit > kTile ? fit : kTile;
}

template <class F>
void float_product(const Product& p, int64_t rows, int64_t begin, int64_t end) {
  const int64_t chunk = rows_at_a_time<F>(p);
  for (int64_t r = 0; r < rows; r += chunk) stream<F>(p, begin, end, r, rows - r < chunk ? rows : r + chunk);
}

template <class F>
void integer_product(const Product& p, int64_t rows, int64_t begin, int64_t end) {
  const bool many = rows >= kBlockFrom<F>;
  const int64_t chunk = many ? block_rows(rows, p.cols / kGroup) : rows_at_a_time<F>(p);
  const int64_t whole = p.out_rows / kPanelRows;  // panels that are not padded
  const int64_t fit = ((end < whole ? end : whole) - begin) / kBlockPanels * kBlockPanels;
  const int64_t streamed = many ? begin + fit : begin;
  for (int64_t r = 0; r < rows; r += chunk) {
    const int64_t last = rows - r < chunk ? rows : r + chunk;
    if (begin < streamed) block_product<Unpacked<F>>(p, unpack_groups<F>, begin, streamed, r, last);
    stream<F>(p, streamed, end, r, last);
  }
}

}  // namespace
}  // namespace kt
