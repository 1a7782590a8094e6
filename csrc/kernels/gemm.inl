// y = x w^T, written once over the formats and the vector vocabulary.
//
// A tile is one panel of 16 outputs, or two, by up to kTileRows rows. It goes along k once: the weights of a group are
// unpacked in registers and used for every row, whose activations are broadcast from memory. Each output has its own
// chain of sums in the order of k, the same whatever the number of rows, and all but dot_bf16 is equal on every
// instruction set.
//
// Far-out quads (kInt8FarOut) are no matter of the tiles, which take their q: 128 times the high parts is added to what
// the tiles stored, row by row in the order of k.
#pragma once

namespace kt {
namespace {

// Activations of this many bytes stay in the second-level cache while all panels pass over them.
constexpr int64_t kChunkBytes = 384 * 1024;

template <class F>
constexpr int kMaxTile = kIsFloat<F> || kIsScaledFloat<F> ? kTileRowsFloat : kTileRows;

// Where weights need no unpacking, loads of activations are the limit: two panels share them, for half the rows.
template <class F>
constexpr bool kTwoPanels = false;
template <>
constexpr bool kTwoPanels<Q8_0> = kTileRows == 12;

// The first tile of a panel prefetches the weights this far ahead: the processor by itself does not look far enough
// when a line of weights is worked on for long.
constexpr int64_t kAhead = 4096;

// A negative sum of what is multiplied, times the bias of the weights: where their accumulator starts, since they are
// stored with the bias added.
template <class F>
inline Ints start_at(int32_t negative_sum) {
  if constexpr (F::kBias == 0) {
    return set1_int(0);
  } else if constexpr (F::kBias == 128) {
    static_assert(F::kSubgroups == 1);
    return start_biased128(negative_sum);
  } else {
    constexpr int kShift = __builtin_ctz(F::kBias);
    return shift_left<kShift>(set1_int(negative_sum));
  }
}

// The same of a row's q over subgroup S.
template <class F, int S>
inline Ints start(const ActivationGroup& a) {
  return start_at<F>(F::kSubgroups == 1 ? a.negative_sum : a.negative_half[S]);
}

template <class F>
inline Ints dot(Ints acc, Bytes w, Bytes x) {
  return F::kBias == 128 ? dot_biased128(acc, w, x) : dot_u7(acc, w, x);
}

// sum + (what subgroup S adds to it)
template <class F, int S>
inline Floats finish(const ActivationGroup& a, Ints acc, const Scales& w, Floats sum) {
  sum = fma(to_floats(acc) * w.d[S], set1(a.scale), sum);
  if constexpr (!F::kHasMin) return sum;
  if constexpr (F::kSubgroups == 1) return fma(w.m[0], set1(a.scaled_sum), sum);
  return fnma(w.m[S] * to_floats(set1_int(a.negative_half[S])), set1(a.scale), sum);
}

// One group of P panels, `panel_bytes` apart, for R rows, `stride` bytes apart. sum is [P][R].
template <class F, int R, int P>
inline void group_product(const Scales* w, const uint8_t* quads, int64_t panel_bytes, const uint8_t* act,
                          int64_t stride, Floats* sum) {
  const auto row = [&](int r) -> const ActivationGroup& {
    return *reinterpret_cast<const ActivationGroup*>(act + r * stride);
  };
  constexpr int kQuads = kGroup / 4 / F::kSubgroups;
  unroll<F::kSubgroups>([&](auto s) {
    Ints acc[P][R];
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < P; ++p) acc[p][r] = start<F, s>(row(r));
    unroll<kQuads>([&](auto i) {
      constexpr int kQuad = s * kQuads + i;
      Bytes weights[P];
      for (int p = 0; p < P; ++p) weights[p] = F::template quad<kQuad>(quads + p * panel_bytes);
      for (int r = 0; r < R; ++r) {
        const Bytes x = broadcast4(row(r).q + 4 * kQuad);
        for (int p = 0; p < P; ++p) acc[p][r] = dot<F>(acc[p][r], weights[p], x);
      }
    });
    for (int p = 0; p < P; ++p)
      for (int r = 0; r < R; ++r) sum[p * R + r] = finish<F, s>(row(r), acc[p][r], w[p], sum[p * R + r]);
  });
}

template <class F, int R, int P>
inline void integer_tile(const uint8_t* panel, int64_t panel_bytes, int64_t ahead, const uint8_t* act, int64_t stride,
                         int64_t cols, Floats* sum) {
  for (int i = 0; i < P * R; ++i) sum[i] = set1(0.0f);
  for (int64_t left = cols / kGroup; left > 0; left -= F::kGroups) {
    const uint8_t* header = panel;
    panel += F::kHeader;
    for (int g = 0; g < F::kGroups && g < left; ++g) {
      if (ahead)
        for (int i = 0; i < F::Quads::kBytes + F::kHeader / F::kGroups; i += 64)
          for (int p = 0; p < P; ++p) __builtin_prefetch(panel + p * panel_bytes + ahead + i);
      Scales w[P];
      for (int p = 0; p < P; ++p) w[p] = F::scales(header + p * panel_bytes, g);
      group_product<F, R, P>(w, panel, panel_bytes, act, stride, sum);
      panel += F::Quads::kBytes;
      act += sizeof(ActivationGroup);
    }
  }
}

// Even and odd elements have a sum each: two chains hide half of the latency for one row.
template <class F, int R>
inline void float_tile(const uint8_t* panel, int64_t ahead, const uint8_t* act, int64_t stride, int64_t cols,
                       Floats* sum) {
  Floats odd_sum[R];
  for (int r = 0; r < R; ++r) sum[r] = odd_sum[r] = set1(0.0f);
  for (int64_t k = 0; k < cols; k += 2, panel += F::kPairBytes) {
    if (ahead)
      for (int i = 0; i < F::kPairBytes; i += 64) __builtin_prefetch(panel + ahead + i);
    Floats even, odd;
    F::pair(panel, even, odd);
    for (int r = 0; r < R; ++r) {
      const float* x = reinterpret_cast<const float*>(act + r * stride) + k;
      sum[r] = fma(even, set1(x[0]), sum[r]);
      odd_sum[r] = fma(odd, set1(x[1]), odd_sum[r]);
    }
  }
  for (int r = 0; r < R; ++r) sum[r] = sum[r] + odd_sum[r];
}

// What a group of any codebook is once it has been looked up: one product for all of those formats.
struct CodebookGroup {
  static constexpr int kBias = kCodebookBias, kSubgroups = 2;
  static constexpr bool kHasMin = false;
  template <int Q>
  static Bytes quad(const uint8_t* quads) {
    return load_bytes(quads + Q * kQuadBytes);
  }
};

struct CodebookLayout {
  LookUp look_up;
  int header, group, groups;  // bytes, bytes, groups that share a header
};

template <int R>
inline void codebook_tile(const CodebookLayout& layout, const uint8_t* panel, int64_t ahead, const uint8_t* act,
                          int64_t stride, int64_t cols, Floats* sum) {
  for (int r = 0; r < R; ++r) sum[r] = set1(0.0f);
  LookedUp group;
  for (int64_t left = cols / kGroup; left > 0; left -= layout.groups) {
    const uint8_t* header = panel;
    panel += layout.header;
    for (int g = 0; g < layout.groups; ++g) {
      if (ahead)
        for (int i = 0; i < layout.group; i += 64) __builtin_prefetch(panel + ahead + i);
      layout.look_up(header, g, panel, &group);
      group_product<CodebookGroup, R, 1>(&group.scales, group.quads[0], 0, act, stride, sum);
      panel += layout.group;
      act += sizeof(ActivationGroup);
    }
  }
}

#ifdef __AVX512BF16__
template <class F, int R>
inline void bf16_tile(const uint8_t* panel, int64_t ahead, const uint8_t* act, int64_t stride, int64_t cols,
                      Floats* sum) {
  for (int r = 0; r < R; ++r) sum[r] = set1(0.0f);
  for (int64_t k = 0; k < cols; k += 2, panel += F::kPairBytes) {
    if (ahead) __builtin_prefetch(panel + ahead);
    const Ints weights = F::bf16_pair(panel);
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, act + r * stride + 2 * k, sizeof pair);
      sum[r] = dot_bf16(sum[r], weights, set1_int(pair));
    }
  }
}
#endif

