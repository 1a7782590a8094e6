// The dot product of bytes that vec_avx2.h is made with, by the instruction of AVX-VNNI: exact for all of u8 and s8.
#pragma once
#include <immintrin.h>

namespace kt {
namespace {

constexpr bool kHasDpbusd = true;

inline __m256i dot_step(__m256i acc, __m256i w, __m256i a) { return _mm256_dpbusd_avx_epi32(acc, w, a); }

}  // namespace
}  // namespace kt
