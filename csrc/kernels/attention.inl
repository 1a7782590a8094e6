// Paged causal attention over the vector vocabulary: online softmax, one pass over the keys and values, which are
// made float32 as they are read, and multiplied and summed so. (Products of bfloat16 pairs are 1.7 times as fast, and cost more fidelity than may
// be lost: tests/bench/README.md.)
//
// The positions are folded in tiles that begin at multiples of kTile, and tiles in spans that begin at multiples of
// kSpanTokens, whatever the row and the chunk. For one query the sequence of operations thus depends on its position
// only: a tile that others of the chunk see but it does not is skipped or folded as an exact no-op (maximum unchanged,
// sum + 0), and its bits are the same alone, in any chunk, or after a prefix hit. What is masked is never multiplied:
// memory behind it may hold anything, NaN among it.
//
// Fast because queries (rows x heads of the group) are taken kQueries at a time: each key and value is loaded once for
// all of them, and their sums stay in registers.
#pragma once

namespace kt {
namespace {

constexpr int kBlock = static_cast<int>(kBlockTokens);
static_assert(kBlock == kLanes, "the scores of a block are one vector");

constexpr int kTileBlocks = 4;
constexpr int kTile = kTileBlocks * kBlock;
static_assert(kSpanTokens % kTile == 0);
constexpr int kQueries = 6;
// Vectors for each of M queries kept in registers: 6 x 4 accumulators of 32 registers; of 16 6 x 1 pairs, or of fewer
// queries so many that sums do not wait for themselves.
template <int M>
constexpr int kWide = kTileRowsFloat >= 12 ? 4 : M == 1 ? 4 : M == 2 ? 2 : 1;
constexpr float kMinusInfinity = -__builtin_inff();

// Up to kQueries queries in front of one tile. Positions are relative to the tile's first.
struct Front {
  const float* q[kQueries];
  float* out[kQueries];
  int begin[kQueries], end[kQueries];  // positions that each sees
  int low, high;                       // ... that any sees
  int all_low, all_high;               // ... that all see; empty when all_low >= all_high
};

// `ahead` is what to prefetch while the tile is read: the blocks of the next one, or its own when there is no need.
// (The processor's own prefetching ends with a page, and one kv head's part of a block is about that long.)
struct Tile {
  const uint8_t *block[kTileBlocks], *ahead[kTileBlocks];
};

// How keys and values are kept: KvFormat as types. Scales are those of a block's keys; its values' follow.
struct HalfCells {
  static constexpr int kBytes = 2;
  static constexpr bool kScaled = false, kRows = false;
  static Floats load(const uint8_t* block, int64_t i) { return load_f16(reinterpret_cast<const uint16_t*>(block) + i); }
};
struct LatentCells : HalfCells {
  static constexpr bool kRows = true;
};
struct Int8Cells {
  static constexpr int kBytes = 1;
  static constexpr bool kScaled = true, kRows = false;
  static Floats load(const uint8_t* block, int64_t i) { return to_floats(load_i8(block + i)); }
  static const float* scales(const uint8_t* block, int64_t head_dim) {
    return reinterpret_cast<const float*>(block + 2 * kBlock * head_dim);
  }
};
constexpr int kLineBytes = 64;

// What has been folded so far: for each query a maximum of its scores, a vector of sums of weights, and head_dim sums
// of weighted values.
template <class Float>
struct State {
  Float *maximum, *sum, *out;
  State(const AttentionTask& t, Float* at)
      : maximum(at), sum(at + t.rows * t.group), out(sum + t.rows * t.group * kLanes) {}
};

size_t attention_state_floats(const AttentionTask& t) {
  return static_cast<size_t>(t.rows * t.group * (1 + kLanes + t.value_dim));
}

// The working memory of a task.
struct Scratch {
  float* q;        // [queries][head_dim]
  float* weights;  // [kQueries][kTile], scores before
  float* part;     // a state
  float* total;    // a state
  static size_t floats(const AttentionTask& t) {
    return static_cast<size_t>(t.rows * t.group * t.head_dim + kQueries * kTile) + 2 * attention_state_floats(t);
  }
  Scratch(const AttentionTask& t, float* at) {
    q = at;
    weights = q + t.rows * t.group * t.head_dim;
    part = weights + kQueries * kTile;
    total = part + attention_state_floats(t);
  }
};

size_t attention_scratch_floats(const AttentionTask& t) { return Scratch::floats(t); }

void store_f16_kv(const float* k, const float* v, int64_t head_dim, int64_t offset, uint16_t* keys) {
  uint16_t half[kLanes];
  uint16_t* values = keys + (kBlock + offset) * head_dim;
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    store_f16(half, load(k + d));
    for (int i = 0; i < kLanes; ++i) keys[(d + i) * kBlock + offset] = half[i];
    store_f16(values + d, load(v + d));
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

void store_kv(KvFormat format, const float* k, const float* v, int64_t head_dim, int64_t offset_in_block, uint8_t* block) {
  if (format == KvFormat::kF16) return store_f16_kv(k, v, head_dim, offset_in_block, reinterpret_cast<uint16_t*>(block));
  int8_t* keys = reinterpret_cast<int8_t*>(block);
  float* scales = reinterpret_cast<float*>(block + 2 * kBlock * head_dim) + offset_in_block;
  scales[0] = quantize_cells(k, head_dim, keys + offset_in_block, kBlock);
  scales[kBlock] = quantize_cells(v, head_dim, keys + (kBlock + offset_in_block) * head_dim, 1);
}

void store_half(const float* x, int64_t n, uint16_t* y) {
  for (int64_t i = 0; i < n; i += kLanes) store_f16(y + i, load(x + i));
}

// scores[m][p] = q_m . row, for P positions of latent rows from `first` on: sums along the row.
template <int M, int P>
inline void dot_rows(const Front& f, const Tile& tile, int first, int64_t head_dim, float* scores) {
  Floats s[M][P];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) s[m][p] = set1(0.0f);
  const uint8_t *block = tile.block[first / kBlock], *ahead = tile.ahead[first / kBlock];
  const int64_t row = first % kBlock * head_dim;
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    Floats k[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      k[p] = LatentCells::load(block, row + p * head_dim + d);
      __builtin_prefetch(ahead + (row + p * head_dim + d) * LatentCells::kBytes);
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const Floats q = load(f.q[m] + d);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) s[m][p] = fma(k[p], q, s[m][p]);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) scores[m * kTile + p] = hsum(s[m][p]);
}

// scores[m][b * kBlock + lane] = q_m . k
template <class Cells, int M, int B>
inline void dot_keys(const Front& f, const Tile& tile, int first, int64_t head_dim, float* scores) {
  Floats s[M][B];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) s[m][b] = set1(0.0f);
  for (int64_t d = 0; d < head_dim; ++d) {
    Floats k[B];
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      k[b] = Cells::load(tile.block[first + b], d * kBlock);
      if (d * kBlock * Cells::kBytes % kLineBytes == 0) __builtin_prefetch(tile.ahead[first + b] + d * kBlock * Cells::kBytes);
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) s[m][b] = fma(k[b], set1(f.q[m][d]), s[m][b]);
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      if constexpr (Cells::kScaled) s[m][b] = s[m][b] * load(Cells::scales(tile.block[first + b], head_dim));
      store(scores + m * kTile + b * kBlock, s[m][b]);
    }
}

