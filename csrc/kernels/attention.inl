// Paged causal attention over the vector vocabulary: online softmax, one pass over the keys and values.
//
// The positions are folded in tiles that begin at multiples of kTile, and tiles in spans that begin at multiples of
// kSpanTokens, whatever the row and the chunk. For one query the sequence of operations thus depends on its position
// only: a tile that others of the chunk see but it does not is skipped or folded as an exact no-op (maximum unchanged,
// sum + 0), and its bits are the same alone, in any chunk, or after a prefix hit. What is masked is never multiplied:
// memory behind it may hold anything, NaN among it.
//
// Fast because queries (rows x heads of the group) are taken kQueries at a time: each key and value is loaded once for
// all of them, and their sums stay in registers. The softmax of some goes on while the scores of the next ones are summed.
#pragma once

namespace kt {
namespace {

// Vectors that cross lines take twice as long to store, so everything begins at a line of its own.
constexpr int64_t kLine = 64 / sizeof(float);
constexpr int64_t whole_lines(int64_t floats) { return (floats + kLine - 1) / kLine * kLine; }

// What has been folded so far: for each query a maximum of its scores, a vector of sums of weights, and value_dim sums
// of weighted values.
template <class Float>
struct State {
  Float *maximum, *sum, *out;
  State(const AttentionTask& t, Float* at)
      : maximum(at), sum(at + whole_lines(t.rows * t.group)), out(sum + t.rows * t.group * kLanes) {}
};

size_t attention_state_floats(const AttentionTask& t) {
  return static_cast<size_t>(whole_lines(t.rows * t.group) + t.rows * t.group * (kLanes + t.value_dim));
}

// The working memory of a task.
struct Scratch {
  float* q;        // [queries][head_dim], or in pairs
  float* scores;   // [kFolded][kTile]
  Pair* weights;   // [kFolded][kTile / 2]
  uint8_t* wide;   // a tile that has been widened
  float* part;     // a state
  float* total;    // a state
  static constexpr int64_t kWeights = kFolded * kTile / 2 * kPairFloats;
  static int64_t wide_floats(const AttentionTask& t) {
    if (t.format == KvFormat::kLatent) return 0;
    return kTileBlocks / 4 * (kSplitsPairs ? wide_block_bytes<FloatUnits>(t.head_dim) : wide_block_bytes<PairUnits>(t.head_dim));
  }
  static size_t floats(const AttentionTask& t) {
    const int64_t q = whole_lines(t.rows * t.group * t.head_dim);
    return static_cast<size_t>(kLine + wide_floats(t) + kFolded * kTile + kWeights + q) + 2 * attention_state_floats(t);
  }
  Scratch(const AttentionTask& t, float* at) {
    at = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(at) + 63) / 64 * 64);
    wide = reinterpret_cast<uint8_t*>(at);
    scores = at + wide_floats(t);
    weights = reinterpret_cast<Pair*>(scores + kFolded * kTile);
    q = scores + kFolded * kTile + kWeights;
    part = q + whole_lines(t.rows * t.group * t.head_dim);
    total = part + attention_state_floats(t);
  }
};

size_t attention_scratch_floats(const AttentionTask& t) { return Scratch::floats(t); }

// What `count` queries from `first` on see of the tile that begins at `start`.
inline Front make_front(const AttentionTask& t, int64_t first, int count, int64_t start) {
  Front f;
  f.low = f.all_high = kTile;
  f.high = f.all_low = 0;
  int64_t position = t.first_position + first / t.group, head = first % t.group;
  for (int m = 0; m < count; ++m) {
    const int64_t begin = first_seen(t, position) - start, end = position + 1 - start;
    f.begin[m] = static_cast<int>(begin < 0 ? 0 : begin > kTile ? kTile : begin);
    f.end[m] = static_cast<int>(end < f.begin[m] ? f.begin[m] : end > kTile ? kTile : end);
    if (f.begin[m] < f.end[m]) {
      f.low = least(f.low, f.begin[m]);
      f.high = most(f.high, f.end[m]);
    }
    f.all_low = most(f.all_low, f.begin[m]);
    f.all_high = least(f.all_high, f.end[m]);
    if (++head == t.group) {
      head = 0;
      ++position;
    }
  }
  f.all_low = (f.all_low + 1) / 2 * 2;
  f.all_high = most(f.all_low, f.all_high / 2 * 2);
  return f;
}

