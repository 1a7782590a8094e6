#include "ops/linear.h"

#include <algorithm>

#include "cpu/memory.h"
#include "ops/rows.h"

namespace kt {
namespace {

// Rows of a chunk: a product unpacks the weights of its chunk once for all of them, and keeps to the caches by itself.
constexpr int64_t kMostRows = 512;
constexpr int64_t kRowStep = 24;  // a multiple of every table's tile of rows
// Smaller chunks balance better; below this many weight bytes x rows the claim of a chunk would show.
constexpr int64_t kChunkWork = int64_t{24} << 10;
constexpr int64_t kChunksPerThread = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tiles of so many rows take three panels.
constexpr int64_t kManyRows = 96;

// How a product of all panels and rows is cut: chunk c is piece c % panel_chunks of the panels by piece c / panel_chunks of
// the rows, so chunks that read the same rows follow each other. As many for each thread, and all about equal.
struct Grid {
  int64_t panels, row_chunk, panel_step, panel_chunks, chunks;

  Grid(int64_t rows, int64_t panels, size_t packed_bytes, int threads) : panels(panels) {
    const int64_t row_chunks = ceil_div(rows, kMostRows);
    row_chunk = std::min(rows, ceil_div(rows, row_chunks * kRowStep) * kRowStep);
    panel_step = row_chunk < kManyRows ? 1 : 3;
    const int64_t work = static_cast<int64_t>(packed_bytes) * row_chunk;
    const int64_t of_thread = std::min(kChunksPerThread, ceil_div(work, threads * kChunkWork));
    panel_chunks = std::min(ceil_div(threads * of_thread, row_chunks), ceil_div(panels, panel_step));
    chunks = row_chunks * panel_chunks;
  }

  int64_t first_row(int64_t chunk) const { return chunk / panel_chunks * row_chunk; }
  int64_t first_panel(int64_t chunk) const { return panel(chunk % panel_chunks); }
  int64_t end_panel(int64_t chunk) const { return std::min(panel(chunk % panel_chunks + 1), panels); }

 private:
  int64_t panel(int64_t piece) const { return ceil_div(panels, panel_step) * piece / panel_chunks * panel_step; }
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
  const Grid grid(rows, weight.panels(), weight.bytes(), pool.threads());
  pool.parallel_for(grid.chunks, [&](int64_t chunk, int) {
    const int64_t r = grid.first_row(chunk);
    table.gemm(weight.format(), weight.packed(), weight.rows(), cols, activation, presented.data() + r * row_bytes,
               std::min(grid.row_chunk, rows - r), grid.first_panel(chunk), grid.end_panel(chunk), nullptr,
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

ReadAhead Product::read_ahead(int threads) const {
  ReadAhead of_threads(threads);
  for (int64_t t = 0; t < threads; ++t) {
    int64_t begin = panels_ * t / threads, end = panels_ * (t + 1) / threads;
    for (const Part& part : parts_) {
      const Weight& w = *part.weight;
      const int64_t first = std::max(begin, int64_t{0}), last = std::min(end, w.panels());
      if (first < last)
        of_threads[t].emplace_back(w.packed() + first * w.panel_bytes(), (last - first) * w.panel_bytes());
      begin -= w.panels();
      end -= w.panels();
    }
  }
  return of_threads;
}

WholeFunction Product::make_multiply(ThreadPool& pool, const uint8_t* activations, int64_t max_rows) const {
  return [this, &pool, activations, max_rows](const Step& step) { multiply(step, pool, activations, max_rows); };
}

void Product::multiply(const Step& step, ThreadPool& pool, const uint8_t* activations, int64_t max_rows) const {
  const int64_t rows = step.rows(rows_);
  if (rows == 0) return;
  const Grid grid(rows, panels_, packed_bytes_, pool.threads());
  pool.parallel_for(grid.chunks, [&](int64_t chunk, int) {
    const int64_t first_row = grid.first_row(chunk), n = std::min(grid.row_chunk, rows - first_row);
    int64_t begin = grid.first_panel(chunk), end = grid.end_panel(chunk);
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
