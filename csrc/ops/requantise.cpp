#include "ops/requantise.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "weight.h"

namespace kt {
namespace {

// What a thread works in: a packed panel of the source, and one of its rows as floats.
struct Scratch {
  std::vector<uint8_t> panel;
  std::vector<float> row;
};

}  // namespace

Requantised requantise(ThreadPool& pool, const KernelTable& table, Format from, Format to, int64_t rows, int64_t cols,
                       const uint8_t* src, size_t size, uint8_t* out) {
  if (to != Format::kQ8_0 && to != Format::kQ4_0)
    throw std::invalid_argument("to: type " + std::to_string(static_cast<int32_t>(to)) + " is neither Q8_0 nor Q4_0");
  if (const size_t expected = source_bytes(from, rows, cols); size != expected)
    throw std::invalid_argument("data: " + std::to_string(size) + " bytes, expected " + std::to_string(expected));
  const size_t from_bytes = source_bytes(from, 1, cols), to_bytes = source_bytes(to, 1, cols);
  const size_t panel_bytes = table.packed_bytes(from, kPanelRows, cols);
  if (panel_bytes == 0) throw std::invalid_argument(std::string("from: not supported by ") + table.name);
  std::vector<Scratch> scratch(pool.threads(), {std::vector<uint8_t>(panel_bytes), std::vector<float>(cols)});
  const int64_t panels = (rows + kPanelRows - 1) / kPanelRows;
  std::vector<double> sums(2 * panels);
  std::atomic<bool> finite{true};
  const ThreadPool::Session session(pool);
  pool.parallel_for(panels, [&](int64_t panel, int thread) {
    Scratch& s = scratch[thread];
    const int64_t first = panel * kPanelRows, outputs = std::min<int64_t>(rows - first, kPanelRows);
    table.pack(from, src + first * from_bytes, outputs, cols, 0, 1, s.panel.data());
    for (int64_t lane = 0; lane < outputs; ++lane) {
      table.unpack_row(from, s.panel.data(), outputs, cols, lane, s.row.data());
      if (!table.requantize(to, s.row.data(), cols, out + (first + lane) * to_bytes, &sums[2 * panel])) finite = false;
    }
  });
  if (!finite) throw std::invalid_argument("weights are not finite, or too large for scales in float16");
  Requantised total{};
  for (int64_t panel = 0; panel < panels; ++panel) {
    total.error += sums[2 * panel];
    total.size += sums[2 * panel + 1];
  }
  return total;
}

}  // namespace kt