// The queries, scaled so that scores are logarithms to base 2 (or, with a softcap, what its tanh takes).
inline void prepare_queries(const AttentionTask& t, float* q) {
  const Floats scale = set1(t.softcap > 0.0f ? t.scale / t.softcap : t.scale * kLog2E);
  for (int64_t i = 0; i < t.rows * t.group; ++i) {
    const int64_t row = i / t.group, head = i % t.group, front = t.head_dim - t.tail;
    const float* x = t.q + row * t.q_stride + head * front;
    if (t.format != KvFormat::kLatent) {
      Pair* pairs = reinterpret_cast<Pair*>(q) + i * t.head_dim / 2;
      for (int64_t d = 0; d < t.head_dim; d += kLanes) store_pairs(pairs + d / 2, load(x + d) * scale);
      continue;
    }
    for (int64_t d = 0; d < front; d += kLanes) store(q + i * t.head_dim + d, load(x + d) * scale);
    const float* tail = t.q_tail + row * t.tail_stride + head * t.tail_head;
    for (int64_t d = 0; d < t.tail; d += kLanes) store(q + i * t.head_dim + front + d, load(tail + d) * scale);
  }
}

// The tile that begins at `start`, of `end` positions.
inline Tile tile_at(const AttentionTask& t, int64_t start, int64_t end) {
  Tile tile{};
  for (int b = 0; b < kTileBlocks; ++b) {
    const int64_t index = start / kBlock + b;
    const int64_t ahead = (index + kTileBlocks) * kBlock < end ? index + kTileBlocks : index;
    tile.block[b] = index * kBlock < end ? t.kv + t.blocks[index] * t.block_stride : nullptr;
    tile.ahead[b] = ahead * kBlock < end ? t.kv + t.blocks[ahead] * t.block_stride : nullptr;
  }
  return tile;
}

// Of pairs only floats are made.
template <class Units>
inline void widen_tile(const AttentionTask& t, uint8_t* wide, Tile& tile) {
  for (int b = 0; b < kTileBlocks && tile.block[b] != nullptr; ++b, wide += wide_block_bytes<Units>(t.head_dim)) {
    if (t.format == KvFormat::kInt8) {
      widen_int8<Units>(tile.block[b], tile.ahead[b], t.head_dim, wide);
      tile.scales[b] = scales_of(tile.block[b], t.head_dim);
    } else {
      split_pairs(tile.block[b], tile.ahead[b], t.head_dim, wide);
    }
    tile.block[b] = tile.ahead[b] = wide;
  }
}

// How a task's tiles are widened, or null, and folded.
struct Folding {
  void (*widen)(const AttentionTask&, uint8_t*, Tile&);
  void (*fold)(const AttentionTask&, const Front*, int, const Queries&, const Tile&);
  void (*fold_whole)(const AttentionTask&, const Front*, int, const Queries&, const Tile&);  // where all see all of it
  int64_t q_floats;  // of a query
};

inline Folding folding_of(const AttentionTask& t) {
  if (t.format == KvFormat::kLatent) return {nullptr, fold_tile<RowCells>, fold_tile<RowCells>, RowCells::q_floats(t)};
  const int64_t q_floats = PairCells<PairUnits>::q_floats(t);
  if constexpr (kSplitsPairs)
    if (t.rows * t.group >= kSplitFrom) {
      const auto fold = fold_tile<PairCells<FloatUnits>>;
      return {widen_tile<FloatUnits>, fold, fold, q_floats};
    }
  const auto fold = fold_tile<PairCells<PairUnits>>;
  if constexpr (kOverlaps)
    if (t.format == KvFormat::kBF16 && t.softcap == 0.0f) return {nullptr, fold, fold_whole_tile<PairUnits>, q_floats};
  return {t.format == KvFormat::kInt8 ? widen_tile<PairUnits> : nullptr, fold, fold, q_floats};
}

