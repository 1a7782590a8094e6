// Products of many rows by tiles: 16 rows by 16 outputs in one instruction. Everything else is kAvx512Bf16's.
//
// It goes over the rows in chunks, over the panels in chunks, and along k in blocks. Of a block, the inputs are copied so
// that tiles of them lie in the first-level cache; the weights of one panel are unpacked there, and used for all rows.
// The sums wait in memory between two blocks.
//
// Integer formats: what a group adds to an output is an exact integer, which is multiplied and added as in gemm.inl, in
// the same order: equal bits, so few rows may go to the vectors and many to the tiles. Products of bfloat16 round in an
// order of their own (tile_dot_bf16 in tiles_amx.h): here they go by tiles for any number of rows, one too. Each row of
// a tile is a chain by itself, and blocks are at the same places along k whatever the rows: law 1.
#pragma once

namespace kt {
namespace {

constexpr int kChunkTiles = 4, kChunkRows = kChunkTiles * kTile;
constexpr int kChunkPanels = 8;
static_assert(kTile == kPanelRows && kTile == kLanes);

// With fewer rows the padding of a tile costs more than its dot products save: multiplying and adding what a group gives
// is three operations for each row of a tile, used or not, against eleven for each row that there is. (Counted, not yet
// measured: see the floor in tests/bench/README.md.)
constexpr int64_t kLeastTiledRows = 8;

struct TiledProduct {
  Format format;
  const uint8_t* packed;
  int64_t out_rows, cols, panel_bytes;
  Activation kind;
  const uint8_t* act;
  int64_t stride, rows;
  const float* bias;
  float* y;
  int64_t ldy;
};

using TileSums = float[kTile][kPanelRows];

// ---- integers

// A block of inputs: rows that are not there are zeros.
constexpr int kBlockGroups = 8;

template <int Subgroups, bool HasMin>
struct IntegerTiles {
  static constexpr int kElements = kBlockGroups * kGroup;

  struct Inputs {
    ActivationGroup groups[kTile][kBlockGroups];
  };
  // Signed: the format's bias is taken away.
  struct Weights {
    alignas(64) uint8_t quads[kBlockGroups][kGroup / 4][kQuadBytes];
    Scales scales[kBlockGroups];
  };
  using Unpack = void (*)(const uint8_t* panel, int64_t k, int elements, Weights& out);

  static void copy_inputs(const uint8_t* act, int64_t stride, int rows, int64_t k, int elements, Inputs& out) {
    const size_t bytes = elements / kGroup * sizeof(ActivationGroup);
    for (int r = 0; r < rows; ++r)
      __builtin_memcpy(out.groups[r], act + r * stride + k / kGroup * static_cast<int64_t>(sizeof(ActivationGroup)), bytes);
    for (int r = rows; r < kTile; ++r) __builtin_memset(out.groups[r], 0, bytes);
  }

  using Products = int32_t[Subgroups][kTile][kPanelRows];

  // What group g gives, before it is scaled.
  static void dot(const Inputs& x, const Weights& w, int g, Products& out) {
    constexpr Tile kInputs = Subgroups == 1 ? kGroupInputs : kHalfInputs;
    constexpr Tile kWeights = Subgroups == 1 ? kGroupWeights : kHalfWeights;
    unroll<Subgroups>([&](auto s) {
      constexpr Tile kSums = s == 0 ? kSums0 : kSums1;
      tile_zero<kSums>();
      tile_load<kInputs>(x.groups[0][g].q + s * (kGroup / Subgroups), sizeof x.groups[0]);
      tile_load<kWeights>(w.quads[g][s * (kGroup / 4 / Subgroups)], kQuadBytes);
      tile_dot_i8<kSums, kInputs, kWeights>();
      tile_store<kSums>(out[s], kTileStride);
    });
  }

  // sum + (what a group adds to it), as `finish` in gemm.inl.
  static Floats add(Floats sum, const ActivationGroup& x, const Scales& w, const Products& products, int row) {
    unroll<Subgroups>([&](auto s) {
      const Floats scale = set1(x.scale);
      sum = fma(to_floats(load_ints(products[s][row])) * w.d[s], scale, sum);
      if constexpr (HasMin && Subgroups == 1) sum = fma(w.m[0], set1(x.scaled_sum), sum);
      if constexpr (HasMin && Subgroups == 2)
        sum = fnma(w.m[s] * to_floats(set1_int(x.negative_half[s])), scale, sum);
    });
    return sum;
  }

