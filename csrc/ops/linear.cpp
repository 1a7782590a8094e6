#include "ops/linear.h"

#include <algorithm>

#include "cpu/memory.h"
#include "ops/rows.h"

namespace kt {
namespace {

// Rows whose presented input should stay in the second-level cache while the panels of a chunk stream by.
constexpr int64_t kActivationBytes = int64_t{384} << 10;
constexpr int64_t kRowStep = 48;  // a multiple of every table's tile of rows
// Smaller chunks balance better; below this many weight bytes x rows the claim of a chunk would show.
constexpr int64_t kChunkWork = int64_t{24} << 10;
constexpr int64_t kChunksPerThread = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a product of all panels and rows is cut: chunk c is panels c % panel_chunks of rows c / panel_chunks, so chunks that
// read the same rows follow each other.
struct Grid {
  int64_t row_chunk, panel_chunk, panel_chunks, chunks;

  Grid(int64_t rows, size_t row_bytes, int64_t panels, size_t packed_bytes, int threads) {
    const int64_t fitting = std::max(kActivationBytes / static_cast<int64_t>(row_bytes) / kRowStep, int64_t{1});
    row_chunk = std::min(rows, fitting * kRowStep);
    const int64_t row_chunks = ceil_div(rows, row_chunk);
    const int64_t panel_work = static_cast<int64_t>(packed_bytes) / panels * row_chunk;
    const int64_t balanced = ceil_div(panels * row_chunks, threads * kChunksPerThread);
    panel_chunk = std::min(panels, std::max(balanced, ceil_div(kChunkWork, panel_work)));
    panel_chunks = ceil_div(panels, panel_chunk);
    chunks = row_chunks * panel_chunks;
  }
};

Activation activation_of(const KernelTable& table, const Weight& weight, bool precise) {
  const Activation kind = table.activation(weight.format());
  return precise && kind == Activation::kInt8 ? Activation::kInt8FarOut : kind;
}

}  // namespace

void product(ThreadPool& pool, const Weight& weight, const float* x, int64_t rows, bool precise, float* y) {
  if (rows == 0) return;
  const ThreadPool::Session session(pool);
  const KernelTable& table = weight.table();
  const int64_t cols = weight.cols();
  const Activation activation = activation_of(table, weight, precise);
  const size_t row_bytes = table.activation_bytes(activation, cols);
  const Mapping presented(row_bytes * rows);
  pool.parallel_for(ceil_div(rows, kRowStep), [&](int64_t chunk, int) {
    const int64_t r = chunk * kRowStep;
    table.quantize(activation, x + r * cols, cols, std::min(kRowStep, rows - r), cols, presented.data() + r * row_bytes);
  });
  const Grid grid(rows, row_bytes, weight.panels(), weight.bytes(), pool.threads());
  pool.parallel_for(grid.chunks, [&](int64_t chunk, int) {
    const int64_t r = chunk / grid.panel_chunks * grid.row_chunk, begin = chunk % grid.panel_chunks * grid.panel_chunk;
    table.gemm(weight.format(), weight.packed(), weight.rows(), cols, activation, presented.data() + r * row_bytes,
               std::min(grid.row_chunk, rows - r), begin, std::min(begin + grid.panel_chunk, weight.panels()), nullptr,
               y + r * weight.rows(), weight.rows());
  });
}

Product::Product(const KernelTable& table, const Model& model, const Values& values, Rows rows, const op::Linear& op)
    : table_(table), x_(values.data[op.x]), cols_(values.widths[op.x]), rows_(rows), precise_(op.precise) {
  for (const op::LinearPart& part : op.parts) add(model, part, values);
}

Product::Product(const KernelTable& table, const Model& model, const Values& values, Rows rows, const op::Logits& op)
    : table_(table),
      x_(values.data[op.x]),
      cols_(values.widths[op.x]),
      rows_(rows),
      softcap_(op.softcap),
      precise_(op.precise) {
  add(model, {op.weight, op::kNone, op.out}, values);
}

void Product::add(const Model& model, const op::LinearPart& part, const Values& values) {
  const Weight& weight = *model.weights[part.weight];
  const Activation activation = activation_of(table_, weight, precise_);
  size_t input = 0;
  while (input < inputs_.size() && inputs_[input].activation != activation) ++input;
  if (input == inputs_.size()) {
    const size_t row_bytes = table_.activation_bytes(activation, cols_);
    inputs_.push_back({activation, row_bytes, activation_bytes_});
    activation_bytes_ += row_bytes;
  }
  std::vector<float> bias = part.bias == op::kNone ? std::vector<float>() : vector_of(*model.weights[part.bias]);
  parts_.push_back({&weight, std::move(bias), values.data[part.out], input});
  panels_ += weight.panels();
  packed_bytes_ += weight.bytes();
}

RowFunction Product::make_quantize(uint8_t* activations, int64_t max_rows) const {
  return [this, activations, max_rows](const Step&, int64_t begin, int64_t end) {
    for (const Input& input : inputs_)
      table_.quantize(input.activation, x_ + begin * cols_, cols_, end - begin, cols_,
                      activations + input.offset * max_rows + begin * input.row_bytes);
  };
}

WholeFunction Product::make_multiply(ThreadPool& pool, const uint8_t* activations, int64_t max_rows) const {
  return [this, &pool, activations, max_rows](const Step& step) { multiply(step, pool, activations, max_rows); };
}

void Product::multiply(const Step& step, ThreadPool& pool, const uint8_t* activations, int64_t max_rows) const {
  const int64_t rows = step.rows(rows_);
  if (rows == 0) return;
  const Grid grid(rows, activation_bytes_, panels_, packed_bytes_, pool.threads());
  pool.parallel_for(grid.chunks, [&](int64_t chunk, int) {
    const int64_t first_row = chunk / grid.panel_chunks * grid.row_chunk;
    const int64_t n = std::min(grid.row_chunk, rows - first_row);
    int64_t begin = chunk % grid.panel_chunks * grid.panel_chunk;
    int64_t end = std::min(begin + grid.panel_chunk, panels_);
    for (const Part& part : parts_) {
      const Weight& w = *part.weight;
      const int64_t first = std::max(begin, int64_t{0}), last = std::min(end, w.panels());
      if (first < last) {
        const Input& input = inputs_[part.input];
        float* y = part.out + first_row * w.rows();
        table_.gemm(w.format(), w.packed(), w.rows(), w.cols(), input.activation,
                    activations + input.offset * max_rows + first_row * input.row_bytes, n, first, last,
                    part.bias.empty() ? nullptr : part.bias.data(), y, w.rows());
        if (softcap_ > 0.0f) {
          const int64_t o = first * kPanelRows, outputs = std::min(last * kPanelRows, w.rows()) - o;
          for (int64_t r = 0; r < n; ++r) table_.softcap(y + r * w.rows() + o, outputs, softcap_);
        }
      }
      begin -= w.panels();
      end -= w.panels();
    }
  });
}

}  // namespace kt