// Floats as the table's dot product takes them.
template <class F, int R>
inline void any_float_tile(const uint8_t* panel, int64_t ahead, const uint8_t* act, int64_t stride, int64_t cols,
                           Floats* sum) {
  if constexpr (F::kActivation == Activation::kF32) {
    float_tile<F, R>(panel, ahead, act, stride, cols, sum);
  } else {
#ifdef __AVX512BF16__
    bf16_tile<F, R>(panel, ahead, act, stride, cols, sum);
#endif
  }
}

// Each block's sum is multiplied by the block's scale.
template <class F, int R>
inline void scaled_tile(const uint8_t* panel, int64_t ahead, const uint8_t* act, int64_t stride, int64_t cols,
                        Floats* sum) {
  constexpr int kElementBytes = F::kActivation == Activation::kF32 ? 4 : 2;  // of the activations
  for (int r = 0; r < R; ++r) sum[r] = set1(0.0f);
  for (int64_t k = 0; k < cols; k += F::kElements, panel += F::kBlockBytes) {
    Floats part[R];
    any_float_tile<F, R>(panel + F::kHeader, ahead, act + k * kElementBytes, stride, F::kElements, part);
    const Floats scale = load(reinterpret_cast<const float*>(panel));
    for (int r = 0; r < R; ++r) sum[r] = fma(part[r], scale, sum[r]);
  }
}

