// One tile of attention: some queries in front of kTile positions. All scores, their softmax, then all weighted values.
//
// Keys and values are bfloat16 pairs, and so are queries and weights; int8 is widened to them, once for all queries of a
// task. Latent rows are in attention_rows.inl.
#pragma once

namespace kt {
namespace {

constexpr int kBlockPairs = kBlock / 2;
constexpr int kTileBlocks = 4;
constexpr int kTile = kTileBlocks * kBlock;
static_assert(kSpanTokens % kTile == 0);
constexpr int kQueries = 6;  // whose sums are in registers at once
constexpr int kFolded = 8 * kQueries;  // whose scores are, in the first-level cache: their softmax waits for no sum
// Vectors for each of M queries kept in registers: 6 x 4 accumulators of 32 registers; of 16 6 x 1, or of fewer queries so many
// that sums do not wait for themselves.
template <int M>
constexpr int kWide = kTileRowsFloat >= 12 ? 4 : M == 1 ? 4 : M == 2 ? 2 : 1;
// So many queries make it worth while to split a tile's pairs once, where that is done at all.
constexpr int64_t kSplitFrom = 2 * kQueries;
// Where a tile's sums of kQueries fit in registers, softmax goes on while the next ones are made, on units that these leave
// idle.
constexpr bool kOverlaps = kWide<kQueries> == kTileBlocks;
constexpr float kMinusInfinity = -__builtin_inff();

// What each of up to kQueries queries sees of a tile: positions, relative to the tile's first.
struct Front {
  int begin[kQueries], end[kQueries];
  int low, high;          // what any sees
  int all_low, all_high;  // what all see, in whole pairs; empty when they are equal
  int first() const { return low / kBlock; }
  int last() const { return (high + kBlock - 1) / kBlock; }
};

constexpr Front kSeesAll = {{}, {kTile, kTile, kTile, kTile, kTile, kTile}, 0, kTile, 0, kTile};

// `ahead` is what to prefetch while the tile is read: the blocks of the next one, or its own when there is no need.
// (The processor's own prefetching ends with a page, and one kv head's part of a block is about that long.) `scales` of
// widened blocks, else null.
struct Tile {
  const uint8_t *block[kTileBlocks], *ahead[kTileBlocks];
  const float* scales[kTileBlocks];
};

inline int least(int a, int b) { return a < b ? a : b; }
inline int most(int a, int b) { return a > b ? a : b; }

// Of the first of the queries that are folded together; those of the next follow.
struct Queries {
  const float* q;  // [head_dim], or as many elements in pairs
  float *maximum, *sum, *out;
  float* scores;  // [kTile]
  Pair* weights;  // [kTile / 2]
};

// The sums of keys and queries: s[m][b] = q_m . k, from unit `begin` on. While unit u is multiplied, also(u) happens.
template <class Units, int M, int B, class Also>
inline void dot_units(Floats (&s)[M][B], const Pair* q, const uint8_t* const (&keys)[B], int64_t pairs, int64_t begin,
                      int64_t end, const Also& also) {
  for (int64_t u = begin; u < end; ++u) {
    typename Units::Unit k[B];
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) k[b] = Units::load(keys[b] + u * kUnitBytes);
    also(u);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) s[m][b] = Units::add_product(s[m][b], k[b], q + m * pairs, u);
  }
}

// scores[m][b * kBlock + lane] = q_m . k, which `s` has too. Meanwhile also(u) for each u below `count`, or, where that is 0,
// the blocks ahead are prefetched.
template <class Units, int M, int B, class Also>
inline void dot_keys(const Pair* q, const Tile& tile, int first, int64_t head_dim, float* scores, int64_t count,
                     const Also& also, Floats (&s)[M][B]) {
  const uint8_t* keys[B];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) s[m][b] = set1(0.0f);
