// Packed weights: made once at load by a table's pack, read-only afterwards.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

#include "cpu/kernel_table.h"
#include "cpu/memory.h"
#include "cpu/thread_pool.h"

namespace kt {

// Bytes of `rows` x `cols` elements in the file's layout. std::invalid_argument: unknown format, sizes out of range, or
// cols not a multiple of the format's block.
size_t source_bytes(Format format, int64_t rows, int64_t cols);

// `rows` outputs of `cols` inputs, tied to the table that packed them.
class Weight {
 public:
  // Repacks `size` bytes at `src`, in parallel over panels. std::invalid_argument when the size does not fit or the table
  // does not take the format.
  Weight(ThreadPool& pool, const KernelTable& table, Format format, int64_t rows, int64_t cols, const uint8_t* src,
         size_t size);

  const KernelTable& table() const { return *table_; }
  Format format() const { return format_; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int64_t panels() const { return (rows_ + kPanelRows - 1) / kPanelRows; }
  const uint8_t* packed() const { return packed_; }
  size_t bytes() const { return bytes_; }

  // Dequantised row of cols() floats; 0 <= i < rows().
  void row(int64_t i, float* out) const { table_->unpack_row(format_, packed_, rows_, cols_, i, out); }

 private:
  const KernelTable* table_;
  Format format_;
  int64_t rows_, cols_;
  size_t bytes_ = 0;
  std::shared_ptr<Mapping> memory_;  // often shared with other weights
  uint8_t* packed_ = nullptr;
};

}  // namespace kt
