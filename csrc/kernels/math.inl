// exp, tanh and what activations need of them, over the vector vocabulary: equal on every instruction set.
#pragma once

namespace kt {
namespace {

constexpr float kLog2E = 1.44269504088896341f;

// e^x to about 1 ulp. 0 below -104, infinity above 88.7, NaN for NaN only. Cephes' expf: x = n ln 2 + r, a polynomial
// of degree 7 for e^r, and 2^n in two factors so that results below the normal range are rounded once.
inline Floats exp(Floats x) {
  x = min(set1(89.0f), max(set1(-104.0f), x));
  const Ints n = round_to_ints(x * set1(kLog2E));
  const Floats nf = to_floats(n);
  Floats r = fnma(nf, set1(0.693359375f), x);
  r = fnma(nf, set1(-2.12194440e-4f), r);
  Floats p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r) + set1(1.0f);
  const Ints half = round_to_ints(nf * set1(0.5f));
  const Ints bias = set1_int(127);
  return (p * as_floats(shift_left<23>(half + bias))) * as_floats(shift_left<23>(n - half + bias));
}

// 2^x for x <= 126, to about 1 ulp. Exactly 1 at 0; 0 below -126; NaN for NaN only. x is rounded downwards, so that no
// result is denormal.
inline Floats exp2(Floats x) {
  x = max(set1(-126.75f), x);
  const Ints n = round_to_ints(x - set1(0.5f));
  const Floats r = x - to_floats(n);
  Floats p = set1(2.16138083e-4f);
  p = fma(p, r, set1(1.24673767e-3f));
  p = fma(p, r, set1(9.67553258e-3f));
  p = fma(p, r, set1(0.0554852188f));
  p = fma(p, r, set1(0.240229324f));
  p = fma(p, r, set1(0.693147063f));
  p = fma(p, r, set1(1.0f));
  return p * as_floats(shift_left<23>(n + set1_int(127)));
}

// The same to 1e-4, for what is rounded to bfloat16. 1.5 * 2^23 + 127 rounds to integers, and leaves those with their
// bias in the lowest bits.
inline Floats coarse_exp2(Floats x) {
  const Floats rounder = set1(12583039.0f);
  x = max(set1(-126.75f), x);
  const Floats n = x + rounder;
  const Floats r = x - (n - rounder);
  Floats p = set1(0.055008933f);
  p = fma(p, r, set1(0.242211f));
  p = fma(p, r, set1(0.6932829f));
  p = fma(p, r, set1(1.0f));
  return p * as_floats(shift_left<23>(as_ints(n)));
}

// tanh x to about 2 ulp: Cephes' odd polynomial below 0.625, 1 - 2 / (e^2|x| + 1) beyond.
inline Floats tanh(Floats x) {
  const Ints sign = as_ints(x) & set1_int(INT32_MIN);
  const Floats a = as_floats(as_ints(x) & set1_int(INT32_MAX));
  const Floats z = x * x;
  Floats p = set1(-5.70498872745e-3f);
  p = fma(p, z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  const Floats small = fma(p * z, x, x);
  const Floats large = set1(1.0f) - set1(2.0f) / (exp(a + a) + set1(1.0f));
  return select_less(a, set1(0.625f), small, as_floats(as_ints(large) | sign));
}

// x / (1 + e^-z), the shape of both gated activations. x = -infinity, where that would be NaN, is taken as the most
// negative finite number.
inline Floats gate(Floats x, Floats z) {
  return x / (set1(1.0f) + exp(set1(0.0f) - z));
}
inline Floats finite_below(Floats x) { return max(set1(-3.40282347e38f), x); }

inline Floats silu(Floats x) {
  x = finite_below(x);
  return gate(x, x);
}

// x/2 (1 + tanh u) with u = sqrt(2/pi) (x + 0.044715 x^3), which is x / (1 + e^-2u), without its cancellation.
inline Floats gelu_tanh(Floats x) {
  x = finite_below(x);
  const Floats cube = x * x * x;
  return gate(x, set1(1.5957691216057308f) * fma(set1(0.044715f), cube, x));
}

}  // namespace
}  // namespace kt