  static void multiply(const Inputs* inputs, int tiles, const Weights& w, int elements, TileSums* sums) {
    const int groups = elements / kGroup;
    for (int t = 0; t < tiles; ++t) {
      const Inputs& x = inputs[t];
      Floats sum[kTile];
      unroll<kTile>([&](auto r) { sum[r] = load(sums[t][r]); });
      // The tiles work on the next group while vectors add up this one.
      alignas(64) Products products[2];
      dot(x, w, 0, products[0]);
      for (int g = 0; g < groups; ++g) {
        if (g + 1 < groups) dot(x, w, g + 1, products[(g + 1) % 2]);
        unroll<kTile>([&](auto r) { sum[r] = add(sum[r], x.groups[r][g], w.scales[g], products[g % 2], r); });
      }
      unroll<kTile>([&](auto r) { store(sums[t][r], sum[r]); });
    }
  }
};

// Group g of a panel's stream of headers and groups.
template <class F>
struct GroupPlace {
  static constexpr int64_t group_bytes() {
    if constexpr (kIsCodebook<F>) {
      return F::kBytes;
    } else {
      return F::Quads::kBytes;
    }
  }
  static constexpr int64_t kSpan = F::kHeader + F::kGroups * group_bytes();
  static constexpr int64_t kBlockBytes = kBlockGroups / F::kGroups * kSpan;

  const uint8_t* header;
  int place;
  const uint8_t* packed;

  GroupPlace(const uint8_t* panel, int64_t g)
      : header(panel + g / F::kGroups * kSpan),
        place(static_cast<int>(g % F::kGroups)),
        packed(header + F::kHeader + place * group_bytes()) {}
};

template <class F, class Weights>
[[gnu::noinline]] void unpack_integers(const uint8_t* panel, int64_t k, int elements, Weights& out) {
  for (int g = 0; g < elements / kGroup; ++g) {
    using Place = GroupPlace<F>;
    const Place at(panel, k / kGroup + g);
    for (int64_t i = 0; i < Place::kBlockBytes / kBlockGroups; i += 64) __builtin_prefetch(at.packed + Place::kBlockBytes + i);
    if constexpr (kIsCodebook<F>) {
      out.scales[g] = F::scales(at.header, at.place, at.packed);
      const Bytes bias = as_bytes(set1_int(0x01010101 * kCodebookBias));
      for (int q = 0; q < kGroup / 4; ++q) store_bytes(out.quads[g][q], F::quad(at.header, at.place, at.packed, q) - bias);
    } else {
      out.scales[g] = F::scales(at.header, at.place);
      const Bytes bias = as_bytes(set1_int(static_cast<int32_t>(0x01010101u * F::kBias)));
      unroll<kGroup / 4>([&](auto q) { store_bytes(out.quads[g][q], F::template quad<q>(at.packed) - bias); });
    }
  }
}

// ---- bfloat16

constexpr int kPairs = kTile;  // along k, in a tile of weights

// Elements [k, k + elements) of rows of bfloat16; zeros for rows that are not there, and up to a whole tile.
template <int Elements>
struct Bf16Inputs {
  uint16_t rows[kTile][Elements];

  void copy(const uint8_t* act, int64_t stride, int count, int64_t k, int elements) {
    const size_t bytes = static_cast<size_t>((elements + 1) / 2) * 4;
    __builtin_memset(rows, 0, sizeof rows);
    for (int r = 0; r < count; ++r) __builtin_memcpy(rows[r], act + r * stride + 2 * k, bytes);
  }
};

// Sums stay floats, and go on where the block before left them.
struct Bf16Tiles {
  static constexpr int kElements = 256;
  using Inputs = Bf16Inputs<kElements>;
  struct Weights {
    const uint8_t* pairs;
    alignas(64) uint8_t padded[kElements / 2][kTileStride];
  };
  using Unpack = void (*)(const uint8_t* panel, int64_t k, int elements, Weights& out);

  static void copy_inputs(const uint8_t* act, int64_t stride, int rows, int64_t k, int elements, Inputs& out) {
    out.copy(act, stride, rows, k, elements);
  }

  template <int Count>
  static void multiply_tiles(const Inputs* inputs, const Weights& w, int elements, TileSums* sums) {
    tile_load<kSums0>(sums[0], kTileStride);
    if constexpr (Count == 2) tile_load<kSums1>(sums[1], kTileStride);
    for (int k = 0; k < elements; k += 2 * kPairs) {
      tile_load<kPairWeights>(w.pairs + k / 2 * kTileStride, kTileStride);
      tile_load<kPairInputs>(&inputs[0].rows[0][k], sizeof inputs[0].rows[0]);
      tile_dot_bf16<kSums0, kPairInputs, kPairWeights>();
      if constexpr (Count == 2) {
        tile_load<kPairInputs>(&inputs[1].rows[0][k], sizeof inputs[0].rows[0]);
        tile_dot_bf16<kSums1, kPairInputs, kPairWeights>();
      }
    }
    tile_store<kSums0>(sums[0], kTileStride);
    if constexpr (Count == 2) tile_store<kSums1>(sums[1], kTileStride);
  }

