// Tiles of the integer formats for few rows: each goes along k once and unpacks the weights of a group in registers.
#pragma once
#include "cpu/isa.h"

namespace kt {
namespace {

// The first tile of a panel prefetches the weights this far ahead: the processor by itself does not look far enough
// when a line of weights is worked on for long. What is on its way bounds the rate: 4 KiB, from a memory that takes 200 ns
// to answer, are 20 GB/s for a thread. With 8 KiB more lines of Q8_0 are asked for than can be on their way (Zen 4). Plain
// AVX2 takes longer for a line; more than 4 KiB have not been measured there.
constexpr int64_t kAhead = int64_t{kLeadsByLines ? 4 : 6} << 10;

// Rows of the next smaller tile. Few rows should be one tile: a second one unpacks anew, while memory rests.
constexpr int fewer_rows(int rows) { return rows == 12 ? 8 : rows == 8 ? 6 : rows - 1; }

// A group, and the header before it if it is the first of one, to a level of the caches: 3 is the first.
template <class F, int Level = 2>
inline void prefetch_group(const uint8_t* packed, int place) {
  const int64_t header = place == 0 ? F::kHeader : 0;
  for (int64_t i = -header; i < packed_group_bytes<F>(); i += 64) __builtin_prefetch(packed + i, 0, Level);
}

// The same for a tile of R rows. Many rows: only to the second-level cache, since the first has few buffers for misses, which
// activations need as well, and hardly room for all of these. Of one or two rows memory is the limit.
//   Bytes that are multiplied as they are: the processor's own prefetching keeps up, and is only led over the end of a page.
//     Each line fetched by us would take one of those buffers from the loads (Q8_0 read 22 % slower from the third-level cache,
//     15 % and more from memory). Where it does not keep up (Zen 3 read half as fast), each is.
//   What is unpacked first: so many instructions lie between two lines that the loads do not look far enough themselves. Each
//     line to the first level, then, where that has room (Zen 5: Q4_K 0.84 -> 0.94 of what reading alone gets, Q6_K 0.76 ->
//     0.93; on Zen 4, whose cache is smaller, it was 0.94 instead of 1.03).
template <class F, int R>
inline void lead(const uint8_t* packed, int place) {
  if constexpr (R > 2 || kLeadsByLines) {
    prefetch_group<F>(packed, place);
  } else if (kRoomyFirstLevel && packed_group_bytes<F>() < kGroup * kPanelRows) {
    prefetch_group<F, 3>(packed, place);
  } else {
    __builtin_prefetch(packed, 0, 2);
  }
}

template <class F, int R>
inline void integer_tile(const uint8_t* panel, int64_t ahead, const uint8_t* act, int64_t stride, int64_t cols,
                         Floats* sum) {
  for (int r = 0; r < R; ++r) sum[r] = set1(0.0f);
  for (int64_t left = cols / kGroup; left > 0; left -= F::kGroups) {
    const uint8_t* header = panel;
    panel += F::kHeader;
    for (int g = 0; g < F::kGroups && g < left; ++g) {
      if (ahead) lead<F, R>(panel + ahead, g);
      const PackedGroup<F> w = {F::scales(header, g), panel};
      group_product<R, 1>(&w, act, stride, sum);
      panel += F::Quads::kBytes;
      act += sizeof(ActivationGroup);
    }
  }
}

// Groups [first, first + count) of a panel, `step` of them from one to the next.
template <class Group>
using Unpack = void (*)(const uint8_t* panel, int64_t first, int64_t count, int64_t ahead, Group* out, int64_t step);

template <class F>
[[gnu::noinline]] void unpack_groups(const uint8_t* panel, int64_t first, int64_t count, int64_t ahead, Unpacked<F>* out,
                                     int64_t step) {
  for (int64_t g = first; g < first + count; ++g, out += step) {
    const GroupPlace<F> from(panel, g);
    if (ahead) prefetch_group<F>(from.packed + ahead, from.place);
    unpack_to_bytes<F>(from, *out);
  }
}

// Codebooks are looked up in memory, so all of their formats share these tiles.
template <int R>
[[gnu::noinline]] void codebook_tile(const Product& p, Unpack<CodebookGroup> unpack, int64_t panel, int64_t row,
                                     int64_t ahead) {
  Floats sum[R];
  for (int r = 0; r < R; ++r) sum[r] = set1(0.0f);
  CodebookGroup group;
  const uint8_t* act = p.act + row * p.stride;
  for (int64_t g = 0; g < p.cols / kGroup; ++g, act += sizeof(ActivationGroup)) {
    unpack(p.packed + panel * p.panel_bytes, g, 1, ahead, &group, 1);
    group_product<R, 1>(&group, act, p.stride, sum);
  }
  for (int r = 0; r < R; ++r) finish_outputs(p, panel, row + r, sum[r]);
}

template <int R>
inline void codebook_tiles(const Product& p, Unpack<CodebookGroup> unpack, int64_t panel, int64_t row, int64_t end,
                           int64_t ahead) {
  for (; end - row >= R; row += R) {
    codebook_tile<R>(p, unpack, panel, row, ahead);
    ahead = 0;
  }
  if constexpr (R > 1) codebook_tiles<fewer_rows(R)>(p, unpack, panel, row, end, ahead);
}

}  // namespace
}  // namespace kt