struct Product {
  const uint8_t* packed;
  int64_t out_rows, cols, panel_bytes;
  const uint8_t* act;
  int64_t stride;  // bytes between rows of act
  const float* bias;
  float* y;
  int64_t ldy;
  bool far_out;  // whether any row has far-out quads
};

inline void store_outputs(const Product& p, int64_t panel, int64_t row, Floats sum) {
  const int64_t first = panel * kPanelRows;
  const int outputs = static_cast<int>(p.out_rows - first < kPanelRows ? p.out_rows - first : kPanelRows);
  if (p.bias) sum = sum + load_n(p.bias + first, outputs);
  float* y = p.y + row * p.ldy + first;
  if (outputs == kPanelRows) {
    store(y, sum);
  } else {
    store_n(y, sum, outputs);
  }
}

template <int R>
[[gnu::noinline]] void codebook_tile(const Product& p, const CodebookLayout& layout, int64_t panel, int64_t row,
                                     int64_t ahead) {
  Floats sum[R];
  codebook_tile<R>(layout, p.packed + panel * p.panel_bytes, ahead, p.act + row * p.stride, p.stride, p.cols, sum);
  for (int r = 0; r < R; ++r) store_outputs(p, panel, row + r, sum[r]);
}

template <class F, int R, int P>
[[gnu::noinline]] void tile(const Product& p, int64_t panel, int64_t row, int64_t ahead) {
  Floats sum[P * R];
  const uint8_t* weights = p.packed + panel * p.panel_bytes;
  const uint8_t* act = p.act + row * p.stride;
  if constexpr (kIsScaledFloat<F>) {
    scaled_tile<F, R>(weights, ahead, act, p.stride, p.cols, sum);
  } else if constexpr (!kIsFloat<F>) {
    integer_tile<F, R, P>(weights, p.panel_bytes, ahead, act, p.stride, p.cols, sum);
  } else {
    any_float_tile<F, R>(weights, ahead, act, p.stride, p.cols, sum);
  }
  for (int i = 0; i < P; ++i)
    for (int r = 0; r < R; ++r) store_outputs(p, panel + i, row + r, sum[i * R + r]);
}

// Rows [row, end) of P panels in the largest tiles that fit.
template <class F, int R, int P>
inline void tiles(const Product& p, int64_t panel, int64_t row, int64_t end, int64_t ahead) {
  for (; end - row >= R; row += R) {
    tile<F, R, P>(p, panel, row, ahead);
    ahead = 0;  // what is read now: there is nothing to fetch
  }
  if constexpr (R > 1) tiles<F, R == 12 ? 8 : R == 6 ? 4 : R / 2, P>(p, panel, row, end, ahead);
}

template <int R>
inline void codebook_tiles(const Product& p, const CodebookLayout& layout, int64_t panel, int64_t row, int64_t end,
                           int64_t ahead) {
  for (; end - row >= R; row += R) {
    codebook_tile<R>(p, layout, panel, row, ahead);
    ahead = 0;
  }
  if constexpr (R > 1) codebook_tiles<R == 12 ? 8 : R / 2>(p, layout, panel, row, end, ahead);
}

// Panels whose far-out quads are added together, while their weights are still in the second-level cache, and the rows
// and groups that are then looked through at a time.
constexpr int64_t kFarOutPanels = 16;
constexpr int kFarOutRows = 32, kFarOutGroups = 32;

// The far-out quads of some rows and groups by the weights that they are multiplied with, in ascending order: each
// row's come in the order of k, whatever the other rows have.
struct FarOutIndex {
  struct Entry {
    int8_t high[4];
    int32_t row, sum;  // sum of high
    float scale;       // of 128 * high
  };
  struct Weights {
    int group, quad, end;  // end of its entries
  };
  Entry entries[kFarOutRows * kFarOutGroups];
  Weights weights[kFarOutGroups * 8];
  int count;  // of weights
};

