#include "ops/head_linear.h"

#include <algorithm>

namespace kt {
namespace {

constexpr int64_t kRowChunk = 96;  // a multiple of every table's tile of rows

}  // namespace

HeadProduct::HeadProduct(const KernelTable& table, const Model& model, const Values& values, Rows rows,
                         const op::HeadLinear& op)
    : table_(table),
      weight_(*model.weights[op.weight]),
      rows_(rows),
      x_(values.data[op.x]),
      out_(values.data[op.out]),
      width_(values.widths[op.x]),
      heads_(op.heads),
      activation_(table.activation(weight_.format())),
      row_bytes_(table.activation_bytes(activation_, weight_.cols())) {}

RowFunction HeadProduct::make_quantize(uint8_t* activations, int64_t max_rows) const {
  return [this, activations, max_rows](const Step&, int64_t begin, int64_t end) {
    for (int64_t h = 0; h < heads_; ++h)
      table_.quantize(activation_, x_ + begin * width_ + h * (width_ / heads_), width_, end - begin, weight_.cols(),
                      activations + (h * max_rows + begin) * row_bytes_);
  };
}

WholeFunction HeadProduct::make_multiply(ThreadPool& pool, const uint8_t* activations, int64_t max_rows) const {
  return [this, &pool, activations, max_rows](const Step& step) {
    const int64_t rows = step.rows(rows_), chunks = (rows + kRowChunk - 1) / kRowChunk;
    pool.parallel_for(heads_ * chunks, [&](int64_t unit, int) {
      const int64_t h = unit / chunks, r = unit % chunks * kRowChunk;
      table_.gemm(weight_.format(), weight_.packed(h), weight_.expert_rows(), weight_.cols(), activation_,
                  activations + (h * max_rows + r) * row_bytes_, std::min(kRowChunk, rows - r), 0, weight_.panels(),
                  nullptr, out_ + r * weight_.rows() + h * weight_.expert_rows(), weight_.rows());
    });
  };
}

}  // namespace kt
