// Far-out quads (kInt8FarOut) are no matter of gemm, which takes their q: 128 times the high parts is added to what it
// stored, row by row in the order of k.
#pragma once

namespace kt {
namespace {

constexpr int64_t kQuads = kGroup / 4;

// The far-out quads of some rows by the weights that they are multiplied with, in ascending order: each row's come in
// the order of k, whatever the other rows have. One index serves all panels.
struct FarOutIndex {
  struct Entry {
    int8_t high[4];
    int32_t row, sum;  // sum of high
    float scale;       // of 128 * high
  };
  struct Weights {
    int32_t group, quad, end;  // end of its entries
  };
  int32_t count;  // of weights

  // What follows in memory, for `groups` groups: Weights [groups * kQuads], then Entry [rows * groups].
  static int64_t bytes(int64_t rows, int64_t groups) {
    return static_cast<int64_t>(sizeof(FarOutIndex)) + groups * kQuads * static_cast<int64_t>(sizeof(Weights)) +
           rows * groups * static_cast<int64_t>(sizeof(Entry));
  }
  Weights* weights() { return reinterpret_cast<Weights*>(this + 1); }
  const Weights* weights() const { return reinterpret_cast<const Weights*>(this + 1); }
  Entry* entries(int64_t groups) { return reinterpret_cast<Entry*>(weights() + groups * kQuads); }
  const Entry* entries(int64_t groups) const { return reinterpret_cast<const Entry*>(weights() + groups * kQuads); }
};

size_t far_out_bytes(int64_t rows, int64_t cols) {
  return static_cast<size_t>(ceil_div(FarOutIndex::bytes(rows, cols / kGroup), 64) * 64);
}

// Counts, then places: an entry's weights are known by number from the start, and those without entries drop out last.
void index_far_out(const uint8_t* act, int64_t rows, int64_t cols, uint8_t* memory) {
  const int64_t groups = cols / kGroup, keys = groups * kQuads;
  const int64_t stride = static_cast<int64_t>(activation_bytes(Activation::kInt8FarOut, cols));
  FarOutIndex* const index = reinterpret_cast<FarOutIndex*>(memory);
  FarOutIndex::Weights* const weights = index->weights();
  FarOutIndex::Entry* const entries = index->entries(groups);
  index->count = 0;
  int64_t found = 0;
  for (int64_t r = 0; r < rows; ++r) found += far_out_list(act + r * stride, cols).count;
  if (found == 0) return;
  for (int64_t key = 0; key < keys; ++key) weights[key].end = 0;
  const auto of = [&](const FarOutQuad& far) -> FarOutIndex::Weights& { return weights[far.group * kQuads + far.quad]; };
  for (int64_t r = 0; r < rows; ++r) {
    const FarOutList& list = far_out_list(act + r * stride, cols);
    for (int32_t i = 0; i < list.count; ++i) ++of(list.quads[i]).end;
  }
  // From counts to where each begins; placing its entries moves that to their end.
  int32_t used = 0;
  for (int64_t key = 0; key < keys; ++key) {
    const int32_t n = weights[key].end;
    weights[key] = {static_cast<int32_t>(key / kQuads), static_cast<int32_t>(key % kQuads), used};
    used += n;
  }
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* row = act + r * stride;
    const FarOutList& list = far_out_list(row, cols);
    for (int32_t i = 0; i < list.count; ++i) {
      const FarOutQuad& far = list.quads[i];
      FarOutIndex::Entry& e = entries[of(far).end++];
      __builtin_memcpy(e.high, far.high, sizeof e.high);
      e.row = static_cast<int32_t>(r);
      e.sum = far.high[0] + far.high[1] + far.high[2] + far.high[3];
      e.scale = reinterpret_cast<const ActivationGroup*>(row)[far.group].scale * 128.0f;
    }
  }
  used = 0;
  for (int64_t key = 0; key < keys; ++key) {
    if (weights[key].end == used) continue;
    used = weights[key].end;
    weights[index->count++] = weights[key];
  }
}

// Entries [begin, end) of an index, all of quad q of group g, for P panels, whole ones unless it is one.
template <class F, int P>
inline void add_far_out_quads(const Product& p, int64_t panel, const FarOutIndex::Weights& w,
                              const FarOutIndex::Entry* begin, const FarOutIndex::Entry* end) {
  using Group = Unpacked<F>;
  const int s = Group::kSubgroups == 1 ? 0 : w.quad / (kGroup / 8);
  Bytes weights[P];
  Floats d[P], m[P];
  for (int i = 0; i < P; ++i) {
    const GroupPlace<F> place(p.packed + (panel + i) * p.panel_bytes, w.group);
    const Scales scales = scales_of(place);
    weights[i] = quad_of(place, w.quad);
    d[i] = scales.d[s];
    if constexpr (Group::kHasMin && Group::kSubgroups == 2) m[i] = scales.m[s];
  }
  const int outputs = P == 1 ? p.outputs(panel) : kPanelRows;
  for (const FarOutIndex::Entry* e = begin; e != end; ++e) {
    float* const out = p.y + e->row * p.ldy + panel * kPanelRows;
    for (int i = 0; i < P; ++i) {
      const Ints acc = dot<Group>(start_at<Group>(-e->sum), weights[i], broadcast4(e->high));
      Floats y = fma(to_floats(acc) * d[i], set1(e->scale), load_outputs(out + i * kPanelRows, outputs));
      // Where a group has one minimum the tile has added scaled_sum, in which this is.
      if constexpr (Group::kHasMin && Group::kSubgroups == 2)
        y = fma(m[i] * to_floats(set1_int(e->sum)), set1(e->scale), y);
      store_outputs(out + i * kPanelRows, outputs, y);
    }
  }
}

template <class F, int P>
inline void add_far_out_panels(const Product& p, const FarOutIndex& index, int64_t panel) {
  const FarOutIndex::Entry* const entries = index.entries(p.cols / kGroup);
  int32_t entry = 0;
  for (int32_t i = 0; i < index.count; ++i) {
    const FarOutIndex::Weights& w = index.weights()[i];
    add_far_out_quads<F, P>(p, panel, w, entries + entry, entries + w.end);
    entry = w.end;
  }
}

void add_far_out(Format format, const uint8_t* packed, int64_t out_rows, int64_t cols, const uint8_t* memory,
                 int64_t begin, int64_t end, float* y, int64_t ldy) {
  const FarOutIndex& index = *reinterpret_cast<const FarOutIndex*>(memory);
  if (index.count == 0) return;
  with_format(format, [&](auto f) {
    using F = decltype(f);
    if constexpr (!kIsFloat<F> && !kIsScaledFloat<F>) {
      const Product p = {packed, out_rows, cols, panel_bytes<F>(cols), nullptr, 0, nullptr, y, ldy};
      const int64_t whole = out_rows / kPanelRows;  // panels that are not padded
      int64_t panel = begin;
      for (; panel + kBlockPanels <= (end < whole ? end : whole); panel += kBlockPanels)
        add_far_out_panels<F, kBlockPanels>(p, index, panel);
      for (; panel < end; ++panel) add_far_out_panels<F, 1>(p, index, panel);
    }
  });
}

}  // namespace
}  // namespace kt