#pragma GCC unroll 4
  for (int b = 0; b < B; ++b) keys[b] = tile.block[first + b];
  const int64_t pairs = head_dim / 2, units = pairs * Units::kOfPair;
  if (count == 0) {
    dot_units<Units>(s, q, keys, pairs, 0, units, [&](int64_t u) {
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b)
        if (Units::kOfPair == 1) __builtin_prefetch(tile.ahead[first + b] + u * kUnitBytes, 0, 2);
    });
  } else {
    const int64_t both = count < units ? count : units;
    dot_units<Units>(s, q, keys, pairs, 0, both, also);
    dot_units<Units>(s, q, keys, pairs, both, units, [](int64_t) {});
    for (int64_t u = both; u < count; ++u) also(u);
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) store(scores + m * kTile + b * kBlock, s[m][b]);
}
template <class Units, int M, int B>
inline void dot_keys(const Pair* q, const Tile& tile, int first, int64_t head_dim, float* scores) {
  Floats s[M][B];
  dot_keys<Units>(q, tile, first, head_dim, scores, 0, [](int64_t) {}, s);
}

// out_m[d, d + D vectors) += the weighted values of units [begin, end) of pairs of positions, in ascending order.
template <class Units, int M, int D>
inline void add_values(const AttentionTask& t, float* out, const Pair* weights, const Tile& tile, int64_t d, int begin,
                       int end, int32_t seen) {
  constexpr int kOfBlock = kBlockPairs * Units::kOfPair;
  Floats acc[M][D];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int i = 0; i < D; ++i) acc[m][i] = load(out + m * t.value_dim + d + i * kLanes);
  const int64_t row = t.head_dim / kLanes;
  for (int u = begin; u < end;) {
    const int b = u / kOfBlock, stop = least((b + 1) * kOfBlock, end);
    int64_t at = ((t.head_dim / 2) * Units::kOfPair + u % kOfBlock * row + d / kLanes) * kUnitBytes;
    for (; u < stop; ++u, at += row * kUnitBytes) {
      typename Units::Unit v[D];
#pragma GCC unroll 4
      for (int i = 0; i < D; ++i) {
        v[i] = Units::load(tile.block[b] + at + i * kUnitBytes);
        if (M == 1) v[i] = Units::hide(v[i], u, seen);
        if (Units::kOfPair == 1) __builtin_prefetch(tile.ahead[b] + at + i * kUnitBytes, 0, 2);
      }
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int i = 0; i < D; ++i) acc[m][i] = Units::add_product(acc[m][i], v[i], weights + m * kTile / 2, u);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int i = 0; i < D; ++i) store(out + m * t.value_dim + d + i * kLanes, acc[m][i]);
}

// Pairs of positions [begin, end); value_dim in slices of kWide vectors and then of one.
template <class Units, int M>
inline void add_all_values(const AttentionTask& t, float* out, const Pair* weights, const Tile& tile, int begin,
                           int end, int32_t seen = kEven | kOdd) {
  if (begin >= end) return;
  constexpr int kVectors = kWide<M>;
  begin *= Units::kOfPair;
  end *= Units::kOfPair;
  int64_t d = 0;
  for (; d + kVectors * kLanes <= t.value_dim; d += kVectors * kLanes)
    add_values<Units, M, kVectors>(t, out, weights, tile, d, begin, end, seen);
  for (; d < t.value_dim; d += kLanes) add_values<Units, M, 1>(t, out, weights, tile, d, begin, end, seen);
}

// Positions [begin, end) for one query, which may see half of the first and of the last pair.
template <class Units>
inline void add_some_values(const AttentionTask& t, float* out, const Pair* weights, const Tile& tile, int begin,
                            int end) {
  if (begin >= end) return;
  if (begin % 2 != 0) add_all_values<Units, 1>(t, out, weights, tile, begin / 2, begin / 2 + 1, kOdd);
  add_all_values<Units, 1>(t, out, weights, tile, (begin + 1) / 2, end / 2);
  if (end % 2 != 0) add_all_values<Units, 1>(t, out, weights, tile, end / 2, end / 2 + 1, kEven);
}

