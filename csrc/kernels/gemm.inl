// The products of all formats.
#pragma once
#include "kernels/products.inl"
#include "kernels/far_out.inl"

namespace kt {
namespace {

void gemm(Format format, const uint8_t* packed, int64_t out_rows, int64_t cols, Activation kind, const uint8_t* act,
          int64_t rows, int64_t begin, int64_t end, const float* bias, float* y, int64_t ldy) {
  with_format(format, [&](auto f) {
    using F = decltype(f);
    const int64_t stride = static_cast<int64_t>(activation_bytes(kind, cols));
    const Product p = {packed, out_rows, cols, panel_bytes<F>(cols), act, stride, bias, y, ldy};
    if constexpr (kIsFloat<F> || kIsScaledFloat<F>) {
      float_product<F>(p, rows, begin, end);
    } else {
      integer_product<F>(p, rows, begin, end);
    }
  });
}

}  // namespace
}  // namespace kt
