// The vector vocabulary (vec_ref.h says what each name means) on AVX-512 F, BW, DQ, VL and VNNI: one register a vector.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace kt {
namespace {

constexpr int kLanes = 16;
constexpr bool kShortSums = false;
// 32 registers: a sum and an accumulator for each row, the weights, their scales and the constants.
constexpr int kTileRows = 12;
constexpr int kTileRowsFloat = 12;
// Of weights in memory: 12 sums and as many accumulators, three quads and one activation. Loads for each dot product are
// fewest in tiles as square as these.
constexpr int kBlockPanels = 3, kBlockRows = 4;
constexpr int kBlockMinRows = 96;
constexpr int64_t kBlockChunkBytes = 0;
constexpr bool kLeadsByLines = false;

struct Floats {
  __m512 v;
};
struct Ints {
  __m512i v;
};
struct Bytes {
  __m512i v;
};

inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }

// ---- Floats
inline Floats set1(float x) { return {_mm512_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Floats load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
inline void store_n(float* p, Floats a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats fnma(Floats a, Floats b, Floats c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
inline Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats select_less(Floats a, Floats b, Floats x, Floats y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
inline uint32_t which_less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline float hsum(Floats a) {
  const __m256 w8 = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 w4 = _mm_add_ps(_mm256_castps256_ps128(w8), _mm256_extractf128_ps(w8, 1));
  const __m128 w2 = _mm_add_ps(w4, _mm_movehl_ps(w4, w4));
  return _mm_cvtss_f32(_mm_add_ss(w2, _mm_movehdup_ps(w2)));
}
inline float hmax(Floats a) { return _mm512_reduce_max_ps(a.v); }
inline Floats load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void store_f16(uint16_t* p, Floats a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

// ---- Ints
inline Ints set1_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Ints load_ints(const void* p) { return {_mm512_loadu_si512(p)}; }
inline void store_ints(int32_t* p, Ints a) { _mm512_storeu_si512(p, a.v); }
inline Ints load_u8(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Ints load_i8(const uint8_t* p) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline void store_i8(int8_t* p, Ints a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a.v));
}
inline Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints operator-(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline Ints operator&(Ints a, Ints b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Ints operator|(Ints a, Ints b) { return {_mm512_or_si512(a.v, b.v)}; }
inline Ints operator^(Ints a, Ints b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline Ints gather(const uint32_t* table, Ints index) { return {_mm512_i32gather_epi32(index.v, table, 4)}; }
template <int N>
inline Ints shift_left(Ints a) {
  return {_mm512_slli_epi32(a.v, N)};
}
template <int N>
inline Ints shift_right(Ints a) {
  return {_mm512_srli_epi32(a.v, N)};
}
inline Ints shift_right(Ints a, int n) { return {_mm512_srl_epi32(a.v, _mm_cvtsi32_si128(n))}; }
inline Ints max(Ints a, Ints b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline Ints max_of_four(Ints a) {
  const __m512i two = _mm512_max_epi32(a.v, _mm512_shuffle_epi32(a.v, _MM_PERM_CDAB));
  return {_mm512_max_epi32(two, _mm512_shuffle_epi32(two, _MM_PERM_BADC))};
}
struct TwoLargest {
  int32_t first, second;
};
inline TwoLargest two_largest(Ints a, Ints b) {
  const __m512i m = _mm512_max_epi32(a.v, b.v), s = _mm512_min_epi32(a.v, b.v);
  const __m256i m8 = _mm512_castsi512_si256(m), n8 = _mm512_extracti32x8_epi32(m, 1);
  const __m256i s8 = _mm256_max_epi32(_mm512_castsi512_si256(s), _mm512_extracti32x8_epi32(s, 1));
  const __m256i top8 = _mm256_max_epi32(m8, n8), next8 = _mm256_max_epi32(_mm256_min_epi32(m8, n8), s8);
  const __m128i m4 = _mm256_castsi256_si128(top8), n4 = _mm256_extracti128_si256(top8, 1);
  const __m128i s4 = _mm_max_epi32(_mm256_castsi256_si128(next8), _mm256_extracti128_si256(next8, 1));
  return {_mm_cvtsi128_si32(_mm_max_epi32(m4, n4)), _mm_cvtsi128_si32(_mm_max_epi32(_mm_min_epi32(m4, n4), s4))};
}
inline int32_t hsum(Ints a) { return _mm512_reduce_add_epi32(a.v); }
inline int32_t hmax(Ints a) { return _mm512_reduce_max_epi32(a.v); }
inline Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Ints round_to_ints(Floats a) { return {_mm512_cvtps_epi32(a.v)}; }
inline Floats as_floats(Ints a) { return {_mm512_castsi512_ps(a.v)}; }
inline Ints as_ints(Floats a) { return {_mm512_castps_si512(a.v)}; }

// ---- Bytes
inline Bytes as_bytes(Ints a) { return {a.v}; }
inline Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_bytes(uint8_t* p, Bytes a) { _mm512_storeu_si512(p, a.v); }
// The mask of each byte also drops what the 32-bit shift brought in from its neighbour.
template <int Shift, int Mask>
inline Bytes field(Bytes a) {
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(Mask));
  if constexpr (Shift == 0) return {_mm512_and_si512(a.v, mask)};
  return {_mm512_and_si512(_mm512_srli_epi32(a.v, Shift), mask)};
}
template <int Shift, int Mask>
inline Bytes field_left(Bytes a) {
  return {_mm512_and_si512(_mm512_slli_epi32(a.v, Shift), _mm512_set1_epi8(static_cast<char>(Mask)))};
}
inline Bytes operator|(Bytes a, Bytes b) { return {_mm512_or_si512(a.v, b.v)}; }
inline Bytes operator-(Bytes a, Bytes b) { return {_mm512_sub_epi8(a.v, b.v)}; }
template <int N>
inline Bytes add_bytes(Bytes a) {
  if constexpr (N == 0) return a;
  return {_mm512_add_epi8(a.v, _mm512_set1_epi8(N))};
}
inline Bytes lookup16(const uint8_t* table, Bytes a) {
  const __m128i t = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(t), a.v)};
}
inline Bytes broadcast4(const int8_t* p) {
  int32_t quad;
  __builtin_memcpy(&quad, p, sizeof quad);
  return {_mm512_set1_epi32(quad)};
}
inline void keep(Bytes& a) { __asm__ volatile("" : "+v"(a.v)); }
inline Ints dot_u7(Ints acc, Bytes w, Bytes a) { return {_mm512_dpbusd_epi32(acc.v, w.v, a.v)}; }
struct Shorts {
  __m512i v;
};
inline Shorts products_of_pairs(Bytes w, Bytes a) { return {_mm512_maddubs_epi16(w.v, a.v)}; }
inline Shorts operator+(Shorts a, Shorts b) { return {_mm512_add_epi16(a.v, b.v)}; }
inline Ints add_pairs(Ints acc, Shorts a) {
  return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(a.v, _mm512_set1_epi16(1)))};
}
// vpdpbusd takes all of u8, so the bias is paid once, at the start.
inline Ints start_biased128(int32_t negative_sum) { return shift_left<7>(set1_int(negative_sum)); }
inline Ints dot_biased128(Ints acc, Bytes w, Bytes a) { return {_mm512_dpbusd_epi32(acc.v, w.v, a.v)}; }

#ifdef __AVX512BF16__
constexpr bool kHasDotBf16 = true;
// acc + sum of the lane's two products of bfloat16, as the instruction rounds it (denormals are zero).
inline Floats dot_bf16(Floats acc, Ints w, Ints a) {
  return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(w.v), reinterpret_cast<__m512bh>(a.v))};
}
#else
constexpr bool kHasDotBf16 = false;
#endif

}  // namespace
}  // namespace kt