// out_m[d, d + D vectors) += the weighted values of positions [begin, end), in ascending order.
template <class Cells, int M, int D>
inline void add_values(const AttentionTask& t, float* const* out, const float* weights, const Tile& tile, int64_t d,
                       int begin, int end) {
  constexpr int kBefore = Cells::kRows ? 0 : kBlock;  // rows of keys
  Floats acc[M][D];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int i = 0; i < D; ++i) acc[m][i] = load(out[m] + d + i * kLanes);
  for (int position = begin; position < end;) {
    const int b = position / kBlock, stop = (b + 1) * kBlock < end ? (b + 1) * kBlock : end;
    int64_t at = (kBefore + position % kBlock) * t.head_dim + d;
    for (; position < stop; ++position, at += t.head_dim) {
      const uint8_t* ahead = tile.ahead[b] + at * Cells::kBytes;
      __builtin_prefetch(ahead);
      if (D * kLanes * Cells::kBytes > kLineBytes) __builtin_prefetch(ahead + kLineBytes);
      Floats v[D];
#pragma GCC unroll 4
      for (int i = 0; i < D; ++i) v[i] = Cells::load(tile.block[b], at + i * kLanes);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int i = 0; i < D; ++i) acc[m][i] = fma(v[i], set1(weights[m * kTile + position]), acc[m][i]);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int i = 0; i < D; ++i) store(out[m] + d + i * kLanes, acc[m][i]);
}

