// Every weight format, and the one place that goes from its number to its type.
#pragma once
#include "formats/quads.h"
// In this order: each uses what is above it.
#include "formats/block32.h"
#include "formats/block256.h"
#include "formats/block_hf.h"
#include "formats/iq.h"
#include "formats/float.h"

namespace kt {
namespace {

// fn(the format's type, as a value); false, and no call, for a number that is none.
template <class Fn>
inline bool with_format(Format format, const Fn& fn) {
  switch (format) {
    case Format::kF32: fn(F32()); return true;
    case Format::kF16: fn(F16()); return true;
    case Format::kBF16: fn(BF16()); return true;
    case Format::kQ4_0: fn(Q4_0()); return true;
    case Format::kQ4_1: fn(Q4_1()); return true;
    case Format::kQ5_0: fn(Q5_0()); return true;
    case Format::kQ5_1: fn(Q5_1()); return true;
    case Format::kQ8_0: fn(Q8_0()); return true;
    case Format::kQ2_K: fn(Q2_K()); return true;
    case Format::kQ3_K: fn(Q3_K()); return true;
    case Format::kQ4_K: fn(Q4_K()); return true;
    case Format::kQ5_K: fn(Q5_K()); return true;
    case Format::kQ6_K: fn(Q6_K()); return true;
    case Format::kIQ4_NL: fn(IQ4_NL()); return true;
    case Format::kIQ4_XS: fn(IQ4_XS()); return true;
    case Format::kIQ1_S: fn(IQ1_S()); return true;
    case Format::kIQ1_M: fn(IQ1_M()); return true;
    case Format::kIQ2_XXS: fn(IQ2_XXS()); return true;
    case Format::kIQ2_XS: fn(IQ2_XS()); return true;
    case Format::kIQ2_S: fn(IQ2_S()); return true;
    case Format::kIQ3_XXS: fn(IQ3_XXS()); return true;
    case Format::kIQ3_S: fn(IQ3_S()); return true;
    case Format::kMXFP4: fn(MXFP4()); return true;
    case Format::kF8_E4M3: fn(F8_E4M3()); return true;
    case Format::kI4_32: fn(I4<32>()); return true;
    case Format::kI4_128: fn(I4<128>()); return true;
    case Format::kI4Z_32: fn(I4Z<32>()); return true;
    case Format::kI4Z_128: fn(I4Z<128>()); return true;
  }
  return false;
}

template <class F>
constexpr bool kIsFloat = false;
template <>
constexpr bool kIsFloat<F32> = true;
template <>
constexpr bool kIsFloat<F16> = true;
template <>
constexpr bool kIsFloat<BF16> = true;

// Entries of codebooks (iq.h).
template <class F>
constexpr bool kIsCodebook = __is_base_of(Iq256, F);

// Floats in blocks with a scale.
template <class F>
constexpr bool kIsScaledFloat = false;
template <>
constexpr bool kIsScaledFloat<F8_E4M3> = true;

}  // namespace
}  // namespace kt