  // Two tiles of rows share what is loaded of the weights.
  static void multiply(const Inputs* inputs, int tiles, const Weights& w, int elements, TileSums* sums) {
    for (; tiles >= 2; tiles -= 2, inputs += 2, sums += 2) multiply_tiles<2>(inputs, w, elements, sums);
    if (tiles > 0) multiply_tiles<1>(inputs, w, elements, sums);
  }
};

// A panel of bfloat16 is rows of a tile already; only where it ends in the middle of one it has to be padded.
inline void unpack_bf16(const uint8_t* panel, int64_t k, int elements, Bf16Tiles::Weights& out) {
  const uint8_t* pairs = panel + k / 2 * BF16::kPairBytes;
  out.pairs = pairs;
  const int count = (elements + 1) / 2, whole = (count + kPairs - 1) / kPairs * kPairs;
  for (int i = 0; i < count; ++i) __builtin_prefetch(pairs + (Bf16Tiles::kElements / 2 + i) * BF16::kPairBytes);
  if (count == whole) return;
  __builtin_memset(out.padded, 0, static_cast<size_t>(whole) * kTileStride);
  __builtin_memcpy(out.padded, pairs, static_cast<size_t>(count) * kTileStride);
  out.pairs = out.padded[0];
}

// Each block's sum is multiplied by the block's scale.
struct Fp8Tiles {
  static constexpr int kElements = F8_E4M3::kElements;
  using Inputs = Bf16Inputs<kElements>;
  struct Weights {
    alignas(64) uint8_t pairs[kElements / 2][kTileStride];
    Floats scale;
  };
  using Unpack = void (*)(const uint8_t* panel, int64_t k, int elements, Weights& out);

  static void copy_inputs(const uint8_t* act, int64_t stride, int rows, int64_t k, int elements, Inputs& out) {
    out.copy(act, stride, rows, k, elements);
  }

