// Paged causal attention over the vector vocabulary: online softmax, one pass over the keys and values.
//
// The positions are folded in tiles that begin at multiples of kTile, whatever the row and the chunk. For one query the
// sequence of operations thus depends on its position only: a tile that others of the chunk see but it does not is
// skipped or folded as an exact no-op (maximum unchanged, sum + 0), and its bits are the same alone, in any chunk, or
// after a prefix hit. What is masked is never multiplied: memory behind it may hold anything, NaN among it.
//
// Fast because queries (rows x heads of the group) are taken kQueries at a time: each key and value is converted from
// float16 once for all of them, and their sums stay in registers.
#pragma once

namespace kt {
namespace {

constexpr int kBlock = static_cast<int>(kBlockTokens);
static_assert(kBlock == kLanes, "the scores of a block are one vector");

constexpr int kTileBlocks = 4;
constexpr int kTile = kTileBlocks * kBlock;
constexpr int kQueries = 6;
// Vectors per query kept in registers: 6 x 4 accumulators of 32 registers, or 6 x 1 pairs of 16.
constexpr int kWide = kTileRowsFloat >= 12 ? 4 : 1;
constexpr float kMinusInfinity = -__builtin_inff();

// Up to kQueries queries in front of one tile. Positions are relative to the tile's first.
struct Front {
  const float* q[kQueries];
  float* out[kQueries];
  int begin[kQueries], end[kQueries];  // positions that each sees
  int low, high;                       // ... that any sees
  int all_low, all_high;               // ... that all see; empty when all_low >= all_high
};

struct Tile {
  const uint16_t* block[kTileBlocks];
};

void store_kv(const float* k, const float* v, int64_t head_dim, int64_t offset_in_block, uint16_t* block) {
  uint16_t half[kLanes];
  uint16_t* values = block + head_dim * kBlock + offset_in_block * head_dim;
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    store_f16(half, load(k + d));
    for (int i = 0; i < kLanes; ++i) block[(d + i) * kBlock + offset_in_block] = half[i];
    store_f16(values + d, load(v + d));
  }
}

// weights[m][b * kBlock + lane] = q_m . k
template <int M, int B>
inline void dot_keys(const Front& f, const uint16_t* const* blocks, int64_t head_dim, float* weights) {
  Floats s[M][B];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) s[m][b] = set1(0.0f);
  for (int64_t d = 0; d < head_dim; ++d) {
    Floats k[B];
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) k[b] = load_f16(blocks[b] + d * kBlock);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const Floats q = set1(f.q[m][d]);
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) s[m][b] = fma(q, k[b], s[m][b]);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) store(weights + m * kTile + b * kBlock, s[m][b]);
}

// out_m[d, d + D vectors) += weights[m][j] * value[j], for j in [begin, end) in ascending order.
template <int M, int D>
inline void add_values(float* const* out, const float* const* weights, const Tile& tile, int64_t head_dim, int64_t d,
                       int begin, int end) {
  Floats acc[M][D];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int i = 0; i < D; ++i) acc[m][i] = load(out[m] + d + i * kLanes);
  for (int j = begin; j < end; ++j) {
    const uint16_t* value = tile.block[j / kBlock] + (kBlock + j % kBlock) * head_dim + d;
    Floats v[D];
#pragma GCC unroll 4
    for (int i = 0; i < D; ++i) v[i] = load_f16(value + i * kLanes);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const Floats w = set1(weights[m][j]);
#pragma GCC unroll 4
      for (int i = 0; i < D; ++i) acc[m][i] = fma(w, v[i], acc[m][i]);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int i = 0; i < D; ++i) store(out[m] + d + i * kLanes, acc[m][i]);
}

// All of [begin, end), head_dim in slices of kWide vectors and then of one.
template <int M>
inline void add_all_values(float* const* out, const float* const* weights, const Tile& tile, int64_t head_dim,
                           int begin, int end) {
  if (begin >= end) return;
  int64_t d = 0;
  for (; d + kWide * kLanes <= head_dim; d += kWide * kLanes)
    add_values<M, kWide>(out, weights, tile, head_dim, d, begin, end);
  for (; d < head_dim; d += kLanes) add_values<M, 1>(out, weights, tile, head_dim, d, begin, end);
}

