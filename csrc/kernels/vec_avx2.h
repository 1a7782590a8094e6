// The vector vocabulary (vec_ref.h says what each name means) on AVX2, FMA and F16C: two registers a vector. Before it
// comes what multiplies bytes: dot_maddubs.h, dot_avxvnni.h or dot_emulated.h.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace kt {
namespace {

constexpr int kLanes = 16;
constexpr bool kHasDotBf16 = false;
constexpr bool kShortSums = !kHasDpbusd;  // vpmaddwd is half of a dot product's multiplications
// 16 registers: the accumulators of four rows take eight.
constexpr int kTileRows = 4;
constexpr int kTileRowsFloat = 2;
constexpr int kBlockPanels = 1, kBlockRows = 4;
constexpr int kBlockMinRows = 24;  // tiles of four rows unpack three times as often as those of twelve
constexpr int64_t kBlockChunkBytes = 96 * 1024;  // of a second-level cache of 512 KB
constexpr bool kLeadsByLines = !kHasDpbusd;  // Intel's own prefetching has not been measured

struct Floats {
  __m256 lo, hi;
};
struct Ints {
  __m256i lo, hi;
};
struct Bytes {
  __m256i lo, hi;
};

// ---- Floats
inline Floats set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
// All ones in the first n of 8 lanes; n may be outside [0, 8].
inline __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Floats load_n(const float* p, int n) {
  return {_mm256_maskload_ps(p, first(n)), _mm256_maskload_ps(p + 8, first(n - 8))};
}
inline void store(float* p, Floats a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline void store_n(float* p, Floats a, int n) {
  _mm256_maskstore_ps(p, first(n), a.lo);
  _mm256_maskstore_ps(p + 8, first(n - 8), a.hi);
}
inline Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Floats fnma(Floats a, Floats b, Floats c) {
  return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)};
}
inline Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Floats select_less(Floats a, Floats b, Floats x, Floats y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
inline uint32_t which_less(Floats a, Floats b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)) |
                               _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)) << 8);
}
inline float hsum(Floats a) {
  const __m256 w8 = _mm256_add_ps(a.lo, a.hi);
  const __m128 w4 = _mm_add_ps(_mm256_castps256_ps128(w8), _mm256_extractf128_ps(w8, 1));
  const __m128 w2 = _mm_add_ps(w4, _mm_movehl_ps(w4, w4));
  return _mm_cvtss_f32(_mm_add_ss(w2, _mm_movehdup_ps(w2)));
}
inline float hmax(Floats a) {
  const __m256 w8 = _mm256_max_ps(a.lo, a.hi);
  const __m128 w4 = _mm_max_ps(_mm256_castps256_ps128(w8), _mm256_extractf128_ps(w8, 1));
  const __m128 w2 = _mm_max_ps(w4, _mm_movehl_ps(w4, w4));
  return _mm_cvtss_f32(_mm_max_ss(w2, _mm_movehdup_ps(w2)));
}
inline Floats load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline void store_f16(uint16_t* p, Floats a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}