  static void multiply(const Inputs* inputs, int tiles, const Weights& w, int, TileSums* sums) {
    for (int t = 0; t < tiles; ++t) {
      tile_zero<kSums0>();
      for (int k = 0; k < kElements; k += 2 * kPairs) {
        tile_load<kPairInputs>(&inputs[t].rows[0][k], sizeof inputs[t].rows[0]);
        tile_load<kPairWeights>(w.pairs[k / 2], kTileStride);
        tile_dot_bf16<kSums0, kPairInputs, kPairWeights>();
      }
      alignas(64) TileSums parts;
      tile_store<kSums0>(parts, kTileStride);
      for (int r = 0; r < kTile; ++r) store(sums[t][r], fma(load(parts[r]), w.scale, load(sums[t][r])));
    }
  }
};

inline void unpack_fp8(const uint8_t* panel, int64_t k, int, Fp8Tiles::Weights& out) {
  const uint8_t* block = panel + k / F8_E4M3::kElements * F8_E4M3::kBlockBytes;
  out.scale = load(reinterpret_cast<const float*>(block));
  const uint8_t* pairs = block + F8_E4M3::kHeader;
  for (int i = 0; i < F8_E4M3::kElements / 2; ++i, pairs += F8_E4M3::kPairBytes) {
    if (i % 2 == 0) __builtin_prefetch(pairs + F8_E4M3::kBlockBytes);
    store_ints(reinterpret_cast<int32_t*>(out.pairs[i]), F8_E4M3::bf16_pair(pairs));
  }
}

// ---- all of them

inline void store_sums(const TiledProduct& p, int64_t panel, int64_t row, int rows, const TileSums* sums) {
  const int64_t first = panel * kPanelRows;
  const int outputs = static_cast<int>(p.out_rows - first < kPanelRows ? p.out_rows - first : kPanelRows);
  for (int r = 0; r < rows; ++r) {
    Floats sum = load(sums[r / kTile][r % kTile]);
    if (p.bias) sum = sum + load_n(p.bias + first, outputs);
    store_n(p.y + (row + r) * p.ldy + first, sum, outputs);
  }
}

// Panels [begin, end), at most kChunkPanels, for `rows` rows, at most kChunkRows.
template <class T>
[[gnu::noinline]] void tiled_chunk(const TiledProduct& p, typename T::Unpack unpack, int64_t row, int rows, int64_t begin,
                                   int64_t end) {
  alignas(64) typename T::Inputs inputs[kChunkTiles];
  typename T::Weights weights;
  alignas(64) TileSums sums[kChunkPanels][kChunkTiles];
  const int tiles = (rows + kTile - 1) / kTile;
  for (int64_t panel = begin; panel < end; ++panel)
    __builtin_memset(sums[panel - begin], 0, static_cast<size_t>(tiles) * sizeof(TileSums));
  for (int64_t k = 0; k < p.cols; k += T::kElements) {
    const int elements = static_cast<int>(p.cols - k < T::kElements ? p.cols - k : T::kElements);
    for (int t = 0; t < tiles; ++t) {
      const int used = rows - t * kTile < kTile ? rows - t * kTile : kTile;
      T::copy_inputs(p.act + (row + t * kTile) * p.stride, p.stride, used, k, elements, inputs[t]);
    }
    for (int64_t panel = begin; panel < end; ++panel) {
      unpack(p.packed + panel * p.panel_bytes, k, elements, weights);
      T::multiply(inputs, tiles, weights, elements, sums[panel - begin]);
    }
  }
  for (int64_t panel = begin; panel < end; ++panel) store_sums(p, panel, row, rows, sums[panel - begin]);
}

template <class T>
void tiled_product(const TiledProduct& p, typename T::Unpack unpack, int64_t begin, int64_t end) {
  const TileScope tiles;
  for (int64_t row = 0; row < p.rows; row += kChunkRows) {
    const int rows = static_cast<int>(p.rows - row < kChunkRows ? p.rows - row : kChunkRows);
    for (int64_t first = begin; first < end; first += kChunkPanels) {
      const int64_t stop = end - first < kChunkPanels ? end : first + kChunkPanels;
      tiled_chunk<T>(p, unpack, row, rows, first, stop);
    }
  }
}

template <int Subgroups, bool HasMin, class F>
void tiled_integers(const TiledProduct& p, int64_t begin, int64_t end) {
  using T = IntegerTiles<Subgroups, HasMin>;
  tiled_product<T>(p, unpack_integers<F, typename T::Weights>, begin, end);
}

// The same as KernelTable::gemm.
void tiled_gemm(Format format, const uint8_t* packed, int64_t out_rows, int64_t cols, Activation kind, const uint8_t* act,
                int64_t rows, int64_t begin, int64_t end, const float* bias, float* y, int64_t ldy) {
  const KernelTable& vectors = kAvx512Bf16;
  if (kind == Activation::kF32 || (kind != Activation::kBF16 && rows < kLeastTiledRows)) {
    vectors.gemm(format, packed, out_rows, cols, kind, act, rows, begin, end, bias, y, ldy);
    return;
  }
  const TiledProduct p = {format, packed, out_rows, cols,
                          static_cast<int64_t>(vectors.packed_bytes(format, kPanelRows, cols)), kind, act,
                          static_cast<int64_t>(vectors.activation_bytes(kind, cols)), rows, bias, y, ldy};
  with_format(format, [&](auto f) {
    using F = decltype(f);
    if constexpr (__is_same(F, BF16)) {
      tiled_product<Bf16Tiles>(p, unpack_bf16, begin, end);
    } else if constexpr (kIsScaledFloat<F>) {
      tiled_product<Fp8Tiles>(p, unpack_fp8, begin, end);
    } else if constexpr (kIsCodebook<F>) {
      tiled_integers<2, false, F>(p, begin, end);
    } else if constexpr (!kIsFloat<F>) {
      tiled_integers<F::kSubgroups, F::kHasMin, F>(p, begin, end);
    }
  });
}

// ---- limits

// The dot product of a group: half as deep as a tile could be, since each group has a scale of its own.
int64_t tiled_peak(Activation kind, int64_t rounds, float* sink) {
  constexpr int kDots = 4;
  if (kind == Activation::kF32) return kAvx512Bf16.peak(kind, rounds, sink);
  const bool bf16 = kind == Activation::kBF16;
  alignas(64) TileSums sums;
  const TileScope tiles;
  for (int64_t i = 0; i < rounds; ++i) {
    unroll<kDots / 2>([&](auto) {
      if (bf16) {
        tile_dot_bf16<kSums0, kPairInputs, kPairWeights>();
        tile_dot_bf16<kSums1, kPairInputs, kPairWeights>();
      } else {
        tile_dot_i8<kSums0, kGroupInputs, kGroupWeights>();
        tile_dot_i8<kSums1, kGroupInputs, kGroupWeights>();
      }
    });
  }
  tile_store<kSums0>(sums, kTileStride);
  *sink += sums[0][0];
  return rounds * kDots * 2 * kTile * kTile * (bf16 ? 2 * kPairs : kGroup);
}

}  // namespace
}  // namespace kt