// Scales each position's scores.
inline void scale_scores(const Tile& tile, int count, int first, int last, float* scores) {
  for (int b = first; b < last; ++b) {
    const Floats scale = load(tile.scales[b]);
    for (int m = 0; m < count; ++m) {
      float* at = scores + m * kTile + b * kBlock;
      store(at, load(at) * scale);
    }
  }
}

// Of the blocks that any of the queries sees; value_dim sums of all positions that each sees.
template <class Units>
struct PairCells {
  static int64_t q_floats(const AttentionTask& t) { return t.head_dim / 2 * kPairFloats; }
  template <int M>
  static void score(const AttentionTask& t, const Front& f, const Queries& x, const Tile& tile) {
    const Pair* q = reinterpret_cast<const Pair*>(x.q);
    int b = f.first();
    constexpr int kBlocks = kWide<M>;
    for (; b + kBlocks <= f.last(); b += kBlocks)
      dot_keys<Units, M, kBlocks>(q, tile, b, t.head_dim, x.scores + b * kBlock);
    for (; b < f.last(); ++b) dot_keys<Units, M, 1>(q, tile, b, t.head_dim, x.scores + b * kBlock);
    if (tile.scales[f.first()] != nullptr) scale_scores(tile, M, f.first(), f.last(), x.scores);
  }
  // Each query in ascending order: what it sees before the common part, that, and what it sees after.
  template <int M>
  static void add(const AttentionTask& t, const Front& f, const Queries& x, const Tile& tile) {
    const auto add_some = [&](int m, int begin, int end) {
      add_some_values<Units>(t, x.out + m * t.value_dim, x.weights + m * kTile / 2, tile, begin, end);
    };
    for (int m = 0; m < M; ++m) add_some(m, f.begin[m], least(f.end[m], f.all_low));
    add_all_values<Units, M>(t, x.out, x.weights, tile, f.all_low / 2, f.all_high / 2);
    for (int m = 0; m < M; ++m) add_some(m, most(f.begin[m], f.all_high), f.end[m]);
  }
  // Of one query, in front of blocks [first, last): weights, added to the vector of their sums as they were rounded, so that
  // they are parts of 1 whatever rounding does. (Not where each has been multiplied with a scale before.)
  static Floats weigh(const Queries& x, const Tile& tile, int first, int last, Floats shift, Floats total) {
    if (tile.scales[first] != nullptr) {
      for (int b = first; b < last; ++b) {
        const Floats weights = weights_of(x, b, shift);
        total = total + weights;
        // The scale of a position that is not seen may be anything.
        const Floats scaled = weights * load(tile.scales[b] + kBlock);
        store_pairs(x.weights + b * kBlock / 2, select_less(set1(0.0f), weights, scaled, weights));
      }
    } else if (last - first == kTileBlocks) {
#pragma GCC unroll 4
      for (int b = 0; b < kTileBlocks; ++b) total = weigh_block(x, b, shift, total);
    } else {
      for (int b = first; b < last; ++b) total = weigh_block(x, b, shift, total);
    }
    return total;
  }

 private:
  static Floats weights_of(const Queries& x, int b, Floats shift) {
    return coarse_exp2(load(x.scores + b * kBlock) - shift);
  }
  static Floats weigh_block(const Queries& x, int b, Floats shift, Floats total) {
    return total + store_pairs(x.weights + b * kBlock / 2, weights_of(x, b, shift));
  }
};

