// One group of 32 of the integer formats: where weights become bytes, and bytes sums. Everything that multiplies
// integers is made of it, so a sum has the same bits whatever the tile.
#pragma once

namespace kt {
namespace {

// The largest byte of a format's quads.
template <class F>
constexpr int most_of() {
  if constexpr (kIsCodebook<F>) {
    return 255;
  } else {
    return F::kBias == 128 ? 255 : F::Quads::kMost;  // 128: looked up, or eight bits
  }
}

// A group as group_product takes it: d and m of 16 outputs for each subgroup, quads of bytes, and
//   kBias, kSubgroups, kHasMin   as block32.h says of a format
//   kMost                        the largest byte
// Either still packed, and unpacked in registers:
template <class F>
struct PackedGroup {
  static constexpr int kBias = F::kBias, kSubgroups = F::kSubgroups, kMost = most_of<F>();
  static constexpr bool kHasMin = F::kHasMin;
  Scales scales;
  const uint8_t* packed;

  Floats d(int s) const { return scales.d[s]; }
  Floats m(int s) const { return scales.m[s]; }
  template <int Q>
  Bytes quad() const {
    return F::template quad<Q>(packed);
  }
};

// or unpacked in memory. What differs between the formats is gone then, but for a few kinds.
template <int Bias, int Subgroups, bool HasMin, int Most = Bias == 128 ? 255 : 127>
struct UnpackedGroup {
  static constexpr int kBias = Bias, kSubgroups = Subgroups, kMost = Most;
  static constexpr bool kHasMin = HasMin;
  alignas(64) uint8_t quads[kGroup / 4][kQuadBytes];
  alignas(64) float scales[Subgroups][kLanes];
  alignas(64) float minimums[HasMin ? Subgroups : 1][kLanes];

  Floats d(int s) const { return load(scales[s]); }
  Floats m(int s) const { return load(minimums[s]); }
  template <int Q>
  Bytes quad() const {
    return load_bytes(quads[Q]);
  }
};

using CodebookGroup = UnpackedGroup<kCodebookBias, 2, false>;

// Biases below 64 become 64: fewer kinds. But where sums of small integers are shorter they stay small.
template <class F>
struct UnpackedKind {
  static constexpr int kBias = F::kBias == 0 || F::kBias == 128 ? F::kBias : 64;
  using Group = UnpackedGroup<kBias, F::kSubgroups, F::kHasMin>;
};
template <class F>
  requires(kShortSums && most_of<F>() < 64)
struct UnpackedKind<F> {
  static constexpr int kMost = most_of<F>() < 16 ? 15 : most_of<F>() < 32 ? 31 : 63;
  using Group = UnpackedGroup<F::kBias, F::kSubgroups, F::kHasMin, kMost>;
};
template <class F>
  requires kIsCodebook<F>
struct UnpackedKind<F> {
  using Group = CodebookGroup;
};
template <class F>
using Unpacked = typename UnpackedKind<F>::Group;

// Bytes of a group of a panel, without its share of the header.
template <class F>
constexpr int packed_group_bytes() {
  if constexpr (kIsCodebook<F>) {
    return F::kBytes;
  } else {
    return F::Quads::kBytes;
  }
}

// Where group g of a panel lies: its header, its place among the groups of the header, its integers.
template <class F>
struct GroupPlace {
  const uint8_t *header, *packed;
  int place;

