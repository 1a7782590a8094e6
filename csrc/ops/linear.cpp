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

// Panels whose far-out quads are added together, while their weights are still in the second-level cache.
constexpr int64_t kFarOutPanels = 18;

// Tiles of so many rows take three panels.
constexpr int64_t kManyRows = 96;

// How a product of all panels and rows is cut: chunk c is piece c % panel_chunks of the panels by piece c / panel_chunks of
// the rows, so chunks that read the same rows follow each other. As many for each thread, and all about equal.
struct Grid {
  int64_t rows, panels, row_chunks, row_chunk, panel_step, panel_chunks, chunks;

  Grid(int64_t rows, int64_t panels, size_t packed_bytes, int threads)
      : rows(rows), panels(panels), row_chunks(ceil_div(rows, kMostRows)) {
    row_chunk = std::min(rows, ceil_div(rows, row_chunks * kRowStep) * kRowStep);
    panel_step = row_chunk < kManyRows ? 1 : 3;
    const int64_t work = static_cast<int64_t>(packed_bytes) * row_chunk;
    const int64_t of_thread = std::min(kChunksPerThread, ceil_div(work, threads * kChunkWork));
    panel_chunks = std::min(ceil_div(threads * of_thread, row_chunks), ceil_div(panels, panel_step));
    chunks = row_chunks * panel_chunks;
  }

  int64_t rows_of(int64_t piece) const { return std::min(row_chunk, rows - piece * row_chunk); }
  int64_t first_panel(int64_t chunk) const { return panel(chunk % panel_chunks); }
  int64_t end_panel(int64_t chunk) const { return std::min(panel(chunk % panel_chunks + 1), panels); }

 private:
  int64_t panel(int64_t piece) const { return ceil_div(panels, panel_step) * piece / panel_chunks * panel_step; }
};

Activation activation_of(const KernelTable& table, const Weight& weight, bool precise) {
  const Activation kind = table.activation(weight.format());
  return precise && kind == Activation::kInt8 ? Activation::kInt8FarOut : kind;
}

// An index of far-out quads for each chunk of rows; all panels share it.
size_t index_bytes(const KernelTable& table, Activation activation, int64_t rows, int64_t cols) {
  if (activation != Activation::kInt8FarOut) return 0;
  return table.far_out_bytes(std::min(rows, kMostRows + kRowStep), cols);
}

size_t indices_bytes(const KernelTable& table, Activation activation, int64_t rows, int64_t cols) {
  return ceil_div(rows, kMostRows) * index_bytes(table, activation, rows, cols);
}

// The presented input of a product.
struct Presented {
  Activation activation;
  const uint8_t* rows;
  size_t row_bytes;
  uint8_t* indices;    // of the far-out quads of each chunk of rows
  size_t index_bytes;  // of one; 0: no product with far-out quads

  void make_indices(const KernelTable& table, const Grid& grid, int64_t cols) const {
    for (int64_t i = 0; index_bytes > 0 && i < grid.row_chunks; ++i)
      table.index_far_out(rows + i * grid.row_chunk * row_bytes, grid.rows_of(i), cols, indices + i * index_bytes);
  }
};

// Panels [begin, end) of one weight for the rows of one chunk; y is that of row 0, its rows `stride` floats apart.
void multiply_chunk(const KernelTable& table, const Weight& w, const Presented& input, const Grid& grid, int64_t chunk,
                    int64_t begin, int64_t end, const float* bias, float* y, int64_t stride) {
  const int64_t piece = chunk / grid.panel_chunks, first_row = piece * grid.row_chunk;
  const int64_t step = input.index_bytes > 0 ? kFarOutPanels : end - begin;
  y += first_row * stride;
  for (; begin < end; begin += step) {
    const int64_t stop = std::min(end, begin + step);
    table.gemm(w.format(), w.packed(), w.rows(), w.cols(), input.activation, input.rows + first_row * input.row_bytes,
               grid.rows_of(piece), begin, stop, bias, y, stride);
    if (input.index_bytes > 0)
      table.add_far_out(w.format(), w.packed(), w.rows(), w.cols(), input.indices + piece * input.index_bytes, begin, stop,
                        y, stride);
  }
}

}  // namespace