// Caps and masks the scores of one query, which are logarithms to base 2; returns their maximum.
inline float finish_scores(const AttentionTask& t, int begin, int end, int first, int last, float* scores) {
  Floats maximum = set1(kMinusInfinity);
  if (t.softcap == 0.0f && end - begin == kTile) {
#pragma GCC unroll 4
    for (int b = 0; b < kTileBlocks; ++b) maximum = max(load(scores + b * kBlock), maximum);
    return hmax(maximum);
  }
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

// Those from query m on.
template <class Cells>
inline Queries at_query(const AttentionTask& t, const Queries& x, int64_t m) {
  return {x.q + m * Cells::q_floats(t), x.maximum + m,         x.sum + m * kLanes,
          x.out + m * t.value_dim,      x.scores + m * kTile, x.weights + m * kTile / 2};
}

// Scores are shifted by the query's maximum before they become weights. It follows a larger score when that is more than
// kSlack larger, so what was summed is hardly ever scaled. (As FlashAttention-4: a weight of 2^8 is as exact as one of 1.)
constexpr float kSlack = 8.0f;

// `tops`: the largest scores of a tile. Where the maximum moves, what was summed is scaled.
inline void raise(const AttentionTask& t, const Queries& x, int count, const float* tops, float* shift) {
  float factor[kFolded];
  for (int m = 0; m < count; m += kLanes) {
    const int n = least(kLanes, count - m);
    const Floats old = load_n(x.maximum + m, n), now = load_n(tops + m, n);
    const Floats top = select_less(old + set1(kSlack), now, now, old);
    store_n(x.maximum + m, top, n);
    // A query that has seen nothing yet (its window begins later) must not compute infinity - infinity.
    const Floats some = select_less(set1(kMinusInfinity), top, top, set1(0.0f));
    store_n(shift + m, some, n);
    // Where nothing was summed there is nothing to scale.
    store_n(factor + m, select_less(set1(kMinusInfinity), old, exp2(old - some), set1(1.0f)), n);
  }
  for (int m = 0; m < count; ++m) {
    if (factor[m] == 1.0f) continue;
    const Floats by = set1(factor[m]);
    store(x.sum + m * kLanes, load(x.sum + m * kLanes) * by);
    float* out = x.out + m * t.value_dim;
    for (int64_t d = 0; d < t.value_dim; d += kLanes) store(out + d, load(out + d) * by);
  }
}

// Turns the scores of `count` queries into weights.
template <class Cells>
inline void fold_scores(const AttentionTask& t, const Front* fronts, int count, const Queries& x, const Tile& tile) {
  float tops[kFolded], shift[kFolded];
  for (int m = 0; m < count; ++m) {
    const Front& f = fronts[m / kQueries];
    tops[m] = finish_scores(t, f.begin[m % kQueries], f.end[m % kQueries], f.first(), f.last(), x.scores + m * kTile);
  }
  raise(t, x, count, tops, shift);
  for (int m = 0; m < count; ++m) {
    const Front& f = fronts[m / kQueries];
    if (f.low >= f.high) continue;
    const Floats total = load(x.sum + m * kLanes);
    store(x.sum + m * kLanes, Cells::weigh(at_query<Cells>(t, x, m), tile, f.first(), f.last(), set1(shift[m]), total));
  }
}

using OfFront = void (*)(const AttentionTask&, const Front&, const Queries&, const Tile&);
template <class Cells>
constexpr OfFront kScore[kQueries + 1] = {nullptr,
                                          Cells::template score<1>,
                                          Cells::template score<2>,
                                          Cells::template score<3>,
                                          Cells::template score<4>,
                                          Cells::template score<5>,
                                          Cells::template score<6>};
template <class Cells>
constexpr OfFront kAdd[kQueries + 1] = {nullptr,
                                        Cells::template add<1>,
                                        Cells::template add<2>,
                                        Cells::template add<3>,
                                        Cells::template add<4>,
                                        Cells::template add<5>,
                                        Cells::template add<6>};

// For each front, with what is to be prefetched for the first.
template <class Cells>
inline void for_fronts(const OfFront* fn, const AttentionTask& t, const Front* fronts, int count, const Queries& x,
                       Tile tile) {
  for (int m = 0; m < count; m += kQueries) {
    const Front& f = fronts[m / kQueries];
    if (f.low >= f.high) continue;
    fn[least(kQueries, count - m)](t, f, at_query<Cells>(t, x, m), tile);
    for (int b = 0; b < kTileBlocks; ++b) tile.ahead[b] = tile.block[b];
  }
}

// Up to kFolded queries; front i is that of kQueries of them, the last of as many as are left.
template <class Cells>
void fold_tile(const AttentionTask& t, const Front* fronts, int count, const Queries& x, const Tile& tile) {
  for_fronts<Cells>(kScore<Cells>, t, fronts, count, x, tile);
  fold_scores<Cells>(t, fronts, count, x, tile);
  for_fronts<Cells>(kAdd<Cells>, t, fronts, count, x, tile);
}

// Queries whose scores of a whole tile have to become weights.
struct Waiting {
  const float *scores, *shift;
  float* sum;
  Pair* weights;
  // Vector u of theirs.
  void operator()(int64_t u) const {
    const Floats some = coarse_exp2(load(scores + u * kLanes) - set1(shift[u / kTileBlocks]));
    float* total = sum + u / kTileBlocks * kLanes;
    store(total, load(total) + store_pairs(weights + u * kLanes / 2, some));
  }
};

// Scores of M queries that see the whole tile; meanwhile `count` vectors of those that wait become weights. Whether the
// maximum of any of the M has to move.
template <class Units, int M>
bool score_all(const AttentionTask& t, const Queries& x, const Tile& tile, const Waiting& waiting, int count) {
  Floats s[M][kTileBlocks];
  dot_keys<Units>(reinterpret_cast<const Pair*>(x.q), tile, 0, t.head_dim, x.scores, count, waiting, s);
  uint32_t any = 0;
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    Floats maximum = set1(kMinusInfinity);
#pragma GCC unroll 4
    for (int b = 0; b < kTileBlocks; ++b) maximum = max(s[m][b], maximum);
    any |= which_less(set1(x.maximum[m] + kSlack), maximum);
  }
  return any != 0;
}
using OfAll = bool (*)(const AttentionTask&, const Queries&, const Tile&, const Waiting&, int);
template <class Units>
constexpr OfAll kScoreAll[kQueries + 1] = {nullptr,
                                           score_all<Units, 1>,
                                           score_all<Units, 2>,
                                           score_all<Units, 3>,
                                           score_all<Units, 4>,
                                           score_all<Units, 5>,
                                           score_all<Units, 6>};