// Positions [begin, end); value_dim in slices of kWide vectors and then of one.
template <class Cells, int M>
inline void add_all_values(const AttentionTask& t, float* const* out, const float* weights, const Tile& tile, int begin,
                           int end) {
  if (begin >= end) return;
  int64_t d = 0;
  for (; d + kWide<M> * kLanes <= t.value_dim; d += kWide<M> * kLanes)
    add_values<Cells, M, kWide<M>>(t, out, weights, tile, d, begin, end);
  for (; d < t.value_dim; d += kLanes) add_values<Cells, M, 1>(t, out, weights, tile, d, begin, end);
}

// Scores of the blocks [first, last) of the tile that any of the queries sees.
template <class Cells, int M>
inline void score(const AttentionTask& t, const Front& f, const Tile& tile, int first, int last, float* scores) {
  if constexpr (Cells::kRows) {
    for (int p = first * kBlock; p < last * kBlock; p += kWide<M>) dot_rows<M, kWide<M>>(f, tile, p, t.head_dim, scores + p);
    return;
  }
  int b = first;
  for (; b + kWide<M> <= last; b += kWide<M>) dot_keys<Cells, M, kWide<M>>(f, tile, b, t.head_dim, scores + b * kBlock);
  for (; b < last; ++b) dot_keys<Cells, M, 1>(f, tile, b, t.head_dim, scores + b * kBlock);
}

// Caps and masks the scores of one query, which are logarithms to base 2; returns their maximum.
inline float finish_scores(const AttentionTask& t, int begin, int end, int first, int last, float* scores) {
  Floats maximum = set1(kMinusInfinity);
  if (t.softcap == 0.0f && begin <= first * kBlock && end >= last * kBlock) {
    for (int b = first; b < last; ++b) maximum = max(load(scores + b * kBlock), maximum);
    return hmax(maximum);
  }
  const float lane_numbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Floats lane = load(lane_numbers), cap = set1(t.softcap * kLog2E);
  for (int b = first; b < last; ++b) {
    Floats s = load(scores + b * kBlock);
    if (t.softcap > 0.0f) s = cap * tanh(s);
    const Floats position = lane + set1(static_cast<float>(b * kBlock));
    s = select_less(position, set1(static_cast<float>(end)), s, set1(kMinusInfinity));
    s = select_less(position, set1(static_cast<float>(begin)), set1(kMinusInfinity), s);
    store(scores + b * kBlock, s);
    maximum = max(s, maximum);
  }
  return hmax(maximum);
}

// Turns scores into weights, in place, and rescales what was summed before when the maximum has moved.
template <int M>
inline void fold_scores(const AttentionTask& t, const Front& f, int first, int last, float* maximum, float* sum,
                        float* scores) {
  float shift[kQueries], delta[kLanes] = {};
  for (int m = 0; m < M; ++m) {
    const float tile_max = finish_scores(t, f.begin[m], f.end[m], first, last, scores + m * kTile);
    const float old = maximum[m];
    maximum[m] = tile_max > old ? tile_max : old;
    // A query that has seen nothing yet (its window begins later) must not compute infinity - infinity.
    shift[m] = maximum[m] == kMinusInfinity ? 0.0f : maximum[m];
    delta[m] = old - shift[m];
  }
  float factor[kLanes];
  store(factor, exp2_of_negative(load(delta)));
  for (int m = 0; m < M; ++m) {
    Floats total = load(sum + m * kLanes) * set1(factor[m]);
    for (int b = first; b < last; ++b) {
      const Floats p = exp2_of_negative(load(scores + m * kTile + b * kBlock) - set1(shift[m]));
      store(scores + m * kTile + b * kBlock, p);
      total = total + p;
    }
    store(sum + m * kLanes, total);
    if (factor[m] != 1.0f)  // NaN too
      for (int64_t d = 0; d < t.value_dim; d += kLanes)
        store(f.out[m] + d, load(f.out[m] + d) * set1(factor[m]));
  }
}

// Weights become those of the integers. What masks leaves is not read: a scale there may be anything.
template <class Cells, int M>
inline void scale_weights(const Tile& tile, int first, int last, int64_t head_dim, float* weights) {
  for (int b = first; b < last; ++b) {
    const Floats scale = load(Cells::scales(tile.block[b], head_dim) + kBlock);
    for (int m = 0; m < M; ++m) {
      float* at = weights + m * kTile + b * kBlock;
      store(at, load(at) * scale);
    }
  }
}

