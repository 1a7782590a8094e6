// The products of integer formats by a dot product of bytes that kAvx2 does not have; all else of gemm is kAvx2's.
#pragma once
#include "kernels/activations.inl"
#include "kernels/products.inl"
#include "kernels/limits.inl"

namespace kt {
namespace {

// The same as KernelTable::gemm.
void byte_gemm(Format format, const uint8_t* packed, int64_t out_rows, int64_t cols, Activation kind, const uint8_t* act,
               int64_t rows, int64_t begin, int64_t end, const float* bias, float* y, int64_t ldy) {
  const int64_t panel_bytes = static_cast<int64_t>(kAvx2.packed_bytes(format, kPanelRows, cols));
  const int64_t stride = static_cast<int64_t>(kAvx2.activation_bytes(kind, cols));
  const Product p = {packed, out_rows, cols, panel_bytes, act, stride, bias, y, ldy};
  with_format(format, [&](auto f) {
    using F = decltype(f);
    if constexpr (kIsFloat<F> || kIsScaledFloat<F>) {
      kAvx2.gemm(format, packed, out_rows, cols, kind, act, rows, begin, end, bias, y, ldy);
    } else {
      integer_product<F>(p, rows, begin, end);
    }
  });
}

}  // namespace
}  // namespace kt
