// A tile of latent rows (KvFormat::kLatent), which all heads read as keys and in their first part as values: float16,
// multiplied as float32. (As pairs they would have to be transposed for each tile.)
#pragma once

namespace kt {
namespace {

template <int M>
constexpr int kWideRows = kTileRowsFloat >= 12 ? 4 : M == 1 ? 4 : M == 2 ? 2 : 1;

struct RowCells {
  static Floats load(const uint8_t* block, int64_t i) { return load_f16(reinterpret_cast<const uint16_t*>(block) + i); }
  static int64_t q_floats(const AttentionTask& t) { return t.head_dim; }
  template <int M>
  static void score(const AttentionTask& t, const Front& f, const Queries& x, const Tile& tile) {
    for (int p = f.first() * kBlock; p < f.last() * kBlock; p += kWideRows<M>)
      dot_rows<M, kWideRows<M>>(x.q, tile, p, t.head_dim, x.scores + p);
  }
  static Floats weigh(const Queries& x, const Tile&, int first, int last, Floats shift, Floats total) {
    for (int b = first; b < last; ++b) {
      const Floats weights = exp2(kt::load(x.scores + b * kBlock) - shift);
      store(x.scores + b * kBlock, weights);
      total = total + weights;
    }
    return total;
  }
  template <int M>
  static void add(const AttentionTask& t, const Front& f, const Queries& x, const Tile& tile) {
    for (int m = 0; m < M; ++m)
      add_all_rows<1>(t, x.out + m * t.value_dim, x.scores + m * kTile, tile, f.begin[m], least(f.end[m], f.all_low));
    add_all_rows<M>(t, x.out, x.scores, tile, f.all_low, f.all_high);
    for (int m = 0; m < M; ++m)
      add_all_rows<1>(t, x.out + m * t.value_dim, x.scores + m * kTile, tile, most(f.begin[m], f.all_high), f.end[m]);
  }

 private:
  // scores[m][p] = q_m . row, for P positions from `first` on: sums along the row.
  template <int M, int P>
  static void dot_rows(const float* q, const Tile& tile, int first, int64_t head_dim, float* scores) {
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
        k[p] = load(block, row + p * head_dim + d);
        __builtin_prefetch(ahead + (row + p * head_dim + d) * 2, 0, 2);
      }
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        const Floats some = kt::load(q + m * head_dim + d);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) s[m][p] = fma(k[p], some, s[m][p]);
      }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) scores[m * kTile + p] = hsum(s[m][p]);
  }

  // out_m[d, d + D vectors) += the weighted rows of positions [begin, end), in ascending order.
  template <int M, int D>
  static void add_rows(const AttentionTask& t, float* out, const float* weights, const Tile& tile, int64_t d, int begin,
                       int end) {
    Floats acc[M][D];
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int i = 0; i < D; ++i) acc[m][i] = kt::load(out + m * t.value_dim + d + i * kLanes);
    for (int position = begin; position < end;) {
      const int b = position / kBlock, stop = least((b + 1) * kBlock, end);
      int64_t at = position % kBlock * t.head_dim + d;
      for (; position < stop; ++position, at += t.head_dim) {
        const uint8_t* ahead = tile.ahead[b] + at * 2;
        __builtin_prefetch(ahead, 0, 2);
        if (D * kLanes * 2 > kUnitBytes) __builtin_prefetch(ahead + kUnitBytes, 0, 2);
        Floats v[D];
#pragma GCC unroll 4
        for (int i = 0; i < D; ++i) v[i] = load(tile.block[b], at + i * kLanes);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
          for (int i = 0; i < D; ++i) acc[m][i] = fma(v[i], set1(weights[m * kTile + position]), acc[m][i]);
      }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int i = 0; i < D; ++i) store(out + m * t.value_dim + d + i * kLanes, acc[m][i]);
  }

  // value_dim in slices of kWideRows vectors and then of one.
  template <int M>
  static void add_all_rows(const AttentionTask& t, float* out, const float* weights, const Tile& tile, int begin,
                           int end) {
    if (begin >= end) return;
    int64_t d = 0;
    for (; d + kWideRows<M> * kLanes <= t.value_dim; d += kWideRows<M> * kLanes)
      add_rows<M, kWideRows<M>>(t, out, weights, tile, d, begin, end);
    for (; d < t.value_dim; d += kLanes) add_rows<M, 1>(t, out, weights, tile, d, begin, end);
  }
};

}  // namespace
}  // namespace kt