template <class Cells, int M>
void fold_tile(const AttentionTask& t, const Front& f, const Tile& tile, float* maximum, float* sum, const Scratch& s) {
  const int first = f.low / kBlock, last = (f.high + kBlock - 1) / kBlock;
  score<Cells, M>(t, f, tile, first, last, s.weights);
  fold_scores<M>(t, f, first, last, maximum, sum, s.weights);
  if constexpr (Cells::kScaled) scale_weights<Cells, M>(tile, first, last, t.head_dim, s.weights);
  const int begin = f.all_low, end = f.all_low < f.all_high ? f.all_high : f.all_low;
  // Each query in ascending order: what it sees before the common part, that, and what it sees after.
  for (int m = 0; m < M; ++m)
    add_all_values<Cells, 1>(t, f.out + m, s.weights + m * kTile, tile, f.begin[m], f.end[m] < begin ? f.end[m] : begin);
  add_all_values<Cells, M>(t, f.out, s.weights, tile, begin, end);
  for (int m = 0; m < M; ++m)
    add_all_values<Cells, 1>(t, f.out + m, s.weights + m * kTile, tile, f.begin[m] > end ? f.begin[m] : end, f.end[m]);
}

// Points the queries [first, first + count) at the tile that begins at `start`. False when none of them sees it.
inline bool make_front(const AttentionTask& t, int64_t first, int count, int64_t start, const float* q, float* out,
                       Front& f) {
  f.low = f.all_high = kTile;
  f.high = f.all_low = 0;
  int64_t row = first / t.group, head = first % t.group;
  for (int m = 0; m < count; ++m) {
    const int64_t position = t.first_position + row;
    const int64_t begin = first_seen(t, position) - start;
    const int64_t end = position + 1 - start;
    f.q[m] = q + (first + m) * t.head_dim;
    f.out[m] = out + (first + m) * t.value_dim;
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

using FoldTile = void (*)(const AttentionTask&, const Front&, const Tile&, float*, float*, const Scratch&);
template <class Cells>
constexpr FoldTile kFoldTile[kQueries + 1] = {nullptr,
                                              fold_tile<Cells, 1>,
                                              fold_tile<Cells, 2>,
                                              fold_tile<Cells, 3>,
                                              fold_tile<Cells, 4>,
                                              fold_tile<Cells, 5>,
                                              fold_tile<Cells, 6>};

// The queries, scaled so that scores are logarithms to base 2 (or, with a softcap, what its tanh takes).
inline void prepare_queries(const AttentionTask& t, float* q) {
  const Floats scale = set1(t.softcap > 0.0f ? t.scale / t.softcap : t.scale * kLog2E);
  for (int64_t i = 0; i < t.rows * t.group; ++i) {
    const int64_t row = i / t.group, head = i % t.group, front = t.head_dim - t.tail;
    const float* x = t.q + row * t.q_stride + head * front;
    for (int64_t d = 0; d < front; d += kLanes) store(q + i * t.head_dim + d, load(x + d) * scale);
    const float* tail = t.q_tail + row * t.tail_stride + head * t.tail_head;
    for (int64_t d = 0; d < t.tail; d += kLanes) store(q + i * t.head_dim + front + d, load(tail + d) * scale);
  }
}

inline Tile tile_at(const AttentionTask& t, int64_t start, int64_t end) {
  Tile tile;
  for (int b = 0; b < kTileBlocks; ++b) {
    const int64_t index = start / kBlock + b;
    const int64_t ahead = (index + kTileBlocks) * kBlock < end ? index + kTileBlocks : index;
    tile.block[b] = index * kBlock < end ? t.kv + t.blocks[index] * t.block_stride : nullptr;
    tile.ahead[b] = ahead * kBlock < end ? t.kv + t.blocks[ahead] * t.block_stride : nullptr;
  }
  return tile;
}

void fold_span(const AttentionTask& t, int64_t span, float* at, const Scratch& scratch) {
  const State<float> state(t, at);
  const int64_t queries = t.rows * t.group;
  for (int64_t i = 0; i < queries; ++i) state.maximum[i] = kMinusInfinity;
  for (int64_t i = 0; i < queries * (kLanes + t.value_dim); i += kLanes) store(state.sum + i, set1(0.0f));
  const int64_t seen = t.first_position + t.rows, from = first_seen(t, t.first_position);
  const int64_t begin = span * kSpanTokens > from / kTile * kTile ? span * kSpanTokens : from / kTile * kTile;
  const int64_t end = (span + 1) * kSpanTokens < seen ? (span + 1) * kSpanTokens : seen;
  const FoldTile* fold = t.format == KvFormat::kLatent ? kFoldTile<LatentCells>
                         : t.format == KvFormat::kInt8 ? kFoldTile<Int8Cells>
                                                       : kFoldTile<HalfCells>;
  for (int64_t start = begin; start < end; start += kTile) {
    Tile tile = tile_at(t, start, seen);
    for (int64_t i = 0; i < queries; i += kQueries) {
      const int count = static_cast<int>(queries - i < kQueries ? queries - i : kQueries);
      Front front;
      if (!make_front(t, i, count, start, scratch.q, state.out, front)) continue;
      fold[count](t, front, tile, state.maximum + i, state.sum + i * kLanes, scratch);
      for (int b = 0; b < kTileBlocks; ++b) tile.ahead[b] = tile.block[b];
    }
  }
}

// total becomes what total and then part, the state of `span`, have seen. Queries that the span does not reach stay,
// and those for which it is the first start with it: which ones depends on positions only.
void merge(const AttentionTask& t, int64_t span, const State<float>& total, const State<const float>& part) {
  for (int64_t i = 0; i < t.rows * t.group; ++i) {
    const int64_t position = t.first_position + i / t.group;
    const int64_t from = first_seen(t, position);
    if (span < from / kSpanTokens || span > position / kSpanTokens) continue;
    float factors[kLanes] = {kMinusInfinity, 0.0f};
    float top = part.maximum[i];
    if (span > from / kSpanTokens) {
      top = total.maximum[i] > top ? total.maximum[i] : top;
      const float shift = top == kMinusInfinity ? 0.0f : top;
      factors[0] = total.maximum[i] - shift;
      factors[1] = part.maximum[i] - shift;
    }
    store(factors, exp2_of_negative(load(factors)));
    total.maximum[i] = top;
    const auto add = [&](float* into, const float* from_part) {
      const Floats x = load(from_part) * set1(factors[1]);
      store(into, span == from / kSpanTokens ? x : fma(load(into), set1(factors[0]), x));
    };
    add(total.sum + i * kLanes, part.sum + i * kLanes);
    for (int64_t d = i * t.value_dim; d < (i + 1) * t.value_dim; d += kLanes) add(total.out + d, part.out + d);
  }
}

// What the sums of query i are multiplied by.
inline float last_factor(const AttentionTask& t, const State<float>& total, int64_t i) {
  const float sum = hsum(load(total.sum + i * kLanes));
  if (t.sinks == nullptr) return 1.0f / sum;
  const float sink = t.sinks[i % t.group] * kLog2E, top = total.maximum[i] > sink ? total.maximum[i] : sink;
  float factors[kLanes] = {total.maximum[i] - top, sink - top};
  store(factors, exp2_of_negative(load(factors)));
  return factors[0] / (sum * factors[0] + factors[1]);
}

void finish_attention(const AttentionTask& t, const State<float>& total) {
  for (int64_t i = 0; i < t.rows * t.group; ++i) {
    const Floats inverse = set1(last_factor(t, total, i));
    float* out = t.out + i / t.group * t.out_stride + i % t.group * t.value_dim;
    for (int64_t d = 0; d < t.value_dim; d += kLanes) store(out + d, load(total.out + i * t.value_dim + d) * inverse);
  }
}

void attention(const AttentionTask& t, float* memory) {
  const Scratch scratch(t, memory);
  prepare_queries(t, scratch.q);
  const State<float> total(t, scratch.total);
  const State<const float> part(t, scratch.part);
  const int64_t last = (t.first_position + t.rows - 1) / kSpanTokens;
  for (int64_t span = first_seen(t, t.first_position) / kSpanTokens; span <= last; ++span) {
    fold_span(t, span, scratch.part, scratch);
    merge(t, span, total, part);
  }
  finish_attention(t, total);
}

void attention_span(const AttentionTask& t, int64_t span, float* state, float* memory) {
  const Scratch scratch(t, memory);
  prepare_queries(t, scratch.q);
  fold_span(t, span, state, scratch);
}

void attention_merge(const AttentionTask& t, const float* states, float* memory) {
  const State<float> total(t, Scratch(t, memory).total);
  const int64_t last = (t.first_position + t.rows - 1) / kSpanTokens;
  for (int64_t span = first_seen(t, t.first_position) / kSpanTokens; span <= last; ++span) {
    merge(t, span, total, State<const float>(t, states));
    states += attention_state_floats(t);
  }
  finish_attention(t, total);
}

}  // namespace
}  // namespace kt