void fold_span(const AttentionTask& t, int64_t span, float* at, const Scratch& scratch) {
  const State<float> state(t, at);
  const int64_t queries = t.rows * t.group;
  for (int64_t i = 0; i < queries; ++i) state.maximum[i] = kMinusInfinity;
  for (int64_t i = 0; i < queries * (kLanes + t.value_dim); i += kLanes) store(state.sum + i, set1(0.0f));
  const int64_t seen = t.first_position + t.rows, from = first_seen(t, t.first_position);
  const int64_t begin = span * kSpanTokens > from / kTile * kTile ? span * kSpanTokens : from / kTile * kTile;
  const int64_t end = (span + 1) * kSpanTokens < seen ? (span + 1) * kSpanTokens : seen;
  const Folding folding = folding_of(t);
  for (int64_t start = begin; start < end; start += kTile) {
    Tile tile = tile_at(t, start, seen);
    if (folding.widen != nullptr) folding.widen(t, scratch.wide, tile);
    const bool all = t.first_position + 1 >= start + kTile && first_seen(t, seen - 1) <= start;
    for (int64_t i = 0; i < queries; i += kFolded) {
      const int count = static_cast<int>(queries - i < kFolded ? queries - i : kFolded);
      Front fronts[kFolded / kQueries];
      for (int m = 0; m < count; m += kQueries)
        fronts[m / kQueries] = all ? kSeesAll : make_front(t, i + m, least(kQueries, count - m), start);
      const Queries x = {scratch.q + i * folding.q_floats, state.maximum + i, state.sum + i * kLanes, state.out + i * t.value_dim,
                         scratch.scores, scratch.weights};
      (all ? folding.fold_whole : folding.fold)(t, fronts, count, x, tile);
      for (int b = 0; b < kTileBlocks; ++b) tile.ahead[b] = tile.block[b];
    }
  }
}

// total becomes what total and then part, the state of `span`, have seen. Queries that the span does not reach stay,
// and those for which it is the first start with it: which ones depends on positions only.
void merge(const AttentionTask& t, int64_t span, const State<float>& total, const State<const float>& part) {
  const int64_t queries = t.rows * t.group;
  const auto first_span = [&](int64_t i) { return first_seen(t, t.first_position + i / t.group) / kSpanTokens; };
  for (int64_t some = 0; some < queries; some += kLanes) {
    const int n = static_cast<int>(queries - some < kLanes ? queries - some : kLanes);
    float before[kLanes], of_total[kLanes], of_part[kLanes], tops[kLanes];
    for (int i = 0; i < n; ++i) before[i] = span > first_span(some + i) ? total.maximum[some + i] : kMinusInfinity;
    const Floats old = load_n(before, n), now = load_n(part.maximum + some, n), top = max(old, now);
    const Floats shift = select_less(set1(kMinusInfinity), top, top, set1(0.0f));
    store(tops, top);
    store(of_total, exp2(old - shift));
    store(of_part, exp2(now - shift));
    for (int m = 0; m < n; ++m) {
      const int64_t i = some + m, first = first_span(i);
      if (span < first || span > (t.first_position + i / t.group) / kSpanTokens) continue;
      total.maximum[i] = tops[m];
      const auto add = [&](float* into, const float* from_part) {
        const Floats x = load(from_part) * set1(of_part[m]);
        store(into, span == first ? x : fma(load(into), set1(of_total[m]), x));
      };
      add(total.sum + i * kLanes, part.sum + i * kLanes);
      for (int64_t d = i * t.value_dim; d < (i + 1) * t.value_dim; d += kLanes) add(total.out + d, part.out + d);
    }
  }
}

// What the sums of query i are multiplied by.
inline float last_factor(const AttentionTask& t, const State<float>& total, int64_t i) {
  const float sum = hsum(load(total.sum + i * kLanes));
  if (t.sinks == nullptr) return 1.0f / sum;
  const float sink = t.sinks[i % t.group] * kLog2E, top = total.maximum[i] > sink ? total.maximum[i] : sink;
  float factors[kLanes] = {total.maximum[i] - top, sink - top};
  store(factors, exp2(load(factors)));
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
  int64_t span = first_seen(t, t.first_position) / kSpanTokens;
  // The first of every query needs no merging.
  if (first_seen(t, t.first_position + t.rows - 1) / kSpanTokens == span) fold_span(t, span++, scratch.total, scratch);
  for (; span <= last; ++span) {
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
