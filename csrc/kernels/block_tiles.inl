// Tiles of the integer formats for many rows: a block of groups of a few panels is unpacked to memory once, and used by
// all rows. Unpacking costs next to nothing then, and panels can share the loads of activations, which are the next limit.
// Sums wait in y between blocks: the chain of each output is the same as in one pass along k.
#pragma once

namespace kt {
namespace {

// Groups of a block. Those of three panels, unpacked, are 35 KB, and fit a first-level cache of 48 with the activations
// of a tile: with 24 groups it is 3 % slower.
constexpr int64_t kBlockGroups = 18;

// From so many rows on: unpacking to memory costs as much as some rows more. Short sums take small integers, and of eight bits
// there is nothing to unpack.
template <class F>
constexpr int64_t kBlockFrom = kIsCodebook<F> || most_of<F>() < 64 ? kBlockMinRows : 96;

// Rows that go over a block in one go.
inline int64_t block_rows(int64_t rows, int64_t groups) {
  if constexpr (kBlockChunkBytes == 0) return rows;
  const int64_t bytes = (groups < kBlockGroups ? groups : kBlockGroups) * static_cast<int64_t>(sizeof(ActivationGroup));
  return kBlockChunkBytes / bytes / kBlockRows * kBlockRows;
}

template <class Group>
struct Block {
  Group groups[kBlockGroups][kBlockPanels];
  int64_t first, count;  // groups of k
};

// Panels of 16 outputs each, without bias: few instructions around the loop.
template <class Group, int R>
[[gnu::noinline]] void block_tile(const Product& p, const Block<Group>& b, int64_t panel, int64_t row) {
  Floats sum[kBlockPanels * R];
  float* const y = p.y + row * p.ldy + panel * kPanelRows;
  // What the next tile begins with or writes: rows of wide outputs lie too far apart for the processor to guess.
  for (int r = R; r < 2 * R; ++r)
    for (int i = 0; i < kBlockPanels; ++i) __builtin_prefetch(y + r * p.ldy + i * kPanelRows, 1);
  if (b.first == 0) {
    for (Floats& s : sum) s = set1(0.0f);
  } else {
    for (int i = 0; i < kBlockPanels; ++i)
      for (int r = 0; r < R; ++r) sum[i * R + r] = load(y + r * p.ldy + i * kPanelRows);
  }
  const uint8_t* act = p.act + row * p.stride + b.first * static_cast<int64_t>(sizeof(ActivationGroup));
  for (int64_t g = 0; g < b.count; ++g, act += sizeof(ActivationGroup))
    group_product<R, kBlockPanels>(b.groups[g], act, p.stride, sum);
  for (int i = 0; i < kBlockPanels; ++i)
    for (int r = 0; r < R; ++r) store(y + r * p.ldy + i * kPanelRows, sum[i * R + r]);
}

// Rows [row, end) in tiles of R, then one of those that are left.
template <class Group, int R>
inline void block_tiles(const Product& p, const Block<Group>& b, int64_t panel, int64_t row, int64_t end) {
  for (; end - row >= R; row += R) block_tile<Group, R>(p, b, panel, row);
  if constexpr (R > 1) block_tiles<Group, R - 1>(p, b, panel, row, end);
}

inline void add_bias(const Product& p, int64_t panel, int64_t row, int64_t stop) {
  const Floats bias = load(p.bias + panel * kPanelRows);
  for (; row < stop; ++row) {
    float* const y = p.y + row * p.ldy + panel * kPanelRows;
    store(y, load(y) + bias);
  }
}

// Panels [begin, end), a multiple of kBlockPanels of them and none padded, of rows [row, stop).
template <class Group>
[[gnu::noinline]] void block_product(const Product& p, Unpack<Group> unpack, int64_t begin, int64_t end, int64_t row,
                                     int64_t stop) {
  Block<Group> b;
  const int64_t groups = p.cols / kGroup, blocks = (groups + kBlockGroups - 1) / kBlockGroups;
  for (int64_t i = 0; i < blocks; ++i) {
    b.first = groups * i / blocks;
    b.count = groups * (i + 1) / blocks - b.first;
    for (int64_t panel = begin; panel < end; panel += kBlockPanels) {
      for (int j = 0; j < kBlockPanels; ++j)
        unpack(p.packed + (panel + j) * p.panel_bytes, b.first, b.count, kAhead, &b.groups[0][j], kBlockPanels);
      block_tiles<Group, kBlockRows>(p, b, panel, row, stop);
    }
  }
  if (!p.bias) return;
  for (int64_t panel = begin; panel < end; ++panel) add_bias(p, panel, row, stop);
}

}  // namespace
}  // namespace kt