// Scores of the blocks [first, last) of the tile that any of the queries sees.
template <int M>
inline void score(const AttentionTask& t, const Front& f, const Tile& tile, int first, int last, float* weights) {
  int b = first;
  for (; b + kWide <= last; b += kWide)
    dot_keys<M, kWide>(f, tile.block + b, t.head_dim, weights + b * kBlock);
  for (; b < last; ++b) dot_keys<M, 1>(f, tile.block + b, t.head_dim, weights + b * kBlock);
}

// Scales, caps and masks the scores of one query; returns their maximum.
inline float finish_scores(const AttentionTask& t, int begin, int end, int first, int last, float* scores) {
  const float lane_numbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Floats lane = load(lane_numbers);
  Floats maximum = set1(kMinusInfinity);
  for (int b = first; b < last; ++b) {
    Floats s = load(scores + b * kBlock) * set1(t.scale);
    if (t.softcap > 0.0f) s = set1(t.softcap) * tanh(s / set1(t.softcap));
    if (begin > b * kBlock || end < (b + 1) * kBlock) {
      const Floats position = lane + set1(static_cast<float>(b * kBlock));
      s = select_less(position, set1(static_cast<float>(end)), s, set1(kMinusInfinity));
      s = select_less(position, set1(static_cast<float>(begin)), set1(kMinusInfinity), s);
    }
    store(scores + b * kBlock, s);
    maximum = max(s, maximum);
  }
  return hmax(maximum);
}

// Turns scores into weights, and rescales what was summed before when the maximum has moved.
template <int M>
inline void fold_scores(const AttentionTask& t, const Front& f, int first, int last, float* maximum, float* sum,
                        float* weights) {
  float shift[kQueries], delta[kLanes] = {};
  for (int m = 0; m < M; ++m) {
    const float tile_max = finish_scores(t, f.begin[m], f.end[m], first, last, weights + m * kTile);
    const float old = maximum[m];
    maximum[m] = tile_max > old ? tile_max : old;
    // A query that has seen nothing yet (its window begins later) must not compute infinity - infinity.
    shift[m] = maximum[m] == kMinusInfinity ? 0.0f : maximum[m];
    delta[m] = old - shift[m];
  }
  float factor[kLanes];
  store(factor, exp(load(delta)));
  for (int m = 0; m < M; ++m) {
    Floats total = load(sum + m * kLanes) * set1(factor[m]);
    for (int b = first; b < last; ++b) {
      float* w = weights + m * kTile + b * kBlock;
      const Floats p = exp(load(w) - set1(shift[m]));
      store(w, p);
      total = total + p;
    }
    store(sum + m * kLanes, total);
    if (factor[m] != 1.0f)  // NaN too
      for (int64_t d = 0; d < t.head_dim; d += kLanes)
        store(f.out[m] + d, load(f.out[m] + d) * set1(factor[m]));
  }
}

template <int M>
void fold_tile(const AttentionTask& t, const Front& f, const Tile& tile, float* maximum, float* sum, float* weights) {
  const int first = f.low / kBlock, last = (f.high + kBlock - 1) / kBlock;
  score<M>(t, f, tile, first, last, weights);
  fold_scores<M>(t, f, first, last, maximum, sum, weights);
  const float* w[kQueries];
  for (int m = 0; m < M; ++m) w[m] = weights + m * kTile;
  const int begin = f.all_low, end = f.all_low < f.all_high ? f.all_high : f.all_low;
  for (int m = 0; m < M; ++m)
    add_all_values<1>(f.out + m, w + m, tile, t.head_dim, f.begin[m], f.end[m] < begin ? f.end[m] : begin);
  add_all_values<M>(f.out, w, tile, t.head_dim, begin, end);
  for (int m = 0; m < M; ++m)
    add_all_values<1>(f.out + m, w + m, tile, t.head_dim, f.begin[m] > end ? f.begin[m] : end, f.end[m]);
}

