// A product for each head, with a matrix of its own.
#pragma once
#include <cstdint>

#include "ops/step.h"

namespace kt {

// out head h = weight of head h @ the first columns of x's head h.
class HeadProduct {
 public:
  HeadProduct(const KernelTable& table, const Model& model, const Values& values, Rows rows, const op::HeadLinear& op);

  // Bytes of presented input that one row needs, all heads.
  size_t activation_bytes() const { return row_bytes_ * heads_; }

  // Presents rows of the input in `activations`, which has max_rows * activation_bytes(). Read by multiply.
  RowFunction make_quantize(uint8_t* activations, int64_t max_rows) const;

  // One fork-join over heads x chunks of rows.
  WholeFunction make_multiply(ThreadPool& pool, const uint8_t* activations, int64_t max_rows) const;

 private:
  const KernelTable& table_;
  const Weight& weight_;
  Rows rows_;
  const float* x_;
  float* out_;
  int64_t width_, heads_;
  Activation activation_;
  size_t row_bytes_;
};

}  // namespace kt
