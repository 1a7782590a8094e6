// The dot product of bytes that vec_avx2.h is made with, by the instructions of AVX2.
#pragma once
#include <immintrin.h>

namespace kt {
namespace {

constexpr bool kHasDpbusd = false;

// vpmaddubsw saturates at 16 bits: two products of at most 127 * 127 fit, and so do two of 128 * 127.
inline __m256i dot_step(__m256i acc, __m256i w, __m256i a) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, a), _mm256_set1_epi16(1)));
}

}  // namespace
}  // namespace kt