// Of rows [row, end) and the groups from `first` on. next[i] is where the list of row i goes on; it is moved on.
inline void index_far_out(const Product& p, int64_t row, int64_t end, int64_t first, int32_t* next, FarOutIndex& out) {
  constexpr int kKeys = kFarOutGroups * 8;
  uint64_t seen[kKeys / 64] = {};
  int32_t at[kKeys], stop[kFarOutRows];
  for (int64_t r = row; r < end; ++r) {
    const FarOutList& list = far_out_list(p.act + r * p.stride, p.cols);
    int32_t i = next[r - row];
    for (; i < list.count && list.quads[i].group < first + kFarOutGroups; ++i) {
      const int key = static_cast<int>(list.quads[i].group - first) * 8 + list.quads[i].quad;
      const uint64_t bit = uint64_t{1} << (key % 64);
      at[key] = seen[key / 64] & bit ? at[key] + 1 : 1;
      seen[key / 64] |= bit;
    }
    stop[r - row] = i;
  }
  int32_t used = 0;
  out.count = 0;
  for (int word = 0; word < kKeys / 64; ++word) {
    for (uint64_t left = seen[word]; left != 0; left &= left - 1) {
      const int key = 64 * word + __builtin_ctzll(left);
      const int32_t begin = used;
      used += at[key];
      at[key] = begin;
      out.weights[out.count++] = {static_cast<int>(first) + key / 8, key % 8, used};
    }
  }
  for (int64_t r = row; r < end; ++r) {
    const uint8_t* act = p.act + r * p.stride;
    const FarOutList& list = far_out_list(act, p.cols);
    for (int32_t i = next[r - row]; i < stop[r - row]; ++i) {
      const FarOutQuad& far = list.quads[i];
      FarOutIndex::Entry& e = out.entries[at[(far.group - first) * 8 + far.quad]++];
      __builtin_memcpy(e.high, far.high, sizeof e.high);
      e.row = static_cast<int32_t>(r);
      e.sum = far.high[0] + far.high[1] + far.high[2] + far.high[3];
      e.scale = reinterpret_cast<const ActivationGroup*>(act)[far.group].scale * 128.0f;
    }
    next[r - row] = stop[r - row];
  }
}

struct QuadWeights {
  Bytes integers;
  Scales scales;
};

// Quad q of group g of a panel.
template <class F>
inline QuadWeights quad_weights(const uint8_t* panel, int64_t g, int q) {
  const int place = static_cast<int>(g % F::kGroups);
  QuadWeights out{};
  if constexpr (kIsCodebook<F>) {
    const uint8_t* header = panel + g / F::kGroups * (F::kHeader + F::kGroups * F::kBytes);
    const uint8_t* packed = header + F::kHeader + place * F::kBytes;
    out.integers = F::quad(header, place, packed, q);
    out.scales = F::scales(header, place, packed);
  } else {
    const uint8_t* header = panel + g / F::kGroups * (F::kHeader + F::kGroups * F::Quads::kBytes);
    const uint8_t* packed = header + F::kHeader + place * F::Quads::kBytes;
    unroll<kGroup / 4>([&](auto i) {
      if (q == i) out.integers = F::template quad<i>(packed);
    });
    out.scales = F::scales(header, place);
  }
  return out;
}

// Entries [begin, end) of the index, all of quad q of group g, for one panel. G is how the integers are multiplied: F, or
// CodebookGroup.
template <class F, class G>
inline void add_far_out_quads(const Product& p, int64_t panel, int64_t g, int q, const FarOutIndex::Entry* begin,
                              const FarOutIndex::Entry* end) {
  const QuadWeights w = quad_weights<F>(p.packed + panel * p.panel_bytes, g, q);
  const int s = G::kSubgroups == 1 ? 0 : q / (kGroup / 8);
  const int64_t first = panel * kPanelRows;
  const int outputs = static_cast<int>(p.out_rows - first < kPanelRows ? p.out_rows - first : kPanelRows);
  for (const FarOutIndex::Entry* e = begin; e != end; ++e) {
    float* out = p.y + e->row * p.ldy + first;
    Floats y = outputs == kPanelRows ? load(out) : load_n(out, outputs);
    const Ints acc = dot<G>(start_at<G>(-e->sum), w.integers, broadcast4(e->high));
    y = fma(to_floats(acc) * w.scales.d[s], set1(e->scale), y);
    // Where a group has one minimum the tile has added scaled_sum, in which this is.
    if constexpr (G::kHasMin && G::kSubgroups == 2)
      y = fma(w.scales.m[s] * to_floats(set1_int(e->sum)), set1(e->scale), y);
    if (outputs == kPanelRows) {
      store(out, y);
    } else {
      store_n(out, y, outputs);
    }
  }
}

