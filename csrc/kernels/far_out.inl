// Far-out quads (kInt8FarOut) are no matter of the tiles, which take their q: 128 times the high parts is added to what
// the tiles stored, row by row in the order of k.
#pragma once

namespace kt {
namespace {

// Panels whose far-out quads are added together, while their weights are still in the second-level cache, and the rows
// and groups that are then looked through at a time.
constexpr int64_t kFarOutPanels = 18;
static_assert(kFarOutPanels % kBlockPanels == 0);
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

// Entries [begin, end) of the index, all of quad q of group g, for one panel.
template <class F>
inline void add_far_out_quads(const Product& p, int64_t panel, int64_t g, int q, const FarOutIndex::Entry* begin,
                              const FarOutIndex::Entry* end) {
  using Group = Unpacked<F>;
  const GroupPlace<F> place(p.packed + panel * p.panel_bytes, g);
  const Scales scales = scales_of(place);
  const Bytes weights = quad_of(place, q);
  const int s = Group::kSubgroups == 1 ? 0 : q / (kGroup / 8);
  const int outputs = p.outputs(panel);
  for (const FarOutIndex::Entry* e = begin; e != end; ++e) {
    float* const out = p.y + e->row * p.ldy + panel * kPanelRows;
    const Ints acc = dot<Group>(start_at<Group>(-e->sum), weights, broadcast4(e->high));
    Floats y = fma(to_floats(acc) * scales.d[s], set1(e->scale), load_outputs(out, outputs));
    // Where a group has one minimum the tile has added scaled_sum, in which this is.
    if constexpr (Group::kHasMin && Group::kSubgroups == 2)
      y = fma(scales.m[s] * to_floats(set1_int(e->sum)), set1(e->scale), y);
    store_outputs(out, outputs, y);
  }
}

// Adds the far-out quads of rows [row, end) to what the tiles have stored of panels [begin, stop).
template <class F>
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
          add_far_out_quads<F>(p, panel, w.group, w.quad, entry, index.entries + w.end);
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

}  // namespace
}  // namespace kt