  GroupPlace(const uint8_t* panel, int64_t g)
      : header(panel + g / F::kGroups * (F::kHeader + F::kGroups * packed_group_bytes<F>())),
        packed(header + F::kHeader + g % F::kGroups * packed_group_bytes<F>()),
        place(static_cast<int>(g % F::kGroups)) {}
};

template <class F>
inline Scales scales_of(const GroupPlace<F>& from) {
  if constexpr (kIsCodebook<F>) {
    return F::scales(from.header, from.place, from.packed);
  } else {
    return F::scales(from.header, from.place);
  }
}

// Quad q with the bias of Unpacked<F>.
template <class F>
inline Bytes quad_of(const GroupPlace<F>& from, int q) {
  Bytes out{};
  if constexpr (kIsCodebook<F>) {
    out = F::quad(from.header, from.place, from.packed, q);
  } else {
    unroll<kGroup / 4>([&](auto i) {
      if (q == i) out = add_bytes<Unpacked<F>::kBias - F::kBias>(F::template quad<i>(from.packed));
    });
  }
  return out;
}

template <class F>
inline void unpack_to_bytes(const GroupPlace<F>& from, Unpacked<F>& out) {
  const Scales scales = scales_of(from);
  for (int s = 0; s < Unpacked<F>::kSubgroups; ++s) {
    store(out.scales[s], scales.d[s]);
    if constexpr (Unpacked<F>::kHasMin) store(out.minimums[s], scales.m[s]);
  }
  if constexpr (kIsCodebook<F>) {
    for (int q = 0; q < kGroup / 4; ++q) store_bytes(out.quads[q], quad_of(from, q));
  } else {
    unroll<kGroup / 4>([&](auto q) { store_bytes(out.quads[q], quad_of(from, q)); });
  }
}

// A negative sum of what is multiplied, times the bias of the weights: where their accumulator starts, since they are
// stored with the bias added.
template <class Group>
inline Ints start_at(int32_t negative_sum) {
  if constexpr (Group::kBias == 0) {
    return set1_int(0);
  } else if constexpr (Group::kBias == 128) {
    static_assert(Group::kSubgroups == 1);
    return start_biased128(negative_sum);
  } else {
    constexpr int kShift = __builtin_ctz(Group::kBias);
    return shift_left<kShift>(set1_int(negative_sum));
  }
}

template <class Group>
inline Ints dot(Ints acc, Bytes w, Bytes x) {
  return Group::kBias == 128 ? dot_biased128(acc, w, x) : dot_u7(acc, w, x);
}

// How many quads' products of pairs fit a sum of 16 bits (activations are within 127); below 2: not worth it.
template <class Group>
constexpr int kShortRun = kShortSums ? 32767 / (2 * 127 * Group::kMost) : 0;

// sum + (what subgroup S adds to it)
template <int S, class Group>
inline Floats finish(const ActivationGroup& a, Ints acc, const Group& w, Floats sum) {
  sum = fma(to_floats(acc) * w.d(S), set1(a.scale), sum);
  if constexpr (!Group::kHasMin) return sum;
  if constexpr (Group::kSubgroups == 1) return fma(w.m(0), set1(a.scaled_sum), sum);
  return fnma(w.m(S) * to_floats(set1_int(a.negative_half[S])), set1(a.scale), sum);
}

// The same group of P panels for R rows, `stride` bytes apart. sum is [P][R].
template <int R, int P, class Group>
inline void group_product(const Group* w, const uint8_t* act, int64_t stride, Floats* sum) {
  const auto row = [&](int r) -> const ActivationGroup& {
    return *reinterpret_cast<const ActivationGroup*>(act + r * stride);
  };
  constexpr int kQuads = kGroup / 4 / Group::kSubgroups;
  unroll<Group::kSubgroups>([&](auto s) {
    Ints acc[P][R];
    const auto start = [&](int r) {
      const Ints at = start_at<Group>(Group::kSubgroups == 1 ? row(r).negative_sum : row(r).negative_half[s]);
      for (int p = 0; p < P; ++p) acc[p][r] = at;
    };
    const auto each_quad = [&](const auto& add) {
      unroll<kQuads>([&](auto i) {
        constexpr int kQuad = s * kQuads + i;
        Bytes weights[P];
        for (int p = 0; p < P; ++p) weights[p] = w[p].template quad<kQuad>();
        for (int r = 0; r < R; ++r) {
          const Bytes x = broadcast4(row(r).q + 4 * kQuad);
          for (int p = 0; p < P; ++p) add(i, p, r, weights[p], x);
        }
      });
    };
    if constexpr (kShortRun<Group> > 1) {
      constexpr int kRun = kShortRun<Group>;
      Shorts run[P][R];
      each_quad([&](auto i, int p, int r, Bytes weights, Bytes x) {
        const Shorts pairs = products_of_pairs(weights, x);
        run[p][r] = i % kRun == 0 ? pairs : run[p][r] + pairs;
        if ((i + 1) % kRun != 0 && i + 1 != kQuads) return;
        if (i < kRun && p == 0) start(r);
        acc[p][r] = add_pairs(acc[p][r], run[p][r]);
      });
    } else {
      for (int r = 0; r < R; ++r) start(r);
      each_quad([&](auto, int p, int r, Bytes weights, Bytes x) { acc[p][r] = dot<Group>(acc[p][r], weights, x); });
    }
    for (int p = 0; p < P; ++p)
      for (int r = 0; r < R; ++r) sum[p * R + r] = finish<s>(row(r), acc[p][r], w[p], sum[p * R + r]);
  });
}

}  // namespace
}  // namespace kt