// As fold_tile, with the same bits, where every query sees all of the tile. What is in work is scores and weights of two times
// kQueries: with keys, values and sums that fits the first-level cache.
template <class Units>
void fold_whole_tile(const AttentionTask& t, const Front*, int count, const Queries& x, const Tile& tile) {
  using Cells = PairCells<Units>;
  float shift[2 * kQueries];
  Waiting waiting{};
  Queries before{};
  int vectors = 0;  // that wait
  Tile now = tile;
  for (int m = 0; m < count; m += kQueries) {
    const int n = least(kQueries, count - m), half = m % (2 * kQueries);
    Queries some = at_query<Cells>(t, x, m);
    some.scores = x.scores + half * kTile;
    some.weights = x.weights + half * kTile / 2;
    if (kScoreAll<Units>[n](t, some, now, waiting, vectors)) {
      float tops[kQueries];
      for (int i = 0; i < n; ++i) tops[i] = finish_scores(t, 0, kTile, 0, kTileBlocks, some.scores + i * kTile);
      raise(t, some, n, tops, shift + half);
    } else {
      const Floats top = load_n(some.maximum, n);
      store_n(shift + half, select_less(set1(kMinusInfinity), top, top, set1(0.0f)), n);
    }
    if (m != 0) {
      kAdd<Cells>[kQueries](t, kSeesAll, before, now);
      for (int b = 0; b < kTileBlocks; ++b) now.ahead[b] = tile.block[b];
    }
    waiting = {some.scores, shift + half, some.sum, some.weights};
    before = some;
    vectors = n * kTileBlocks;
  }
  for (int u = 0; u < vectors; ++u) waiting(u);
  kAdd<Cells>[vectors / kTileBlocks](t, kSeesAll, before, now);
}

}  // namespace
}  // namespace kt