// ---- Ints
inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store256(void* p, __m256i a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
inline Ints set1_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Ints load_ints(const void* p) { return {load256(p), load256(static_cast<const uint8_t*>(p) + 32)}; }
inline void store_ints(int32_t* p, Ints a) {
  store256(p, a.lo);
  store256(p + 8, a.hi);
}
inline Ints load_u8(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline Ints load_i8(const uint8_t* p) {
  return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline void store_i8(int8_t* p, Ints a) {
  const __m256i w16 = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xD8);
  const __m128i w8 = _mm_packs_epi16(_mm256_castsi256_si128(w16), _mm256_extracti128_si256(w16, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), w8);
}
inline Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
inline Ints operator-(Ints a, Ints b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
inline Ints operator&(Ints a, Ints b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
inline Ints operator|(Ints a, Ints b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
inline Ints operator^(Ints a, Ints b) { return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)}; }
inline Ints gather(const uint32_t* table, Ints index) {
  const int* t = reinterpret_cast<const int*>(table);
  return {_mm256_i32gather_epi32(t, index.lo, 4), _mm256_i32gather_epi32(t, index.hi, 4)};
}
template <int N>
inline Ints shift_left(Ints a) {
  return {_mm256_slli_epi32(a.lo, N), _mm256_slli_epi32(a.hi, N)};
}
template <int N>
inline Ints shift_right(Ints a) {
  return {_mm256_srli_epi32(a.lo, N), _mm256_srli_epi32(a.hi, N)};
}
inline Ints shift_right(Ints a, int n) {
  const __m128i count = _mm_cvtsi32_si128(n);
  return {_mm256_srl_epi32(a.lo, count), _mm256_srl_epi32(a.hi, count)};
}
inline Ints max(Ints a, Ints b) { return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)}; }
inline __m256i max_of_four(__m256i a) {
  const __m256i two = _mm256_max_epi32(a, _mm256_shuffle_epi32(a, 0xB1));
  return _mm256_max_epi32(two, _mm256_shuffle_epi32(two, 0x4E));
}
inline Ints max_of_four(Ints a) { return {max_of_four(a.lo), max_of_four(a.hi)}; }
struct TwoLargest {
  int32_t first, second;
};
inline TwoLargest two_largest(Ints a, Ints b) {
  const __m256i m = _mm256_max_epi32(a.lo, b.lo), n = _mm256_max_epi32(a.hi, b.hi);
  const __m256i s = _mm256_max_epi32(_mm256_min_epi32(a.lo, b.lo), _mm256_min_epi32(a.hi, b.hi));
  const __m256i top = _mm256_max_epi32(m, n), next = _mm256_max_epi32(_mm256_min_epi32(m, n), s);
  const __m128i m4 = _mm256_castsi256_si128(top), n4 = _mm256_extracti128_si256(top, 1);
  const __m128i s4 = _mm_max_epi32(_mm256_castsi256_si128(next), _mm256_extracti128_si256(next, 1));
  return {_mm_cvtsi128_si32(_mm_max_epi32(m4, n4)), _mm_cvtsi128_si32(_mm_max_epi32(_mm_min_epi32(m4, n4), s4))};
}
inline int32_t hsum(Ints a) {
  const __m256i w8 = _mm256_add_epi32(a.lo, a.hi);
  const __m128i w4 = _mm_add_epi32(_mm256_castsi256_si128(w8), _mm256_extracti128_si256(w8, 1));
  const __m128i w2 = _mm_add_epi32(w4, _mm_shuffle_epi32(w4, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(w2, _mm_shuffle_epi32(w2, 0xB1)));
}
inline int32_t hmax(Ints a) {
  const __m256i w8 = _mm256_max_epi32(a.lo, a.hi);
  const __m128i w4 = _mm_max_epi32(_mm256_castsi256_si128(w8), _mm256_extracti128_si256(w8, 1));
  const __m128i w2 = _mm_max_epi32(w4, _mm_shuffle_epi32(w4, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(w2, _mm_shuffle_epi32(w2, 0xB1)));
}
inline Floats to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline Ints round_to_ints(Floats a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
inline Floats as_floats(Ints a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
inline Ints as_ints(Floats a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }

// ---- Bytes
inline Bytes as_bytes(Ints a) { return {a.lo, a.hi}; }
inline Bytes load_bytes(const uint8_t* p) { return {load256(p), load256(p + 32)}; }
inline void store_bytes(uint8_t* p, Bytes a) {
  store256(p, a.lo);
  store256(p + 32, a.hi);
}
// The mask of each byte also drops what the 32-bit shift brought in from its neighbour.
template <int Shift, int Mask>
inline Bytes field(Bytes a) {
  const __m256i mask = _mm256_set1_epi8(static_cast<char>(Mask));
  return {_mm256_and_si256(_mm256_srli_epi32(a.lo, Shift), mask),
          _mm256_and_si256(_mm256_srli_epi32(a.hi, Shift), mask)};
}
template <int Shift, int Mask>
inline Bytes field_left(Bytes a) {
  const __m256i mask = _mm256_set1_epi8(static_cast<char>(Mask));
  return {_mm256_and_si256(_mm256_slli_epi32(a.lo, Shift), mask),
          _mm256_and_si256(_mm256_slli_epi32(a.hi, Shift), mask)};
}
inline Bytes operator|(Bytes a, Bytes b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
inline Bytes operator-(Bytes a, Bytes b) { return {_mm256_sub_epi8(a.lo, b.lo), _mm256_sub_epi8(a.hi, b.hi)}; }
template <int N>
inline Bytes add_bytes(Bytes a) {
  if constexpr (N == 0) return a;
  return {_mm256_add_epi8(a.lo, _mm256_set1_epi8(N)), _mm256_add_epi8(a.hi, _mm256_set1_epi8(N))};
}
inline Bytes lookup16(const uint8_t* table, Bytes a) {
  const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return {_mm256_shuffle_epi8(t, a.lo), _mm256_shuffle_epi8(t, a.hi)};
}
inline Bytes broadcast4(const int8_t* p) {
  int32_t quad;
  __builtin_memcpy(&quad, p, sizeof quad);
  return {_mm256_set1_epi32(quad), _mm256_set1_epi32(quad)};
}
inline void keep(Bytes& a) { __asm__ volatile("" : "+x"(a.lo), "+x"(a.hi)); }
inline Ints dot_u7(Ints acc, Bytes w, Bytes a) { return {dot_step(acc.lo, w.lo, a.lo), dot_step(acc.hi, w.hi, a.hi)}; }
struct Shorts {
  __m256i lo, hi;
};
inline Shorts products_of_pairs(Bytes w, Bytes a) {
  return {_mm256_maddubs_epi16(w.lo, a.lo), _mm256_maddubs_epi16(w.hi, a.hi)};
}
inline Shorts operator+(Shorts a, Shorts b) {
  Shorts sum = {_mm256_add_epi16(a.lo, b.lo), _mm256_add_epi16(a.hi, b.hi)};
  __asm__("" : "+x"(sum.lo), "+x"(sum.hi));  // else GCC adds in pairs first, and half of the sums leave the registers
  return sum;
}
inline Ints add_pairs(Ints acc, Shorts a) {
  const __m256i ones = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(acc.lo, _mm256_madd_epi16(a.lo, ones)), _mm256_add_epi32(acc.hi, _mm256_madd_epi16(a.hi, ones))};
}
// vpdpbusd takes all of u8, so the bias is paid once, at the start.
inline Ints start_biased128(int32_t negative_sum) {
  return kHasDpbusd ? shift_left<7>(set1_int(negative_sum)) : set1_int(0);
}
// Else, of 8 unsigned bits two products would not fit: the sign of the weight moves to the activation.
inline __m256i dot_biased128_step(__m256i acc, __m256i w, __m256i a) {
  if constexpr (kHasDpbusd) return dot_step(acc, w, a);
  const __m256i s = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
  return dot_step(acc, _mm256_abs_epi8(s), _mm256_sign_epi8(a, s));
}
inline Ints dot_biased128(Ints acc, Bytes w, Bytes a) {
  return {dot_biased128_step(acc.lo, w.lo, a.lo), dot_biased128_step(acc.hi, w.hi, a.hi)};
}

}  // namespace
}  // namespace kt
