#include "cpu/isa.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace kt {
namespace {

#if defined(__x86_64__)
// XCR0: the register files that the operating system saves when it switches threads; 0 without XSAVE.
uint64_t saved_state() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
  uint32_t lo, hi;
  __asm__("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<uint64_t>(hi) << 32) | lo;
}

// Tiles are 8 KiB of registers for each thread, so Linux (5.16 and later) keeps room for them only in processes that ask
// before their first use; it may refuse, for one when a thread has an alternate stack too small for them.
bool permitted_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has_tiles(uint64_t saved) {
  constexpr uint64_t kTiles = 0x60000;                                   // configuration and data
  constexpr uint32_t kBf16 = 1 << 22, kTile = 1 << 24, kInt8 = 1 << 25;  // of leaf 7
  uint32_t a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr uint32_t kAll = kBf16 | kTile | kInt8;
  return (d & kAll) == kAll && (saved & kTiles) == kTiles && permitted_tiles();
}

// AVX-VNNI: the dot product of bytes that AVX-512 VNNI has, too, for processors without AVX-512.
bool has_vex_vnni() {
  constexpr uint32_t kAvxVnni = 1 << 4;  // of leaf 7, subleaf 1
  uint32_t most, a, b, c, d;             // most: the last subleaf
  if (!__get_cpuid_count(7, 0, &most, &b, &c, &d) || most < 1) return false;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvxVnni);
}

Isa detect() {
  constexpr uint64_t kYmm = 0x6;    // SSE and AVX
  constexpr uint64_t kZmm = 0xE6;   // and the mask registers, upper halves and upper 16 of AVX-512
  const uint64_t saved = saved_state();
  __builtin_cpu_init();
  Isa isa{};
  isa.avx2 = (saved & kYmm) == kYmm && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  isa.avxvnni = isa.avx2 && has_vex_vnni();
  isa.avx512 = isa.avx2 && (saved & kZmm) == kZmm && __builtin_cpu_supports("avx512f") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  isa.avx512_bf16 = isa.avx512 && __builtin_cpu_supports("avx512bf16");
  isa.amx = isa.avx512_bf16 && has_tiles(saved);
  return isa;
}
#else
Isa detect() { return {}; }
#endif

}  // namespace

const Isa& isa() {
  static const Isa detected = detect();
  return detected;
}

const bool kRoomyFirstLevel = sysconf(_SC_LEVEL1_DCACHE_SIZE) >= 48 << 10;

}  // namespace kt
