// The tile instructions of AMX. Not the compiler's intrinsics: those are macros that want the numbers of registers
// spelled out, and GCC's do not say that they touch memory.
#pragma once
#include "kernels/tile_shapes.h"

namespace kt {
namespace {

// The thread's tiles, from here to the end of the scope. Released, the registers are in their initial state: nothing to
// save when the system switches threads, and nothing that would keep an idle core from sleeping deeply.
class TileScope {
 public:
  TileScope() { __asm__ volatile("ldtilecfg %0" ::"m"(kTileConfig)); }
  ~TileScope() { __asm__ volatile("tilerelease" ::: "memory"); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

template <Tile T>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}

// Rows of the tile from `from`, `stride` bytes apart.
template <Tile T>
inline void tile_load(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}

template <Tile T>
inline void tile_store(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}

// Sums += Inputs * Weights, both signed bytes: exact.
template <Tile Sums, Tile Inputs, Tile Weights>
inline void tile_dot_i8() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(Inputs), "i"(Weights));
}

// The same of bfloat16 in float32. Each output has one sum of the even elements of the tile and one of the odd, both
// in the order of k, from zero, with fused multiply-adds; their sum is added to Sums. Denormals count as zeros.
template <Tile Sums, Tile Inputs, Tile Weights>
inline void tile_dot_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(Inputs), "i"(Weights));
}

}  // namespace
}  // namespace kt
