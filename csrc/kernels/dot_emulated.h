// dot_avxvnni.h in AVX2, as Intel's manual defines VPDPBUSD ("Intel 64 and IA-32 Architectures Software Developer's
// Manual", volume 2): each of four products of an unsigned and a signed byte, extended to 32 bits, is added to the sum,
// which wraps. So that what is made of it can be tested where there is no AVX-VNNI.
#pragma once
#include <immintrin.h>

namespace kt {
namespace {

constexpr bool kHasDpbusd = true;

// The products of the even and of the odd bytes: a byte of each 16 bits is extended, and vpmaddwd wraps nowhere.
inline __m256i dot_step(__m256i acc, __m256i w, __m256i a) {
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(0xFF)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(a, 8));
  return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}

}  // namespace
}  // namespace kt
