// Weights from one file format to another of fewer bits.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cpu/kernel_table.h"
#include "cpu/thread_pool.h"

namespace kt {

struct Requantised {
  double error, size;  // sums of squares: of what was lost, and of the weights
};

// `rows` x `cols` elements of format `from`, the `size` bytes at `src`, to Q8_0 or Q4_0 at `out`, which has
// source_bytes(to, rows, cols). The same bytes and sums for any number of threads. std::invalid_argument for sizes or formats
// that do not fit, and for weights that are not finite or too large for scales in float16.
Requantised requantise(ThreadPool& pool, const KernelTable& table, Format from, Format to, int64_t rows, int64_t cols,
                       const uint8_t* src, size_t size, uint8_t* out);

}  // namespace kt