void product(ThreadPool& pool, const Weight& weight, const float* x, int64_t rows, bool precise, float* y) {
  if (rows == 0) return;
  const ThreadPool::Session session(pool);
  const KernelTable& table = weight.table();
  const int64_t cols = weight.cols();
  const Activation activation = activation_of(table, weight, precise);
  const size_t row_bytes = table.activation_bytes(activation, cols);
  const Mapping presented(row_bytes * rows + indices_bytes(table, activation, rows, cols));
  pool.parallel_for(ceil_div(rows, kRowStep), [&](int64_t chunk, int) {
    const int64_t r = chunk * kRowStep;
    table.quantize(activation, x + r * cols, cols, std::min(kRowStep, rows - r), cols, presented.data() + r * row_bytes);
  });
  const Grid grid(rows, weight.panels(), weight.bytes(), pool.threads());
  const Presented input = {activation, presented.data(), row_bytes, presented.data() + row_bytes * rows,
                           index_bytes(table, activation, rows, cols)};
  input.make_indices(table, grid, cols);
  pool.parallel_for(grid.chunks, [&](int64_t chunk, int) {
    multiply_chunk(table, weight, input, grid, chunk, grid.first_panel(chunk), grid.end_panel(chunk), nullptr, y,
                   weight.rows());
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
  parts_.push_back({&weight, std::move(bias), values.data[part.out], values.strides[part.out], input});
  panels_ += weight.panels();
  packed_bytes_ += weight.bytes();
}

size_t Product::activation_bytes(int64_t max_rows) const {
  size_t bytes = activation_bytes_ * max_rows;
  for (const Input& input : inputs_) bytes += indices_bytes(table_, input.activation, max_rows, cols_);
  return bytes;
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

WholeFunction Product::make_multiply(ThreadPool& pool, uint8_t* activations, int64_t max_rows) const {
  return [this, &pool, activations, max_rows](const Step& step) { multiply(step, pool, activations, max_rows); };
}

void Product::multiply(const Step& step, ThreadPool& pool, uint8_t* activations, int64_t max_rows) const {
  const int64_t rows = step.rows(rows_);
  if (rows == 0) return;
  const Grid grid(rows, panels_, packed_bytes_, pool.threads());
  std::vector<Presented> inputs;
  for (const Input& input : inputs_) {
    inputs.push_back({input.activation, activations + input.offset * max_rows, input.row_bytes,
                      activations + activation_bytes_ * max_rows,  // of one input at most
                      index_bytes(table_, input.activation, max_rows, cols_)});
    inputs.back().make_indices(table_, grid, cols_);
  }
  pool.parallel_for(grid.chunks, [&](int64_t chunk, int) {
    int64_t begin = grid.first_panel(chunk), end = grid.end_panel(chunk);
    for (const Part& part : parts_) {
      const Weight& w = *part.weight;
      const int64_t first = std::max(begin, int64_t{0}), last = std::min(end, w.panels());
      if (first < last) {
        multiply_chunk(table_, w, inputs[part.input], grid, chunk, first, last,
                       part.bias.empty() ? nullptr : part.bias.data(), part.out, part.stride);
        if (softcap_ > 0.0f) {
          const int64_t piece = chunk / grid.panel_chunks, n = grid.rows_of(piece);
          float* const y = part.out + piece * grid.row_chunk * part.stride;
          const int64_t o = first * kPanelRows, outputs = std::min(last * kPanelRows, w.rows()) - o;
          for (int64_t r = 0; r < n; ++r) table_.softcap(y + r * part.stride + o, outputs, softcap_);
        }
      }
      begin -= w.panels();
      end -= w.panels();
    }
  });
}

}  // namespace kt