// Points the queries [first, first + count) at the tile that begins at `start`. False when none of them sees it.
inline bool make_front(const AttentionTask& t, int64_t first, int count, int64_t start, Front& f) {
  f.low = f.all_high = kTile;
  f.high = f.all_low = 0;
  int64_t row = first / t.group, head = first % t.group;
  for (int m = 0; m < count; ++m) {
    const int64_t position = t.first_position + row;
    const int64_t begin = (t.window > 0 ? position - t.window + 1 : 0) - start;
    const int64_t end = position + 1 - start;
    f.q[m] = t.q + row * t.q_stride + head * t.head_dim;
    f.out[m] = t.out + row * t.out_stride + head * t.head_dim;
    f.begin[m] = static_cast<int>(begin < 0 ? 0 : begin > kTile ? kTile : begin);
    f.end[m] = static_cast<int>(end < f.begin[m] ? f.begin[m] : end > kTile ? kTile : end);
    if (f.begin[m] < f.end[m]) {
      if (f.begin[m] < f.low) f.low = f.begin[m];
      if (f.end[m] > f.high) f.high = f.end[m];
    }
    if (f.begin[m] > f.all_low) f.all_low = f.begin[m];
    if (f.end[m] < f.all_high) f.all_high = f.end[m];
    if (++head == t.group) {
      head = 0;
      ++row;
    }
  }
  return f.low < f.high;
}

using FoldTile = void (*)(const AttentionTask&, const Front&, const Tile&, float*, float*, float*);
constexpr FoldTile kFoldTile[kQueries + 1] = {nullptr,      fold_tile<1>, fold_tile<2>, fold_tile<3>,
                                              fold_tile<4>, fold_tile<5>, fold_tile<6>};

size_t attention_scratch_floats(const AttentionTask& t) {
  return static_cast<size_t>(t.rows * t.group) * (1 + kLanes) + kQueries * kTile;
}

void attention(const AttentionTask& t, float* scratch) {
  const int64_t queries = t.rows * t.group;
  float* maximum = scratch;
  float* sum = maximum + queries;
  float* weights = sum + queries * kLanes;
  for (int64_t i = 0; i < queries; ++i) {
    maximum[i] = kMinusInfinity;
    store(sum + i * kLanes, set1(0.0f));
    float* out = t.out + i / t.group * t.out_stride + i % t.group * t.head_dim;
    for (int64_t d = 0; d < t.head_dim; d += kLanes) store(out + d, set1(0.0f));
  }
  const int64_t end = t.first_position + t.rows;
  const int64_t seen_from = t.window > 0 && t.first_position >= t.window ? t.first_position - t.window + 1 : 0;
  for (int64_t start = seen_from / kTile * kTile; start < end; start += kTile) {
    Tile tile;
    for (int b = 0; b < kTileBlocks; ++b) {
      const int64_t index = start / kBlock + b;
      tile.block[b] = index * kBlock < end ? t.kv + t.blocks[index] * t.block_stride : nullptr;
    }
    for (int64_t i = 0; i < queries; i += kQueries) {
      const int count = static_cast<int>(queries - i < kQueries ? queries - i : kQueries);
      Front front;
      if (!make_front(t, i, count, start, front)) continue;
      kFoldTile[count](t, front, tile, maximum + i, sum + i * kLanes, weights);
    }
  }
  for (int64_t i = 0; i < queries; ++i) {
    const Floats inverse = set1(1.0f / hsum(load(sum + i * kLanes)));
    float* out = t.out + i / t.group * t.out_stride + i % t.group * t.head_dim;
    for (int64_t d = 0; d < t.head_dim; d += kLanes) store(out + d, load(out + d) * inverse);
  }
}

}  // namespace
}  // namespace kt