// Adds the far-out quads of rows [row, end) to what the tiles have stored of panels [begin, stop).
template <class F, class G>
[[gnu::noinline]] void add_far_out(const Product& p, int64_t begin, int64_t stop, int64_t row, int64_t end) {
  FarOutIndex index;
  for (; row < end; row += kFarOutRows) {
    const int64_t last = end - row < kFarOutRows ? end : row + kFarOutRows;
    int32_t next[kFarOutRows] = {};
    for (int64_t first = 0; first < p.cols / kGroup; first += kFarOutGroups) {
      index_far_out(p, row, last, first, next, index);
      const FarOutIndex::Entry* entry = index.entries;
      for (int i = 0; i < index.count; ++i) {
        const FarOutIndex::Weights& w = index.weights[i];
        for (int64_t panel = begin; panel < stop; ++panel)
          add_far_out_quads<F, G>(p, panel, w.group, w.quad, entry, index.entries + w.end);
        entry = index.entries + w.end;
      }
    }
  }
}

bool any_far_out(const uint8_t* act, int64_t stride, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; ++r)
    if (far_out_list(act + r * stride, cols).count > 0) return true;
  return false;
}

using AddFarOut = void (*)(const Product&, int64_t begin, int64_t stop, int64_t row, int64_t end);

void codebook_product(const Product& p, const CodebookLayout& layout, AddFarOut add, int64_t rows, int64_t begin,
                      int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    codebook_tiles<kTileRows>(p, layout, panel, 0, rows, kAhead);
    if (p.far_out) add(p, panel, panel + 1, 0, rows);
  }
}

template <class F>
void product(const Product& p, int64_t rows, int64_t begin, int64_t end) {
  constexpr int64_t kTile = kMaxTile<F>;
  const int64_t fit = kChunkBytes / p.stride / kTile * kTile;
  const int64_t chunk = fit > kTile ? fit : kTile;
  for (int64_t r = 0; r < rows; r += chunk) {
    const int64_t last = rows - r < chunk ? rows : r + chunk;
    for (int64_t first = begin; first < end; first += kFarOutPanels) {
      const int64_t stop = end - first < kFarOutPanels ? end : first + kFarOutPanels;
      int64_t panel = first;
      if constexpr (kTwoPanels<F>) {
        for (; panel + 2 <= stop; panel += 2) tiles<F, kTile / 2, 2>(p, panel, r, last, kAhead);
      }
      for (; panel < stop; ++panel) tiles<F, kTile, 1>(p, panel, r, last, kAhead);
      if constexpr (!kIsFloat<F> && !kIsScaledFloat<F>)
        if (p.far_out) add_far_out<F, F>(p, first, stop, r, last);
    }
  }
}

void gemm(Format format, const uint8_t* packed, int64_t out_rows, int64_t cols, Activation kind, const uint8_t* act,
          int64_t rows, int64_t begin, int64_t end, const float* bias, float* y, int64_t ldy) {
  with_format(format, [&](auto f) {
    using F = decltype(f);
    const int64_t stride = static_cast<int64_t>(activation_bytes(kind, cols));
    const bool far_out = kind == Activation::kInt8FarOut && any_far_out(act, stride, rows, cols);
    const Product p = {packed, out_rows, cols, panel_bytes<F>(cols), act, stride, bias, y, ldy, far_out};
    if constexpr (kIsCodebook<F>) {
      codebook_product(p, {look_up<F>, F::kHeader, F::kBytes, F::kGroups}, add_far_out<F, CodebookGroup>, rows, begin, end);
    } else {
      product<F>(p, rows, begin, end);
    }
  });
}

void add_far_out(Format format, const uint8_t* packed, int64_t out_rows, int64_t cols, const uint8_t* act, int64_t rows,
                 int64_t begin, int64_t end, float* y, int64_t ldy) {
  const int64_t stride = static_cast<int64_t>(activation_bytes(Activation::kInt8FarOut, cols));
  if (!any_far_out(act, stride, rows, cols)) return;
  with_format(format, [&](auto f) {
    using F = decltype(f);
    const Product p = {packed, out_rows, cols, panel_bytes<F>(cols), act, stride, nullptr, y, ldy, true};
    if constexpr (kIsCodebook<F>) {
      add_far_out<F, CodebookGroup>(p, begin, end, 0, rows);
    } else if constexpr (!kIsFloat<F> && !kIsScaledFloat<F>) {
      add_far_out<F, F>(p, begin, end, 0, rows);
    }
  });
}

}  // namespace
}  // namespace kt
